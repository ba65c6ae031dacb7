"""Which kernel each format gets on a machine, from facts alone: nothing runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from collections.abc import Sequence

import jax
from qjax_kernels.request import Device, Request

from qjax.core import ActSpec, CacheSpec, Spec, init_cache
from qjax.runtime.attention import cache_kernel_of
from qjax.runtime.kernels import Runtime, choose
from qjax.runtime.request import activation_of, weight_of


@dataclasses.dataclass(frozen=True)
class Path:
    """What runs a product x (rows, K) w (N, K)^T.

    Attributes:
      weight: the spec of w, as text.
      activation: that of x, "" where it stays float; "rotated" behind it where x is rotated first.
      rows: of x.
      kernel: a kernel's name, or "xla".
      reasons: (kernel, why not) for those that would have come first; ("", reason) where no kernel is written for such products.
    """

    weight: str
    activation: str
    rows: int
    kernel: str
    reasons: tuple[tuple[str, str], ...]


def path_of(
    weight: Spec, activation: ActSpec | None, runtime: Runtime, rows: int, n: int = 4096, k: int = 4096, dtype: str = "bfloat16",
    rotated: bool = False,
) -> Path:  # fmt: skip
    """Says what runs a product.

    Args:
      weight: the spec of w.
      activation: that of x, or None.
      runtime: where, and the kernels to choose from.
      rows: of x.
      n: of w.
      k: contracted values.
      dtype: of x and the result, "float32" or "bfloat16".
      rotated: whether x is rotated first, see `qjax.online_rotation`.

    Returns:
      A `Path`.

    Example:
      >>> import qjax
      >>> path_of(qjax.int4(block=(32, 32)), None, Runtime(Device("cpu", "avx2")), 1).reasons
      (('', 'a 2-D block of weights shares a scale'),)
    """
    texts = str(weight), " ".join(filter(None, ("" if activation is None else str(activation), "rotated" if rotated else ""))), rows
    form, act = weight_of(weight, k), activation_of(activation)
    if isinstance(form, str):
        return Path(*texts, "xla", (("", form),))
    if act is not None and act[0] is None:
        return Path(*texts, "xla", (("", act[1]),))
    kind, rotation = "float32" if dtype == "float32" else "bfloat16", k if rotated else None
    request = Request(runtime.device, rows, n, k, form, kind, act[0] if act else None, rotation=rotation)
    choice = choose(request, runtime.kernels, tuned=runtime.tuned)
    if choice.kernel is not None or choice.reasons or not runtime.kernels:
        return Path(*texts, "xla" if choice.kernel is None else choice.kernel.name, choice.reasons)
    return Path(*texts, "xla", (("", f"no kernel on {runtime.device.platform} takes {request.activation or 'float'} activations"),))


def cache_path_of(
    spec: CacheSpec, runtime: Runtime, channels: int = 128, capacity: int = 4096, dtype: str = "bfloat16"
) -> tuple[str, tuple[str, ...]]:
    """Says what reads a packed cache when a token is decoded with `qjax.cached_attention`.

    Args:
      spec: of keys and values.
      runtime: where, and the kernels to choose from.
      channels: of a head.
      capacity: tokens that the cache has room for.
      dtype: of the queries, "float32" or "bfloat16".

    Returns:
      (a kernel's name, or "xla", where the cache is dequantized; why not faster ones).

    Example:
      >>> import qjax
      >>> cache_path_of(qjax.kv_cache(qjax.int8()), Runtime(Device("cpu", "avx2")))
      ('xla', ('there is no kernel that reads packed caches on cpu',))
    """
    cache = jax.eval_shape(lambda: init_cache((1, 1, capacity, channels), dtype, spec, 2))
    return cache_kernel_of(cache, cache, runtime)


def advice(device: Device) -> tuple[str, ...]:
    """What to install for faster paths on the machine that this runs on; () if nothing is missing.

    Args:
      device: where programs run now.

    Returns:
      Sentences.
    """
    found = [_accelerator(device, pathlib.Path("/dev"))]
    if device.platform == "cpu":
        from qjax_kernels import cpu

        reason = cpu.why_not_loaded()
        found.append(f"there are no C++ kernels: {reason}" if reason else "")
    if device.platform == "cuda" and importlib.util.find_spec("absl") is None:
        found.append("kernels for GPUs need absl-py: pip install absl-py")
    return tuple(filter(None, found))


def _accelerator(device: Device, devices: pathlib.Path) -> str:
    """An accelerator that the machine has and jax does not use."""
    if device.platform == "cpu" and _any(devices, ("nvidia[0-9]*",)):
        return "this machine has an NVIDIA GPU that jax does not see: pip install 'jax[cuda13]'"
    if device.platform == "cpu" and _any(devices, ("accel[0-9]*",)):
        return "this machine has a TPU that jax does not see: pip install 'jax[tpu]'"
    return ""


def _any(folder: pathlib.Path, patterns: Sequence[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
