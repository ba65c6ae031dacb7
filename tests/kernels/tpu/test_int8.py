"""`int8` in interpret mode: codes and integer sums equal the reference bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from qjax_kernels import reference, shapes
from qjax_kernels.request import Device, Request, Weight
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.int8 import int8, quantize, why_not

SMALL = tiles.Tile(16, 128, 128)
CASES = [case for case in shapes.TESTS if case.group is None or case.group % 128 == 0]


def operands(case, bits, dtype):
    rng = np.random.default_rng(case.k)
    low = -(2 ** (bits - 1))
    w = rng.integers(low, -low, (case.k, case.n))
    w[0] = low
    x = rng.normal(size=(case.m, case.k)) * 2.0 ** rng.integers(-20, 20, (case.m, 1))
    x[case.m // 2] = 0
    groups = -(-case.k // (case.group or case.k))
    # Powers of two: scaling and adding such sums of groups rounds nothing that int32 holds in 24 bits.
    scale = 2.0 ** rng.integers(-3, 3, (groups, case.n))
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.int4 if bits == 4 else jnp.int8), jnp.asarray(scale, jnp.float32)


@pytest.mark.parametrize(
    ("bits", "dtype", "case"),
    [*((8, jnp.float32, case) for case in CASES), *((4, jnp.bfloat16, case) for case in CASES[1:3])],
    ids=str,
)
def test_bit_for_bit(bits, dtype, case):
    x, w, scale = operands(case, bits, dtype)
    group = case.group or case.k
    y = int8(x, w, scale, group=group, chip="v6e", limit=SMALL, interpret=True)
    np.testing.assert_array_equal(y, reference.int8(x, w, scale, group))
    assert np.all(np.isfinite(np.float32(y))) and not np.any(np.asarray(y[case.m // 2], np.float32))


def test_codes_and_scales_of_rows():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 384)), jnp.bfloat16).at[3].set(0).at[4].set(1e30).at[5].set(1e-30)

    def kernel(x_ref, codes_ref, row_ref):
        quantize(x_ref, codes_ref, row_ref, 127.5)

    shape = (jax.ShapeDtypeStruct((3, 16, 128), jnp.int8), jax.ShapeDtypeStruct((16, 1), jnp.float32))
    codes, rows = pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)
    expected, scale = reference.quantize_rows(x)
    np.testing.assert_array_equal(codes.transpose(1, 0, 2).reshape(16, 384), expected)
    np.testing.assert_array_equal(rows, scale)
    steps = np.float64(x) / np.float64(scale)
    assert np.abs(np.clip(steps, -128, 127) - expected).max() <= 0.5 + 1e-5


def test_the_largest_sums_are_exact():
    """4096 products of -128 and -128: 2^26, where a float32 sum of them would still be exact but one of 2^26 + 1 is not."""
    x = jnp.full((16, 4096), -1.0).at[:, 0].set(-0.5)
    w = jnp.full((4096, 128), -128, jnp.int8)
    y = int8(x, w, jnp.ones((1, 128)), group=4096, chip="v5e", levels=127, interpret=True)
    np.testing.assert_array_equal(y, reference.int8(x, w, jnp.ones((1, 128)), 4096, 127))


@pytest.mark.slow
def test_no_race(capfd):
    case = shapes.Case(20, 200, 300, 128)
    x, w, scale = operands(case, 8, jnp.float32)
    y = int8(x, w, scale, group=128, chip="v6e", limit=SMALL, interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out
    np.testing.assert_array_equal(y, reference.int8(x, w, scale, 128))


def test_gradient_is_straight_through():
    case = shapes.Case(5, 128, 256, 128)
    x, w, scale = operands(case, 8, jnp.float32)
    t = jnp.ones((5, 128))
    _, back = jax.vjp(lambda x: int8(x, w, scale, group=128, chip="v6e", interpret=True), x)
    np.testing.assert_allclose(back(t)[0], np.float64(t) @ np.float64(reference.dequantize(w, scale, 128)).T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (Request(Device("tpu", "v6e"), 16, 512, 4096, Weight("int", 8), activation=None), "float activations"),
        (Request(Device("tpu", "tpu7x"), 16, 512, 4096, Weight("int", 8), activation="int8"), "no integer matrix unit"),
        (Request(Device("tpu", "v5e"), 16, 512, 4096, Weight("codebook", 4), activation="int8"), "codebook"),
        (Request(Device("tpu", "v5e"), 16, 512, 4096, Weight("int", 4, 64), activation="int8"), "groups of 64"),
        (Request(Device("tpu", "v5e"), 16, 512, 10**6, Weight("int", 4), activation="int8"), "do not fit vector memory"),
        (Request(Device("cpu", "avx2"), 16, 512, 4096, Weight("int", 8), activation="int8"), "cpu"),
    ],
)
def test_reasons_are_named(request_, word):
    assert word in why_not(request_)
    assert not why_not(Request(Device("tpu", "v6e"), 16, 512, 4096, Weight("int", 4, 128), activation="int8"))
