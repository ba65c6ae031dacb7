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
    qjax.nf4(group_size=8, double_quant=True),
    qjax.mxfp4(pad=True),
    qjax.nvfp4(pad=True),
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


@pytest.mark.slow
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
    unseen = {path: any("no calibration data" in note for note in said) for path, said in notes.items()}
    assert unseen == {"a": False, "b": True}


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


@pytest.mark.parametrize("activation", [None, qjax.dynamic(qjax.int8())], ids=str)
def test_quantized_inside_the_callers_shard_map(activation):
    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    params, x = {"w": normal(8, 6), "v": normal(6, 3, seed=1)}, normal(4, 8, seed=2)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(), activation=activation)])
    packed = qjax.quantize(fn, params, policy, calibration=[x]).params
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    run = jax.shard_map(qjax.quantized(fn), mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    np.testing.assert_allclose(jax.jit(run)(packed, x), jax.jit(qjax.quantized(fn))(packed, x), rtol=1e-5, atol=1e-5)


def test_pieces_of_an_axis_share_what_the_axis_shares():
    def fn(p, x):
        w = p["w"].reshape(16, 5, 2)
        return jax.nn.silu(x @ w[..., 0]) * (x @ w[..., 1])

    params, x = {"w": normal(16, 10)}, normal(40, 16, seed=1)
    per_tensor = qjax.quantize(fn, params, star(qjax.int4(per="tensor"), None), calibration=[x]).params["w"]
    assert per_tensor.scale.size == 1
    ordered = qjax.quantize(fn, params, star(qjax.int4(group_size=8), qjax.gptq(act_order=True)), calibration=[x]).params["w"]
    assert ordered.perm.size == 16
    plain = qjax.quantize(lambda p, x: x @ p["w"], params, star(qjax.int4(group_size=8), qjax.gptq(act_order=True)), calibration=[x])
    np.testing.assert_array_equal(ordered.dequantize(), plain.params["w"].dequantize())


def test_layers_of_a_slice_get_their_own_data():
    def fn(p, x):
        x = jnp.tanh(x @ p["w"][0])
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"][1:])[0]

    def loop(p, x):
        for i in range(4):
            x = jnp.tanh(x @ p["w"][i])
        return x

    params, x = {"w": normal(4, 8, 8)}, normal(64, 8, seed=1)
    found = [qjax.quantize(f, params, star(qjax.int3(), qjax.gptq()), calibration=[x]) for f in (fn, loop)]
    np.testing.assert_array_equal(found[0].params["w"].dequantize(), found[1].params["w"].dequantize())
    assert not any(row.notes for row in found[0].report.rows)


def test_layers_that_are_used_twice_or_never_share_statistics_and_say_so():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"][2:4])[0] @ p["w"][2] @ p["w"][3]

    result = qjax.quantize(fn, {"w": normal(4, 8, 8)}, star(qjax.int3(), qjax.gptq()), calibration=[normal(64, 8, seed=1)])
    assert "one set of statistics for its 3 uses and all its layers" in result.report.rows[0].notes


@pytest.mark.parametrize("experts_first", [False, True])
def test_experts_under_a_traced_layer_index_get_their_own_statistics(experts_first):
    w, x = normal(3, 2, 8, 8), normal(3, 40, 8, seed=1) * jnp.exp(2 * normal(3, 1, 8, seed=2))

    def fn(p, x):
        def turn(i, x):
            layer = p["w"][:, i] if experts_first else p["w"][i]
            return jnp.tanh(jnp.einsum("ebk,ekn->ebn", x, layer))

        return lax.fori_loop(0, 2 + 0 * jnp.int32(x[0, 0, 0]), turn, x)

    stored = w if experts_first else w.swapaxes(0, 1)
    packed = qjax.quantize(fn, {"w": stored}, star(qjax.int3(), qjax.gptq()), calibration=[x]).params["w"].dequantize()
    error = jnp.sum((fn({"w": packed}, x) - fn({"w": stored}, x)) ** 2)
    rounded = qjax.quantize(fn, {"w": stored}, star(qjax.int3(), None), calibration=[x]).params["w"].dequantize()
    assert error < 0.9 * jnp.sum((fn({"w": rounded}, x) - fn({"w": stored}, x)) ** 2)


def test_two_contractions_of_one_value_have_statistics_of_their_own():
    x = normal(8, 8, seed=3) * jnp.exp(normal(8, 1, seed=4))
    params = {"a": normal(8, 8), "b": normal(8, 8, seed=1)}
    both = qjax.quantize(lambda p, x: (x @ p["a"]).sum() + (p["b"].T @ x).sum(), params, star(qjax.int3(), qjax.gptq()), calibration=[x])
    alone = qjax.quantize(lambda p, x: (p["b"].T @ x).sum(), {"b": params["b"]}, star(qjax.int3(), qjax.gptq()), calibration=[x])
    np.testing.assert_array_equal(both.params["b"].dequantize(), alone.params["b"].dequantize())


def test_a_view_of_a_parameter_that_is_handed_back_is_an_array():
    def fn(p, x):
        return x @ p["a"], p["a"].T, p["a"]

    packed = qjax.quantize(fn, {"a": normal(8, 3)}, star(qjax.int8(), None), calibration=[normal(2, 8)]).params
    _, view, same = jax.jit(qjax.quantized(fn))(packed, normal(2, 8))
    assert isinstance(view, jax.Array) and view.shape == (3, 8) and isinstance(same, qjax.QTensor)


def test_what_newcomers_get_wrong_is_named():
    fn, params, x = lambda p, x: x @ p["w"], {"w": normal(8, 3)}, normal(4, 8)
    packed = qjax.quantize(fn, params, star(qjax.int8(), None), calibration=[x]).params
    with pytest.raises(TypeError, match=r"is packed and has no arithmetic: run the function as qjax.quantized\(fn\)"):
        fn(packed, x)
    with pytest.raises(TypeError, match="`fn` must be a function"):
        qjax.quantized(None)
    with pytest.raises(ValueError, match=r"`calibration` batch 1 gives the input of 'w' .* NaN or infinity"):
        qjax.quantize(fn, params, star(qjax.int8(), qjax.gptq()), calibration=[x, x.at[0, 0].set(jnp.nan)])
    shadowed = qjax.Policy([qjax.Rule("*", weight=qjax.int8()), qjax.Rule("w", weight=qjax.int4())])
    with pytest.raises(ValueError, match=r"'w' is never reached: '\*' stands before it"):
        qjax.sites(fn, shadowed)(params, x)
    with pytest.raises(TypeError, match=r"`method` must be a method such as .*a spec goes to `weight`"):
        qjax.Rule("*", weight=qjax.int4(), method=qjax.nf4())


@pytest.mark.parametrize("unit", [2.0**-60, 2.0**60])
def test_errors_and_searched_ranges_do_not_depend_on_the_unit(unit):
    w, x = normal(64, 5), normal(4, 64)
    small, plain = (
        qjax.quantize(lambda p, x: x @ p["w"], {"w": v}, star(qjax.int3(group_size=16), qjax.rtn(mse=True)), calibration=[x])
        for v in (w * unit, w)
    )
    np.testing.assert_array_equal(small.params["w"].codes, plain.params["w"].codes)
    assert small.report.rows[0].error == pytest.approx(plain.report.rows[0].error, rel=1e-5)


def test_a_stack_of_the_users_own_is_not_that_of_an_unrolled_loop():
    def fn(p, x):
        pair = jnp.stack([x @ p["a"], x @ p["b"]], axis=1)
        return jnp.tanh(pair).reshape(x.shape[0], -1) @ p["c"]

    params, x = {"a": normal(8, 4), "b": normal(8, 4, seed=1), "c": normal(8, 3, seed=2)}, normal(40, 8, seed=3)
    packed = qjax.quantize(fn, params, star(qjax.int3(), qjax.gptq()), calibration=[x]).params
    first = {name: packed[name].dequantize() for name in ("a", "b")}
    pair = jnp.stack([x @ first["a"], x @ first["b"]], axis=1)
    hidden = jnp.tanh(pair).reshape(40, -1)
    alone = qjax.quantize(lambda p, x: x @ p["c"], {"c": params["c"]}, star(qjax.int3(), qjax.gptq()), calibration=[hidden])
    np.testing.assert_array_equal(packed["c"].dequantize(), alone.params["c"].dequantize())
