"""The kernels that come with the package, as values: each is a function of `qjax_kernels` and what translates our operands for it."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from qjax.runtime.device import device_of
from qjax.runtime.kernels import XLA, CacheKernel, Kernel, Runtime, check_name
from qjax.runtime.tuning import read_tuned, tuned_file


@functools.cache
def installed_kernels(platform: str) -> tuple[Kernel, ...]:
    """Returns the kernels for a platform, the fastest first; those of other platforms are not imported.

    Args:
      platform: as `qjax.Device.platform`.

    Returns:
      Kernels; none where there are none.

    Example:
      >>> [kernel.name for kernel in installed_kernels("cpu")]
      ['cpu int8', 'cpu weight-only']
    """
    if platform == "cpu":
        from qjax.runtime import on_cpu

        return on_cpu.kernels()
    if platform == "cuda":
        from qjax.runtime import on_cuda

        return on_cuda.kernels()
    if platform == "tpu":
        from qjax.runtime import on_tpu

        return on_tpu.kernels()
    return ()


def installed_cache_kernels(platform: str) -> tuple[CacheKernel, ...]:
    """Returns the kernels that read packed caches, as `installed_kernels` does.

    Example:
      >>> installed_cache_kernels("cpu")
      ()
    """
    if platform == "tpu":
        from qjax.runtime import on_tpu

        return on_tpu.cache_kernels()
    return ()


def runtime_of(
    kernel: str | None = None,
    device: Any = None,
    kernels: Sequence[Kernel | CacheKernel] | None = None,
    tuned: str | os.PathLike[str] | None = None,
) -> Runtime:
    """What `quantized` chooses from, for the same arguments."""
    where = device_of(device)
    if tuned is not None and not pathlib.Path(tuned).is_dir():
        raise ValueError(f"`tuned` must be the folder of what `qjax tune --folder` measured; {str(tuned)!r} is no folder")
    known = {} if kernels is not None and tuned is None else read_tuned(tuned_file(where, tuned))
    if kernels is None:
        products, reads = installed_kernels(where.platform), installed_cache_kernels(where.platform)
    else:
        products = tuple(one for one in kernels if not isinstance(one, CacheKernel))
        reads = tuple(one for one in kernels if isinstance(one, CacheKernel))
    if kernel is not None:
        if kernels is None and kernel not in {one.name for one in (*products, *reads)} and (other := _platform_of(kernel)):
            raise ValueError(f"`kernel` {kernel!r} is for {other}, and the program for {where.platform}: give a "
                             f"qjax.Device({other!r}, ...) as `device` to compile for another machine, or leave `kernel` out")  # fmt: skip
        check_name(kernel, (*products, *reads))
    # What is forced is the only kernel that may run: the others of both kinds leave their work to XLA.
    for_reads = kernel in {one.name for one in reads}
    of_products, of_reads = (XLA, kernel) if for_reads else (kernel, None if kernel is None else XLA)
    return Runtime(where, products, of_products, known, reads, of_reads)


def _platform_of(kernel: str) -> str:
    """The platform that a kernel of this name is for; "" if there is none of it that can be loaded here."""
    for platform in ("cpu", "cuda", "tpu"):
        if kernel in {one.name for one in (*installed_kernels(platform), *installed_cache_kernels(platform))}:
            return platform
    return ""
