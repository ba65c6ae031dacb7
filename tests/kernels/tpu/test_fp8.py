"""`fp8` in interpret mode against float64 of what the codes stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qjax_kernels.request import Device, Request, Weight
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.fp8 import E4M3, fp8, why_not

SMALL = tiles.Tile(32, 128, 128)


def operands(m=37, n=200, k=256, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(m, k))
    x[3] = 0
    w = jnp.asarray(rng.normal(size=(k, n)) * 50, jnp.float32).at[0, 0].set(448).at[1, 0].set(2.0**-9).astype(E4M3)
    return jnp.asarray(x, dtype), w, jnp.asarray(rng.uniform(0.5, 2, (1, n)), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rounded_rows(dtype):
    x, w, scale = operands(dtype=dtype)
    y = fp8(x, w, scale, chip="tpu7x", limit=SMALL, interpret=True)
    wide = np.float32(x)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    rows = np.where(largest > 0, largest * np.float32(1 / 448), np.float32(1))
    codes = np.asarray(jnp.asarray(wide * (1 / rows)).clip(-448, 448).astype(E4M3), np.float64)
    product = np.float64(w) * np.float64(scale)
    expected, magnitude = codes @ product * rows, np.abs(codes) @ np.abs(product) * rows
    rounding = 2**-8 if dtype == jnp.bfloat16 else 2**-23
    assert np.all(np.abs(np.float64(y) - expected) <= rounding * np.abs(expected) + 256 * 2**-24 * magnitude)
    assert not np.any(np.asarray(y[3], np.float32))


def test_float_rows():
    x, w, scale = operands()
    y = fp8(x, w, scale, chip="tpu7x", rounded=False, limit=SMALL, interpret=True)
    product = np.float64(w) * np.float64(scale)
    expected, magnitude = np.float64(x) @ product, np.abs(np.float64(x)) @ np.abs(product)
    assert np.all(np.abs(np.float64(y) - expected) <= 2**-8 * np.abs(expected) + 256 * 2**-24 * magnitude)


@pytest.mark.slow
@pytest.mark.parametrize("rounded", [True, False])
def test_no_race(rounded, capfd):
    x, w, scale = operands(m=20)
    run = {"chip": "tpu7x", "rounded": rounded, "limit": SMALL}
    y = fp8(x, w, scale, **run, interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out
    np.testing.assert_array_equal(y, fp8(x, w, scale, **run, interpret=True))


def test_gradient_reaches_x():
    x, w, scale = operands(dtype=jnp.float32)
    y, back = jax.vjp(lambda x: fp8(x, w, scale, chip="tpu7x", limit=SMALL, interpret=True), x)
    expected = np.float64(np.ones(y.shape)) @ (np.float64(w) * np.float64(scale)).T
    np.testing.assert_allclose(back(jnp.ones_like(y))[0], expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("chip", "k", "weight", "activation", "dtype", "word"),
    [
        ("v6e", 4096, Weight("fp8", 8), "fp8", "bfloat16", "v6e does not multiply e4m3"),
        ("tpu7x", 4096, Weight("int", 8), "fp8", "bfloat16", "kind int"),
        ("tpu7x", 4096, Weight("fp8", 8), "int8", "bfloat16", "int8 activations"),
        ("tpu7x", 4096, Weight("fp8", 8), None, "float32", "a float32 x"),
        ("tpu7x", 4096, Weight("fp8", 8, 128), "fp8", "bfloat16", "groups of 128"),
        ("tpu7x", 4000, Weight("fp8", 8), "fp8", "bfloat16", "K 4000"),
    ],
)
def test_reasons_are_named(chip, k, weight, activation, dtype, word):
    assert word in why_not(Request(Device("tpu", chip), 16, 512, k, weight, dtype, activation))
    assert not why_not(Request(Device("tpu", "tpu7x"), 16, 512, 4096, Weight("fp8", 8), "bfloat16", "fp8"))


def test_a_contracted_length_that_could_hold_nan_is_refused():
    x, w, scale = operands(k=200)
    with pytest.raises(ValueError, match="K must be a multiple of 128"):
        fp8(x, w, scale, chip="tpu7x")
