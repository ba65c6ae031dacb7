"""Corners where a number could go wrong in silence: each was wrong once, or is a neighbour of one that was."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import Policy, Rule
from qjax.core import QTensor
from qjax.program import trace
from tests.program.cases import normal

GRANULARITIES = [
    qjax.int8(),
    qjax.int8(per="tensor"),
    qjax.int8(group_size=4),
    qjax.uint4(group_size=4),
    qjax.int8(block=(16, 8)),
    qjax.nf4(group_size=8),
    qjax.bf16(),
]


def star(spec, method=None):
    return Policy([Rule("*", weight=spec, method=method)])


def dequantized(tree):
    return jax.tree.map(lambda x: x.dequantize() if isinstance(x, QTensor) else x, tree, is_leaf=lambda x: isinstance(x, QTensor))


@pytest.mark.parametrize("spec", GRANULARITIES, ids=str)
@pytest.mark.parametrize("mode", ["index", "fill", "clip", "wrap"])
def test_lookup_of_every_granularity(spec, mode):
    def fn(p, i):
        return p["e"][i] if mode == "index" else jnp.take(p["e"], i, axis=0, mode=mode)

    index = jnp.array([[1, 63, -2], [64, 70, 0]])
    params = qjax.quantize(fn, {"e": normal(64, 8)}, star(spec), calibration=[index]).params
    chex.assert_trees_all_equal(jax.jit(qjax.quantized(fn))(params, index), jax.jit(fn)(dequantized(params), index))


def error(fn, params, result, *inputs):
    return float(jnp.sum((jax.jit(qjax.quantized(fn))(result.params, *inputs) - fn(params, *inputs)) ** 2))


def test_branches_that_read_one_value_differently_have_statistics_of_their_own():
    def conv(x, w, dilation):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", rhs_dilation=(dilation, dilation), dimension_numbers=dims)

    x = jnp.cumsum(normal(2, 12, 12, 3), axis=1)
    params = {"a": normal(3, 3, 3, 4), "b": normal(3, 3, 3, 4, seed=1)}
    policy = star(qjax.int3(), qjax.gptq())
    together = qjax.quantize(lambda p, x: conv(x, p["a"], 1) + conv(x, p["b"], 4), params, policy, calibration=[x])
    alone = qjax.quantize(lambda p, x: conv(x, p["b"], 4), {"b": params["b"]}, policy, calibration=[x])
    np.testing.assert_array_equal(together.params["b"].codes, alone.params["b"].codes)

    def experts(p, x):
        return lax.ragged_dot(x, p["a"], jnp.array([2, 10])) + lax.ragged_dot(x, p["b"], jnp.array([12, 0]))

    weights = {"a": normal(2, 8, 8), "b": normal(2, 8, 8, seed=1)}
    notes = {r.path: r.notes for r in qjax.quantize(experts, weights, policy, calibration=[normal(12, 8)]).report.rows}
    assert any("no calibration data" in n for n in notes["b"]) and not notes["a"]


@pytest.mark.parametrize("shape", [(8, 8), (8, 16)])
def test_a_weight_contracted_both_ways_is_rounded_and_says_so(shape):
    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    params, x = {"w": normal(*shape)}, normal(20, 8, seed=1)
    gptq = qjax.quantize(fn, params, star(qjax.int3(), qjax.gptq()), calibration=[x])
    rtn = qjax.quantize(fn, params, star(qjax.int3()), calibration=[x])
    for result in (gptq, rtn):
        assert any("contract different axes (0,), (1,)" in note for note in result.report.rows[0].notes)
    chex.assert_trees_all_equal(gptq.params, rtn.params)


def test_heads_stored_flat_are_rounded_and_say_so():
    def fn(p, x):
        return jnp.einsum("bhd,dhe->bhe", x, p["w"].reshape(8, 2, 4))

    result = qjax.quantize(fn, {"w": normal(8, 8)}, star(qjax.int4(), qjax.gptq()), calibration=[normal(5, 2, 8)])
    assert "heads stored flat" in result.report.rows[0].notes[0]
    assert trace(fn, {"w": normal(8, 8)}, normal(5, 2, 8)).sites[0].stacked == ()


def test_keys_named_value_and_params_are_part_of_a_path():
    params = {"attention": {"query": normal(4, 4), "value": normal(4, 4)}, "params": {"params": normal(4, 4)}}

    def fn(p, x):
        return x @ p["attention"]["query"] @ p["attention"]["value"] @ p["params"]["params"]

    assert [leaf.path for leaf in trace(fn, params, normal(2, 4)).leaves] == ["attention/query", "attention/value", "params"]


def test_static_floats_are_told_apart():
    fn = qjax.quantized(lambda p, x, s: jnp.copysign(x, s) @ p["w"])
    params, x = {"w": jnp.eye(4)}, jnp.ones((1, 4))
    assert fn(params, x, 0.0).max() == 1
    assert fn(params, x, -0.0).min() == -1


def test_a_sharding_constraint_on_a_stack_before_a_scan():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("d",)), P(None, None, "d"))

    def fn(p, x):
        stack = lax.with_sharding_constraint(p["w"], sharding)
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, stack)[0]

    params, x = {"w": normal(3, 8, 8)}, normal(4, 8)
    packed = qjax.quantize(fn, params, star(qjax.int8()), calibration=[x]).params
    got = jax.jit(qjax.quantized(fn))(packed, x)
    np.testing.assert_allclose(got, jax.jit(fn)(dequantized(packed), x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_packed_says_why():
    def fn(p, x, i):
        hidden = jax.checkpoint(lambda w: w.astype(jnp.bfloat16))(p["remat"])
        either = lax.cond(x.sum() > 0, lambda: p["a"], lambda: p["b"])
        return (x @ hidden.astype(jnp.float32) @ either)[:, : 2] + p["table"][i].astype(jnp.float32)

    params = {n: normal(4, 4) for n in ("remat", "a", "b")} | {"table": jnp.arange(8).reshape(4, 2), "w": normal(4, 4)}
    report = qjax.sites(lambda p, x, i: fn(p, x @ p["w"], i), star(qjax.int8()))(params, normal(3, 4), jnp.array([0, 1, 2]))
    reasons = {row.path: row.reason for row in report.rows if not row.spec}
    assert "only output of" in reasons["remat"] and "output of cond" in reasons["a"] and "output of cond" in reasons["b"]
    assert reasons["table"] == "it is int32, not floating"


def test_quantize_inside_jit_is_refused():
    with pytest.raises(TypeError, match="call quantize outside jit"):
        jax.jit(lambda p, x: qjax.quantize(lambda p, x: x @ p["w"], p, star(qjax.int8()), [x]).params)({"w": normal(4, 4)}, normal(2, 4))


def test_numpy_parameters():
    params = {"w": np.asarray(normal(8, 8), np.float32)}
    for method in (None, qjax.gptq()):
        packed = qjax.quantize(lambda p, x: x @ p["w"], params, star(qjax.int4(), method), [normal(9, 8)]).params
        assert packed["w"].dtype == np.float32


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 6, rngs=rngs)
        self.buffer = nnx.Variable(normal(6, 6))

    def __call__(self, x):
        return self.encode(x) @ self.buffer[...]

    def encode(self, x):
        return self.layer(x)


def test_nnx_quantizes_params_only_and_the_methods_it_is_told():
    model, x = Encoder(nnx.Rngs(0)), normal(3, 6)
    policy = star(qjax.int4())
    result = qjax.nnx.quantize(model, policy, [x])
    assert [r.path for r in result.report.rows if r.spec] == ["layer/kernel"]
    packed = jax.jit(qjax.quantized(qjax.nnx.function(model)))(result.params, x)
    np.testing.assert_allclose(packed, qjax.nnx.fake_quant(model, policy)(x), rtol=1e-5, atol=1e-5)
    both = qjax.nnx.fake_quant(model, policy, methods=("__call__", "encode"))
    assert (both.encode(x) != model.encode(x)).any()
    with pytest.raises(ValueError, match="`methods` names 'decode'"):
        qjax.nnx.fake_quant(model, policy, methods=("decode",))
