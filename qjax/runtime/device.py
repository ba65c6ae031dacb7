"""Where a program will run, as kernels call it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection
from typing import Any

import jax
from qjax_kernels.request import Device

# As `jax.Device.device_kind` calls them.
_TPUS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
         "TPU7x": "tpu7x", "TPU v7x": "tpu7x"}  # fmt: skip

# As /proc/cpuinfo calls what each needs, the best first.
_CPUS = {
    "amx": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"},
    "avx512_vnni": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avx2": {"avx2", "fma"},
    "neon": {"asimddp"},
}


def device_of(device: Any = None) -> Device:
    """Returns what kernels need to know of a device.

    Args:
      device: a `Device` already, a `jax.Device`, also one of an ahead-of-time topology; None for jax's default device.

    Returns:
      A `Device`; a chip that kernels have no name for is called as jax calls it.

    Raises:
      TypeError: `device` is something else.

    Example:
      >>> device_of(jax.devices("cpu")[0]).platform
      'cpu'
    """
    if isinstance(device, Device):
        return device
    if device is None:
        device = _default()
    if not hasattr(device, "platform") or not hasattr(device, "device_kind"):
        raise TypeError(f"`device` must be a qjax.Device or a jax.Device, got {type(device).__name__}: qjax.Device('tpu', 'v6e'), "
                        "qjax.Device('cuda', 'sm_90a', 132)")  # fmt: skip
    if device.platform == "tpu":
        kind = str(device.device_kind)
        return Device("tpu", _TPUS.get(kind, kind), _cores(device))
    if device.platform in ("gpu", "cuda"):
        return Device("cuda", gpu_chip(str(getattr(device, "compute_capability", ""))), _cores(device))
    if device.platform == "cpu":
        return Device("cpu", cpu_chip(), _threads())
    return Device(device.platform, str(device.device_kind))


def gpu_chip(capability: str) -> str:
    """The architecture that code is compiled for, with the features of its own where kernels use them.

    >>> gpu_chip("8.0"), gpu_chip("9.0"), gpu_chip("10.0")
    ('sm_80', 'sm_90a', 'sm_100a')
    """
    if not re.fullmatch(r"\d+\.\d+", capability):
        return "unknown"
    major, minor = capability.split(".")
    return f"sm_{major}{minor}{'a' if int(major) >= 9 else ''}"


@functools.cache
def cpu_chip() -> str:
    """The best instruction set of this machine that kernels are written for."""
    try:
        with open("/proc/cpuinfo", encoding="utf8", errors="replace") as file:
            flags = set(next((line for line in file if line.startswith(("flags", "Features"))), "").split())
    except OSError:
        return "plain"
    return instruction_set(flags)


def instruction_set(flags: Collection[str]) -> str:
    """The best one that kernels are written for of those that a CPU has, as Linux calls them.

    >>> wide = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
    >>> instruction_set(wide), instruction_set({*wide, "amx_tile", "amx_int8", "amx_bf16"}), instruction_set({"sse2"})
    ('avx512_vnni', 'amx', 'plain')
    """
    return next((name for name, needed in _CPUS.items() if needed <= set(flags)), "plain")


def _default() -> Any:
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return jax.devices()[0] if chosen is None else chosen


def _cores(device: Any) -> int:
    # A device of a topology alone has no such count.
    return int(getattr(device, "core_count", 1) or 1) if getattr(device, "client", None) is not None else 1


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
