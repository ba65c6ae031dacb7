"""The kernels that come with the package, as values: each is a function of `qjax_kernels` and what translates our operands for it."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from qjax.runtime.device import device_of
from qjax.runtime.kernels import Kernel, Runtime
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


def runtime_of(
    kernel: str | None = None,
    device: Any = None,
    kernels: Sequence[Kernel] | None = None,
    tuned: str | os.PathLike[str] | None = None,
) -> Runtime:
    """What `quantized` chooses from, for the same arguments."""
    where = device_of(device)
    if tuned is not None and not pathlib.Path(tuned).is_dir():
        raise ValueError(f"`tuned` must be the folder of what `qjax tune --folder` measured; {str(tuned)!r} is no folder")
    known = {} if kernels is not None and tuned is None else read_tuned(tuned_file(where, tuned))
    return Runtime(where, installed_kernels(where.platform) if kernels is None else tuple(kernels), kernel, known)
