"""`weight_only` in interpret mode against `reference` and against float64, at the edges that tiles have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from qjax_kernels import reference, shapes
from qjax_kernels.request import Device, Request, Weight
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.chips import CHIPS
from qjax_kernels.tpu.weight_only import weight_only, why_not

SMALL = tiles.Tile(16, 128, 128)


def operands(case, bits=4, dtype=jnp.bfloat16, seed=0):
    """x with a row of zeros, w with -8 (-128) and its largest code, scales of several magnitudes."""
    rng = np.random.default_rng(seed)
    low = -(2 ** (bits - 1))
    w = rng.integers(low, -low, (case.k, case.n))
    w[0], w[-1] = low, -low - 1
    x = rng.normal(size=(case.m, case.k))
    x[-1] = 0
    groups = -(-case.k // (case.group or case.k))
    scale = rng.uniform(0.5, 2, (groups, case.n)) * 2.0 ** rng.integers(-6, 2, (groups, case.n))
    return jnp.asarray(x, dtype), jnp.asarray(w, jnp.int4 if bits == 4 else jnp.int8), jnp.asarray(scale, jnp.float32)


def exact(x, w, scale, group):
    rows = np.repeat(np.float64(scale), group, axis=0)[: w.shape[0]]
    x, w = np.float64(x), np.float64(w) * rows
    return x @ w, np.abs(x) @ np.abs(w)


@pytest.mark.parametrize("case", shapes.TESTS, ids=str)
def test_every_edge_within_the_stated_rounding(case):
    group = case.group or case.k
    x, w, scale = operands(case)
    y = weight_only(x, w, scale, group=group, chip="v6e", limit=SMALL, interpret=True)
    expected, magnitude = exact(x, w, scale, group)
    assert y.shape == expected.shape and y.dtype == x.dtype
    # Where the scale goes before the dot, it and the weight are rounded to bfloat16 (2^-8 each), then y is; else y alone.
    weight = 2**-7 if group % 128 else case.k * 2**-24
    assert np.all(np.abs(np.float64(y) - expected) <= weight * magnitude + 2**-8 * np.abs(expected))
    assert np.all(np.asarray(y[-1], np.float32) == 0)


@pytest.mark.parametrize("chip", ["v6e", "tpu7x"])
def test_before_the_dot_the_weight_is_rounded_and_the_sum_is_not(chip):
    case = shapes.Case(40, 200, 300, 128)
    x, w, scale = operands(case)
    y = weight_only(x, w, scale, group=128, chip=chip, limit=tiles.Tile(64, 128, 256), interpret=True)
    weight = np.float64(reference.dequantize(w, scale, 128, jnp.bfloat16))
    expected, magnitude = np.float64(x) @ weight, np.abs(np.float64(x)) @ np.abs(weight)
    assert np.all(np.abs(np.float64(y) - expected) <= 300 * 2**-24 * magnitude + 2**-8 * np.abs(expected))


@pytest.mark.parametrize("bits", [4, 8])
def test_float32_keeps_float32(bits):
    case = shapes.Case(33, 200, 300, 128)
    x, w, scale = operands(case, bits, jnp.float32)
    y = weight_only(x, w, scale, group=128, chip="v6e", limit=SMALL, interpret=True)
    expected, magnitude = exact(x, w, scale, 128)
    assert np.all(np.abs(y - expected) <= 300 * 2**-24 * magnitude)


@pytest.mark.parametrize(
    ("chip", "group", "m", "n", "k"),
    [("v5e", 128, 16, 512, 256), ("v5p", 128, 5, 512, 256), ("tpu7x", 128, 16, 256, 1024), ("tpu7x", 256, 16, 384, 1024)],
)
def test_behind_the_dot_nothing_is_rounded_but_the_result(chip, group, m, n, k):
    """Small integers as x: every sum is exact, so y equals the reference bit for bit. Rows that are not finite touch no other."""
    case = shapes.Case(m, n, k, group)
    _, w, scale = operands(case)
    x = np.random.default_rng(1).integers(-4, 5, (m, k)).astype(np.float32)
    x[3, 5], x[m // 2, k - 3], finite = np.nan, np.inf, np.delete(np.arange(m), [3, m // 2])
    scale = 2.0 ** jnp.round(jnp.log2(scale))
    y = weight_only(jnp.asarray(x, jnp.bfloat16), w, scale, group=group, chip=chip, interpret=True)
    expected = reference.weight_only(jnp.asarray(x[finite], jnp.bfloat16), w, scale, group)
    np.testing.assert_array_equal(y[finite], expected)
    assert not jnp.isfinite(y[jnp.array([3, m // 2])]).any()


def test_no_race_and_nothing_read_that_was_not_written(capfd):
    case = shapes.Case(5, 200, 300, 128)
    x, w, scale = operands(case)
    y = weight_only(
        x, w, scale, group=128, chip="v6e", limit=SMALL, interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    )
    assert "RACE" not in capfd.readouterr().out
    plain = weight_only(x, w, scale, group=128, chip="v6e", limit=SMALL, interpret=True)
    np.testing.assert_array_equal(y, plain)


def test_gradient_reaches_x():
    case = shapes.Case(5, 128, 256, 128)
    x, w, scale = operands(case, dtype=jnp.float32)
    t = jnp.asarray(np.random.default_rng(1).normal(size=(5, 128)), jnp.float32)
    _, back = jax.vjp(lambda x: weight_only(x, w, scale, group=128, chip="v6e", interpret=True), x)
    np.testing.assert_allclose(back(t)[0], np.float64(t) @ np.float64(reference.dequantize(w, scale, 128)).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chip", CHIPS)
def test_tiles_hold_whole_groups_and_cover(chip):
    for m, n, k, group in [(1, 100, 4096, 128), (1000, 14336, 4096, 64), (64, 1408, 11008, 384), (16, 4096, 640, 4096)]:
        tile = tiles.tile_of(CHIPS[chip], m, n, k, group)
        assert group >= k or tile.k % group == 0 or group % tile.k == 0
        assert tile.n % 128 == tile.k % 128 == tile.m % 16 == 0


def request(**changed):
    fields = {"platform": "tpu", "chip": "v6e", "kind": "int", "bits": 4, "group": 128, "activation": None, "parts": 1} | changed
    weight = Weight(fields["kind"], fields["bits"], fields["group"])
    return Request(
        Device(fields["platform"], fields["chip"]), 16, 512, 4096, weight, activation=fields["activation"], parts=fields["parts"]
    )


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"platform": "cuda", "chip": "sm_90a"}, "cuda"),
        ({"chip": "v4"}, "'v4'"),
        ({"kind": "uint"}, "uint"),
        ({"bits": 3}, "3 bits"),
        ({"activation": "int8"}, "int8 activations"),
        ({"parts": 8}, "8 products"),
        ({"group": 96}, "groups of 96"),
    ],
)
def test_reasons_are_named(changed, word):
    assert not why_not(request())
    assert word in why_not(request(**changed))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"x": jnp.ones((4, 200))}, "`x`.*do not fit"),
        ({"x": jnp.ones((4, 256), jnp.float16)}, "`x` must be float32"),
        ({"w": jnp.ones((256, 128), jnp.int16)}, "`w` must be int4"),
        ({"scale": jnp.ones((3, 128))}, r"`scale` must be \(2, 128\)"),
        ({"chip": "v4"}, "`chip` must be one of"),
    ],
)
def test_wrong_arguments_are_refused(wrong, words):
    given = {"x": jnp.ones((4, 256)), "w": jnp.ones((256, 128), jnp.int8), "scale": jnp.ones((2, 128)), "chip": "v6e"} | wrong
    with pytest.raises(ValueError, match=words):
        weight_only(given["x"], given["w"], given["scale"], group=128, chip=given["chip"])


@pytest.mark.parametrize("k", [8, 40])
def test_a_column_that_is_shorter_than_a_tile_has_one_scale(k):
    w, scale = jnp.ones((k, 10), jnp.int8), jnp.linspace(0.5, 1.4, 10)[None]
    y = weight_only(jnp.ones((5, k)), w, scale, group=k, chip="v6e", interpret=True)
    np.testing.assert_allclose(y, np.tile(k * np.asarray(scale), (5, 1)), rtol=1e-6)
