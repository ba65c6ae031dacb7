"""Builds the C++ library: one file for each instruction set with flags of its own, so that which one runs is chosen when it runs.

`python -m qjax_kernels.cpu.build` builds it in place, beside the jax of that Python; setup.py does the same when the package is installed.
Imports nothing but Python's own library, for setup.py runs it before anything is installed.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile

SOURCES = pathlib.Path(__file__).parent / "src"
LIBRARY = "libqjax_cpu.dylib" if sys.platform == "darwin" else "libqjax_cpu.so"

_COMMON = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma"]
_X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": _AVX512,
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
_ARM = {"neon": ["-march=armv8.2-a+dotprod"]}


class BuildError(RuntimeError):
    """Why there is no library."""


def flags_of(source: str, machine: str = "") -> list[str]:
    """The compiler's flags for one file.

    Args:
      source: its name without the suffix, such as "avx2".
      machine: as `platform.machine` calls it; this one if empty.

    Example:
      >>> flags_of("avx2", "x86_64")[-2:]
      ['-mavx2', '-mfma']
    """
    machine = (machine or platform.machine()).lower()
    own = _X86 if machine in ("x86_64", "amd64") else _ARM if machine in ("aarch64", "arm64") else {}
    return [*_COMMON, *own.get(source, [])]


def headers() -> pathlib.Path:
    """The folder of XLA's headers: of the jaxlib beside this Python if there is one, else of the one that can be imported.

    An isolated build sees a jaxlib of its own, which may not be the one that the package will run with.

    Raises:
      BuildError: there is none.
    """
    folders = [pathlib.Path(sysconfig.get_paths()[name]) / "jaxlib" for name in ("platlib", "purelib")]
    spec = importlib.util.find_spec("jaxlib")
    folders += [pathlib.Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / "include" / "xla" / "ffi" / "api" / "ffi.h").exists():
            return folder / "include"
    raise BuildError("no jaxlib with XLA's headers was found")


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++.

    Raises:
      BuildError: there is none.
    """
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler was found: install g++ or clang++, or set CXX")


def build(target: pathlib.Path, include: pathlib.Path | None = None, cxx: str = "", machine: str = "") -> pathlib.Path:
    """Compiles and links the library.

    Args:
      target: the folder that it is written to.
      include: XLA's headers; `headers()` if None.
      cxx: the compiler; `compiler()` if empty.
      machine: for another one than this, as `platform.machine` calls it; `cxx` must be a compiler for it.

    Returns:
      The library.

    Raises:
      BuildError: with what the compiler said.
    """
    include, cxx = include or headers(), cxx or compiler()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        objects = [pathlib.Path(work) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))]

        def compile_one(out: pathlib.Path) -> None:
            source = SOURCES / f"{out.stem}.cpp"
            _run([cxx, *flags_of(out.stem, machine), "-isystem", str(include), "-c", str(source), "-o", str(out)])

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, objects))
        linked = pathlib.Path(work) / LIBRARY  # replaced at once: a process may have the old one open
        _run([cxx, "-shared", "-pthread", *map(str, objects), "-o", str(linked)])
        moving = target / f".{LIBRARY}.{os.getpid()}"
        shutil.copy2(linked, moving)
        moving.replace(target / LIBRARY)
    return target / LIBRARY


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    print(build(pathlib.Path(__file__).parent))
