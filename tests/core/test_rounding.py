import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import bf16, binary, in_range, int4, int8, integer, nf4, quantize, round_trip, ternary, uint4

SPECS = [int4(group_size=5), uint4(group_size=8, pad=True), int8(per="tensor"), int4(block=(2, 5)), nf4(5), bf16(),
         int4(group_size=5, scale_dtype="float16"), int4(scale_dtype="bfloat16")]  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_trip_equals_quantize_and_dequantize_to_the_bit(spec, dtype):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 15, 4)), dtype)
    wanted = quantize(w, spec, (-2,), stacked=(0,)).dequantize()
    for got in (round_trip(w, spec, (-2,), stacked=(0,)), jax.jit(lambda w: round_trip(w, spec, (-2,), (0,)))(w)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, wanted)


KINDS = {"absmean": ternary, "twn": functools.partial(ternary, scale_rule="twn"), "binary": binary}


@pytest.mark.parametrize("shape", [{"group_size": 32}, {"block": (2, 32)}], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_padding_does_not_count_in_a_mean(kind, shape):
    """A group that is cut short by the end has the scale that it has alone."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((42, 4)), jnp.float32)
    q, rows = quantize(w, kind(pad=True, **shape), (0,)), shape.get("block", (1,))[0]
    alone = [quantize(w[32:, i : i + rows], kind(per="tensor"), (0,)) for i in range(0, 4, rows)]
    np.testing.assert_allclose(q.scale[:, 1], np.concatenate([a.scale[:, 0] for a in alone]), rtol=1e-6)
    np.testing.assert_allclose(q.dequantize()[32:], np.concatenate([a.dequantize() for a in alone], 1), rtol=1e-6)
    np.testing.assert_array_equal(round_trip(w, q.spec, (0,)), q.dequantize())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rule", ["half", "full"])
def test_the_extreme_values_of_every_symmetric_block_are_in_range(rule, dtype):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 512)), jnp.float32)
    assert np.all(in_range(w, int4(scale_rule=rule, scale_dtype=dtype), (0,)))


def test_out_of_range():
    """uint4 from -7.75 to 7.25: scale 1, zero point 8, so codes reach from -8 to 7 and 7.25 is clipped."""
    w = jnp.float32([[-7.75], [0.0], [7.25], [7.0]])
    assert in_range(w, uint4(), (0,)).tolist() == [[True], [True], [False], [True]]
    assert in_range(-w[::-1], uint4(), (0,)).shape == (4, 1)
    assert in_range(jnp.float32([[-1.0], [2.0]]), integer(4, signed=False, symmetric=True), (0,)).tolist() == [
        [False],
        [True],
    ]
    for spec in (nf4(4), bf16()):
        assert np.all(in_range(w, spec, (0,)))


def test_refusals_are_those_of_quantize():
    for f in (round_trip, in_range):
        with pytest.raises(ValueError, match="`group_size`=3 does not divide the 4 contracted values of `mlp`"):
            f(jnp.ones((4, 2)), int4(group_size=3), (0,), name="mlp")
        with pytest.raises(ValueError, match="`mlp` holds 1 NaN"):
            f(jnp.float32([[jnp.nan]]), int4(), (0,), name="mlp")
