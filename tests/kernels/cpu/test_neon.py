"""The kernels for AArch64, compiled by a cross compiler and run in an emulator: the cases that other instruction sets pass."""

import platform
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels import cpu
from qjax_kernels.cpu import build

from tests.kernels.cpu.test_matmul import CASES, ROUND, make, rows, worst

NATIVE = platform.machine().lower() in ("aarch64", "arm64")
COMPILER = "c++" if NATIVE else "aarch64-linux-gnu-g++"
EMULATOR = [] if NATIVE else ["qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu"]
missing = [name for name in (COMPILER, *EMULATOR[:1]) if not shutil.which(name)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"{missing} are not installed: apt install g++-aarch64-linux-gnu qemu-user"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The program of neon_driver.cpp with the kernels of neon.cpp."""
    program, here = tmp_path_factory.mktemp("neon") / "driver", __file__.removesuffix("test_neon.py")
    flags = [flag for flag in build.flags_of("neon", "aarch64") if flag != "-fvisibility=hidden"]
    sources = [here + "neon_driver.cpp", str(build.SOURCES / "neon.cpp")]
    subprocess.run([COMPILER, *flags, "-I", str(build.SOURCES), *sources, "-static", "-o", str(program)], check=True)
    return program


def product(driver, x, packed, rounding=None):
    """y (M, N) float32 of the program."""
    of, zeros, table = packed.layout, np.asarray(packed.zeros), np.asarray(packed.table)
    kind = 0 if not zeros.size else 1 if zeros.dtype == np.int32 else 2
    given, halves = rounding or cpu.Rounding(), x.dtype.itemsize // 2
    numbers = [of.bits, of.k, of.n, of.group, kind, bool(table.size), rounding is not None, given.low, given.high, len(x), halves]
    table = table if table.size else np.arange(16, dtype=np.float32) - of.center
    arrays = [np.int64(numbers), np.float32(given.divisor), packed.codes, packed.scales, zeros, table, x]
    sent = b"".join(np.asarray(a).tobytes() for a in arrays)
    done = subprocess.run([*EMULATOR, str(driver)], input=sent, capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), of.n)


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_float_rows_round_only_sums(driver, seed):
    bits, n, k, group, zero, m = CASES[seed]
    packed, w = make(seed, bits, n, k, group, zero)
    x = rows(seed, m, k, jnp.bfloat16 if seed % 2 else jnp.float32)
    assert worst(product(driver, x, packed), np.asarray(x, np.float64), w) < 12


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_integer_rows_are_rounded_as_the_reference_does(driver, seed):
    bits, n, k, group, zero, m = CASES[seed]
    packed, w = make(seed, bits, n, k, group, zero)
    x, rounding = rows(seed, m, k), cpu.Rounding() if seed % 3 else cpu.Rounding(127.0, -127, 127)
    codes, scale = ROUND(x, rounding.divisor, rounding.low, rounding.high)
    y = product(driver, x, packed, rounding)
    assert worst(y, np.asarray(codes, np.float64) * np.asarray(scale, np.float64), w) < 12


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integer_sums_are_exact(driver, bits):
    """Rows whose largest number is the divisor are their own codes; codes at their ends; scales of 1: every digit of the sum is there."""
    rng, half = np.random.default_rng(bits), 2 ** (bits - 1)
    codes, x = rng.choice([-half, half - 1], (33, 1000)), rng.integers(-127, 128, (21, 1000)).astype(np.float32)
    codes[0], codes[1], x[:, 0] = -half, half - 1, 127
    packed = cpu.prepack(codes, np.ones((33, 1), np.float32), None, bits=bits, signed=True, group_size=None)
    np.testing.assert_array_equal(product(driver, x, packed, cpu.Rounding(127.0, -127, 127)), x @ codes.T.astype(np.float64))


@pytest.mark.parametrize("m", [1, 5])
def test_tables(driver, m):
    rng, table = np.random.default_rng(0), np.sort(np.random.default_rng(1).standard_normal(16)).astype(np.float32)
    codes, scales = rng.integers(0, 16, (37, 320)), rng.random((37, 5), np.float32) + np.float32(0.1)
    packed = cpu.prepack(codes, scales, None, bits=4, signed=False, group_size=64, table=jnp.asarray(table))
    x = rows(2, m, 320)
    assert worst(product(driver, x, packed), np.asarray(x, np.float64), table[codes].astype(np.float64) * np.repeat(scales, 64, 1)) < 12
