"""Rows cut into bytes: what they hold, against exact integers."""

import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels.tpu import digits


def rows(spread: int, seed: int = 0) -> np.ndarray:
    """bfloat16 values (8, 256) as float32: each row's largest magnitude has exponent 0, the others up to `spread` less."""
    rng = np.random.default_rng(seed)
    mantissa = rng.integers(128, 256, (8, 256)) * rng.choice([-1, 1], (8, 256))
    exponent = -rng.integers(0, spread + 1, (8, 256))
    exponent[:, 0] = 0
    return np.float32(np.ldexp(np.float64(mantissa), exponent - 7))


def value(x):
    codes, unit = digits.cut(jnp.asarray(x))
    assert codes.dtype == jnp.int8 and codes.shape == (3 * len(x), x.shape[1])
    high, middle, low = np.float64(codes).reshape(3, *x.shape)
    return (65536 * high + 256 * middle + low) * np.float64(unit)


@pytest.mark.parametrize("power", [0, 126, -99])
def test_bytes_hold_every_value_of_a_span_exactly(power):
    x = np.ldexp(rows(14), power)
    x[0, :2] = np.ldexp([255 / 128, -255 / 128], power)  # the largest that the exponent allows, of both signs
    x[1] = 0
    np.testing.assert_array_equal(value(x), x)


def test_below_the_span_half_a_unit_is_lost():
    x = rows(30)
    error = np.abs(value(x) - x)
    assert 0 < error.max() <= 2.0**-22
    assert np.all(error[np.abs(x) >= 2.0**-14] == 0)


def test_the_smallest_numbers_keep_a_normal_unit():
    x = np.float32([[2.0**-126, -(2.0**-120), 0.0, 2.0**-104]])
    assert np.abs(value(x) - x).max() <= 2.0**-126


def test_a_product_is_the_sum_of_all_three_bytes():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((8, 128)), jnp.bfloat16)
    w = rng.integers(-8, 8, (128, 128))
    exact = np.float64(x.astype(jnp.float32)) @ w
    error = np.abs(np.float64(digits.product(x, jnp.asarray(w, jnp.int4))) - exact)
    assert np.all(error <= 2.0**-20 * (np.abs(np.float64(x.astype(jnp.float32))) @ np.abs(w)))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_no_unit(odd):
    x = rows(3)
    x[2, 7] = odd
    unit = np.asarray(digits.cut(jnp.asarray(x))[1])[:, 0]
    assert np.isnan(unit[2]) and np.isfinite(np.delete(unit, 2)).all()
