"""The compiled library: found, checked, handed to jax once."""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re
from typing import NamedTuple

import jax

from qjax_kernels.cpu.layout import LAYOUT_VERSION

TARGET = "qjax_cpu_matmul"
INSTRUCTION_SETS = {"plain": 1, "avx2": 2, "avx512_vnni": 3, "amx": 4, "neon": 5}
_NAMES = ("libqjax_cpu.so", "libqjax_cpu.dylib")


class Loaded(NamedTuple):
    """What loading found: the instruction sets of this machine, the best first, or why there are no kernels."""

    reason: str
    instruction_sets: tuple[str, ...]


@functools.cache
def load(folder: pathlib.Path = pathlib.Path(__file__).parent) -> Loaded:
    """Loads the library of a folder and registers its kernel with jax, once in a process.

    Args:
      folder: where it lies.

    Returns:
      A `Loaded`; its reason is "" if the kernels are there.
    """
    files = [folder / name for name in _NAMES if (folder / name).exists()]
    if not files:
        return Loaded("the C++ kernels were not built: install a C++ compiler (g++ or clang++) and reinstall the package", ())
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        return Loaded(f"the C++ kernels cannot be loaded: {error}", ())
    reason = _why_not(library)
    if reason:
        return Loaded(reason, ())
    found = tuple(name for name in ("neon", "amx", "avx512_vnni", "avx2", "plain") if library.qjax_cpu_has(INSTRUCTION_SETS[name]))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.qjax_cpu_matmul), platform="cpu")
    return Loaded("", found)


def why_not_loaded() -> str:
    """Why the C++ kernels are not there, in words; "" if they are."""
    return load().reason


def best_instruction_set() -> str:
    """The one that runs where none is forced; "" without the library.

    Example:
      >>> best_instruction_set() in ("", *INSTRUCTION_SETS)
      True
    """
    return load().instruction_sets[0] if load().instruction_sets else ""


def ffi_version(header: str) -> tuple[int, int]:
    """The version of XLA's foreign function interface that a header declares.

    Args:
      header: the text of `xla/ffi/api/c_api.h`.

    Raises:
      ValueError: it declares none.

    Example:
      >>> ffi_version("#define XLA_FFI_API_MAJOR 0\\n#define XLA_FFI_API_MINOR 3")
      (0, 3)
    """
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        raise ValueError("`header` declares no XLA_FFI_API_MAJOR and XLA_FFI_API_MINOR")
    return int(found[0][1]), int(found[1][1])


def _why_not(library: ctypes.CDLL) -> str:
    built = library.qjax_cpu_api_major(), library.qjax_cpu_api_minor()
    here = ffi_version((pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text())
    if built[0] != here[0] or built[1] > here[1]:  # a newer jaxlib serves what was built for an older minor version, not the reverse
        return (
            f"the C++ kernels were built for version {built[0]}.{built[1]} of XLA's foreign function interface, and this jaxlib has "
            f"{here[0]}.{here[1]}: reinstall the package beside this jaxlib, with pip install --no-build-isolation"
        )
    if library.qjax_cpu_layout_version() != LAYOUT_VERSION:
        return (
            f"the C++ kernels read layout version {library.qjax_cpu_layout_version()}, and this package packs version {LAYOUT_VERSION}: "
            "reinstall it"
        )
    return ""
