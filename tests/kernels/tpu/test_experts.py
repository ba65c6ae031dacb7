"""`experts` in interpret mode against `jax.lax.ragged_dot` of the dequantized weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from qjax_kernels import reference
from qjax_kernels.request import Device, Request, Weight
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.experts import experts, visits, why_not

SMALL = tiles.Tile(16, 128, 128)


def operands(m, n, k, count, group, bits=4, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    low = -(2 ** (bits - 1))
    w = jnp.asarray(rng.integers(low, -low, (count, k, n)), jnp.int4 if bits == 4 else jnp.int8)
    scale = jnp.asarray(2.0 ** rng.integers(-3, 3, (count, -(-k // group), n)), jnp.float32)
    # Small integers and powers of two: nothing is rounded before the result, wherever the scale goes.
    return jnp.asarray(rng.integers(-4, 5, (m, k)), dtype), w, scale


@pytest.mark.parametrize(
    ("sizes", "m", "k", "group", "bits"),
    [
        ([16, 16, 0, 8], 40, 256, 128, 4),  # whole tiles, one expert without rows
        ([3, 1, 20, 9], 33, 300, 128, 8),  # tiles that several share, tails in M and K
        ([0, 0, 5, 0], 12, 256, 256, 4),  # rows that no expert has; a scale a column
        ([0, 0, 0, 0], 5, 128, 64, 4),  # nobody has any
    ],
)
def test_equals_the_ragged_product(sizes, m, k, group, bits):
    x, w, scale = operands(m, 200, k, 4, group, bits)
    sizes = jnp.int32(sizes)
    y = experts(x, w, scale, sizes, group=group, chip="v6e", limit=SMALL, interpret=True)
    wide = np.float64(x)
    weight = np.float64(reference.dequantize(w, scale, group))
    owner = np.repeat(np.arange(4), sizes)
    expected = np.zeros((m, 200))
    for row, e in enumerate(owner):
        expected[row] = wide[row] @ weight[e]
    np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16))


@pytest.mark.slow
def test_no_race(capfd):
    x, w, scale = operands(33, 128, 256, 3, 128)
    sizes = jnp.int32([5, 0, 20])
    run = {"group": 128, "chip": "v6e", "limit": SMALL}
    y = experts(x, w, scale, sizes, **run, interpret=pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out
    np.testing.assert_array_equal(y, experts(x, w, scale, sizes, **run, interpret=True))


@pytest.mark.parametrize("sizes", [[3, 0, 2], [0, 0, 0], [8, 8, 0], [1, 1, 30]])
def test_every_row_is_written_once(sizes):
    rows, height = 33, 8
    tile, owner, start, end = (np.asarray(a) for a in visits(jnp.int32(sizes), rows, height))
    written = np.zeros(rows, int)
    for t, _, a, b in zip(tile, owner, start, end, strict=True):
        at = np.arange(t * height, min(rows, (t + 1) * height))
        written[at[(at >= a) & (at < b)]] += 1
    assert np.all(written == 1) and np.all(np.diff(tile) >= 0)


def test_gradient_reaches_x():
    x, w, scale = operands(20, 128, 128, 3, 128, dtype=jnp.float32)
    sizes = jnp.int32([5, 0, 12])
    y, back = jax.vjp(lambda x: experts(x, w, scale, sizes, group=128, chip="v6e", limit=SMALL, interpret=True), x)
    weight = reference.dequantize(w, scale, 128).swapaxes(1, 2)
    np.testing.assert_allclose(back(jnp.ones_like(y))[0], lax.ragged_dot(jnp.ones_like(y), weight, sizes), rtol=1e-5, atol=1e-3)


def test_reasons_are_named():
    def ask(parts=8, weight=None, activation=None):
        weight = weight or Weight("int", 4, 128)
        return why_not(Request(Device("tpu", "v6e"), 256, 512, 4096, weight, activation=activation, parts=parts))

    assert not ask()
    assert "one product" in ask(parts=1)
    assert "3 bits" in ask(weight=Weight("int", 3, 128))
    assert "int8 activations" in ask(activation="int8")
    assert "groups of 96" in ask(weight=Weight("int", 4, 96))


def test_shapes_that_do_not_fit_are_refused():
    x, w, scale = operands(4, 128, 128, 3, 128)
    with pytest.raises(ValueError, match="`sizes`"):
        experts(x, w, scale, jnp.int32([1, 1]), group=128, chip="v6e")
