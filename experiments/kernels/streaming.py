"""How fast threads read memory that no cache holds, which is what kernels that stream their weights are held against. See README.md."""

import ctypes
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
from qjax_kernels.cpu import build

BYTES = 2**30  # more than the caches of any machine that the products were measured on: one had a third level of 480 MiB
TURNS = 7
_SOURCE = """
typedef int V __attribute__((vector_size(64), aligned(4)));

/* All bits of `n` bytes in one, from `streams` places at once, each asked for a KiB ahead. */
static int bits(const char *from, long n, int streams) {
  V all[8] = {};
  const long each = n / streams / 64 * 64;
  for (long i = 0; i + 64 <= each; i += 64)
    for (int s = 0; s < streams; ++s) {
      __builtin_prefetch(from + s * each + i + 1024);
      all[s] |= *(const V *)(from + s * each + i);
    }
  int out = 0;
  for (int s = 0; s < streams; ++s)
    for (int i = 0; i < 16; ++i) out |= all[s][i];
  return out;
}
int one(const char *from, long n) { return bits(from, n, 1); }
int four(const char *from, long n) { return bits(from, n, 4); }
"""


def reading(threads: int) -> dict[str, float]:
    """Bytes a second that `threads` read together, by loop and memory: the best of several turns, for other work only takes from it.

    NumPy's maximum, and loops in C where there is a compiler, for a machine may read faster than NumPy does. NumPy's memory comes in huge
    pages where the system gives them to who asks; jax, in whose memory weights are, does not ask.
    """
    loops: dict[str, Callable[[np.ndarray], object]] = {"NumPy": np.max, **_in_c()}
    rates = {}
    for of, parts in (("", _parts(threads, np.ones)), (" in jax's memory", _parts(threads, lambda n, t: np.asarray(jnp.ones(n, t))))):
        with ThreadPoolExecutor(threads) as pool:
            for name, loop in loops.items():
                rates[name + of] = threads * parts[0].nbytes / min(_seconds(pool, loop, parts) for _ in range(TURNS))
    return rates


def _parts(threads: int, make: Callable[[int, type], np.ndarray]) -> list[np.ndarray]:
    return np.split(make(BYTES // 4 // threads * threads, np.float32), threads)


def _seconds(pool: ThreadPoolExecutor, loop: Callable[[np.ndarray], object], parts: list[np.ndarray]) -> float:
    start = time.perf_counter()
    list(pool.map(loop, parts))
    return time.perf_counter() - start


def _in_c() -> dict[str, Callable[[np.ndarray], object]]:
    try:
        compiler = build.compiler()
    except build.BuildError:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source, made = pathlib.Path(folder) / "read.c", pathlib.Path(folder) / "read.so"
        source.write_text(_SOURCE)
        subprocess.run([compiler, "-x", "c", "-O3", "-march=native", "-fPIC", "-shared", str(source), "-o", str(made)], check=True)
        library = ctypes.CDLL(str(made))

    def loop(name: str) -> Callable[[np.ndarray], object]:
        run = getattr(library, name)
        run.argtypes = [ctypes.c_void_p, ctypes.c_long]
        return lambda part: run(part.ctypes.data, part.nbytes)

    return {"C, one stream": loop("one"), "C, four streams": loop("four")}
