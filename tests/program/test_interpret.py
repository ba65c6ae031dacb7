"""Packed execution: every case gives what the float function gives on the dequantized weights, under every transformation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import QTensor
from tests.parameters import every_other
from tests.program.cases import CASES, jitted_helper, normal


def is_q(x):
    return isinstance(x, QTensor)


def dequantized(params):
    return jax.tree.map(lambda x: x.dequantize() if is_q(x) else x, params, is_leaf=is_q)


def packed(case, spec):
    policy = qjax.Policy([qjax.Rule("*", weight=spec)])
    return qjax.quantize(case.fn, case.params, policy, calibration=[case.inputs]).params


SPECS = [qjax.int8(), qjax.int3(), qjax.uint4(per="tensor"), qjax.nf4(group_size=2, pad=True)]


# Every case meets a spec, and neighbouring cases different ones: the specs themselves are tested one by one in tests/core.
@pytest.mark.parametrize(("case", "spec"), every_other((c, SPECS[(i + j) % 4]) for i, c in enumerate(CASES) for j in (0, 2)), ids=str)
def test_packed_equals_float_on_dequantized_weights(case, spec):
    params = packed(case, spec)
    assert any(is_q(x) for x in jax.tree.leaves(params, is_leaf=is_q))
    got = jax.jit(qjax.quantized(case.fn))(params, *case.inputs)
    want = jax.jit(case.fn)(dequantized(params), *case.inputs)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    tolerance = 2e-2 if "bf16" in case.name else 2e-5
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=tolerance)


# Integer inputs and loops whose length the data decides have no gradient in the float program either.
DIFFERENTIABLE = [c for c in CASES if c.name != "while_loops" and jnp.issubdtype(c.inputs[0].dtype, jnp.floating)]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradients_to_the_inputs(case):
    params = packed(case, qjax.int8())

    def loss(fn, params):
        return jax.grad(lambda x: sum(jnp.sum(jnp.square(y)) for y in jax.tree.leaves(fn(params, x, *case.inputs[1:]))))

    got = jax.jit(loss(qjax.quantized(case.fn), params))(case.inputs[0])
    want = jax.jit(loss(case.fn, dequantized(params)))(case.inputs[0])
    np.testing.assert_allclose(got, want, **({"rtol": 3e-2, "atol": 1e-2} if "bf16" in case.name else {"rtol": 1e-4, "atol": 1e-4}))


# jax itself maps neither a shard_map over a mesh in use nor, so far, a ragged_dot.
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("shard_map", "experts")], ids=str)
def test_vmap_over_inputs(case):
    params = packed(case, qjax.int8())
    batch = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), case.inputs)
    got = jax.jit(jax.vmap(lambda *xs: qjax.quantized(case.fn)(params, *xs)))(*batch)
    one = jax.jit(qjax.quantized(case.fn))(params, *jax.tree.map(lambda x: x[1], batch))
    tolerance = 2e-2 if "bf16" in case.name else 1e-5
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], got), one, rtol=tolerance, atol=tolerance)


def test_both_orders_of_first_trace():
    """A jitted helper that was traced plain first is quantized all the same, and the quantized trace does not leak."""
    x, w = normal(4, 8), normal(8, 8)

    def fn(p, x):
        return jitted_helper(p["w"], x)

    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4())])
    params = qjax.quantize(fn, {"w": w}, policy, calibration=[x]).params
    plain_first = jax.jit(fn)({"w": w}, x)
    quantized = jax.jit(qjax.quantized(fn))(params, x)
    plain_again = jax.jit(fn)({"w": w}, x)
    np.testing.assert_array_equal(plain_first, plain_again)
    np.testing.assert_allclose(quantized, x @ params["w"].dequantize(), rtol=1e-5)
    assert np.abs(quantized - plain_first).max() > 1e-2

    @jax.jit
    def fresh_helper(w, x):
        return x @ w

    def fresh(p, x):
        return fresh_helper(p["w"], x)

    quantized_first = jax.jit(qjax.quantized(fresh))(params, x)
    np.testing.assert_array_equal(quantized_first, quantized)
    np.testing.assert_array_equal(jax.jit(fresh)({"w": w}, x), plain_first)


def test_the_compiled_program_reads_packed_weights_and_no_float_ones():
    """The arguments of the compiled program are the packed bytes; no float weight is an argument or a constant."""
    params, x = {"w": normal(256, 512)}, normal(4, 256)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(group_size=128))])

    def fn(p, x):
        return x @ p["w"]

    result = qjax.quantize(fn, params, policy, calibration=[x])
    lowered = jax.jit(qjax.quantized(fn)).lower(result.params, x)
    assert "tensor<512x128xui8>" in lowered.as_text()
    arguments = lowered.compile().memory_analysis().argument_size_in_bytes
    assert arguments == result.params["w"].nbytes + x.nbytes
    assert not [line for line in lowered.as_text().splitlines() if "constant" in line and "512x256xf32" in line]


def test_a_stack_is_sliced_packed():
    """Inside a scan, and in a loop over w[i], only one layer is ever dequantized."""
    for name in ("scan_remat", "loop_index", "static_index"):
        case = next(c for c in CASES if c.name == name)
        jaxpr = str(jax.make_jaxpr(qjax.quantized(case.fn))(packed(case, qjax.int8()), *case.inputs))
        assert "f32[3,8,8]" not in jaxpr, name


def test_names_survive():
    import flax.linen as nn

    model = nn.Sequential([nn.Dense(8, name="first"), nn.Dense(4, name="second")])
    variables = model.init(jax.random.key(0), normal(2, 8))
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8())])
    params = qjax.quantize(model.apply, variables, policy, calibration=[normal(2, 8)]).params
    text = jax.jit(qjax.quantized(model.apply)).lower(params, normal(2, 8)).as_text(debug_info=True)
    assert "Sequential/layers_1" in text


def test_one_trace_per_shape():
    case = next(c for c in CASES if c.name == "scan_remat")
    fn = chex.assert_max_traces(lambda p, x: case.fn(p, x), n=2)
    params = packed(dataclasses.replace(case, fn=case.fn), qjax.int8())
    quantized = qjax.quantized(fn)
    for _ in range(3):
        quantized(params, case.inputs[0])
        quantized(params, case.inputs[0][:2])


def test_a_function_that_closes_over_a_tracer_is_not_remembered():
    w, x = normal(8, 4), normal(2, 8)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8())])
    params = qjax.quantize(lambda p, x: x @ p["w"], {"w": w}, policy, calibration=[x]).params

    @jax.jit
    def outer(params, x, scale):
        inner = qjax.quantized(lambda p, x: x @ p["w"] * scale)
        return inner(params, x) + inner(params, x)

    np.testing.assert_allclose(outer(params, x, 2.0), 2 * outer(params, x, 1.0), rtol=1e-6)


def test_export_round_trip():
    from jax import export

    case = next(c for c in CASES if c.name == "grouped_attention_bf16")
    params = packed(case, qjax.int8())
    flat, tree = jax.tree.flatten(params)
    run = jax.jit(lambda flat, x: qjax.quantized(case.fn)(jax.tree.unflatten(tree, flat), x))
    exported = export.export(run)(flat, *case.inputs)
    np.testing.assert_array_equal(exported.call(flat, *case.inputs), run(flat, *case.inputs))


def test_a_parameter_handed_back_stays_packed():
    params = packed(next(c for c in CASES if c.name == "jitted_helper"), qjax.int4())
    _, same = jax.jit(qjax.quantized(lambda p, x: (x @ p["w"], p)))(params, normal(3, 8))
    assert is_q(same["w"]) and same["w"].nbytes == params["w"].nbytes


def test_an_unknown_primitive_gets_the_dequantized_value_and_the_report_says_so():
    def fn(p, x):
        return x @ p["w"] + jnp.sum(p["w"] ** 2)

    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8())])
    result = qjax.quantize(fn, {"w": normal(8, 4)}, policy, calibration=[normal(2, 8)])
    got = jax.jit(qjax.quantized(fn))(result.params, normal(2, 8))
    np.testing.assert_allclose(got, fn(dequantized(result.params), normal(2, 8)), rtol=1e-5)
    assert any("also read by" in note for note in result.report.notes)


def test_take_out_of_range_fills_as_the_float_program_does():
    def fn(p, i):
        return jnp.take(p["e"], i, axis=0), jnp.take(p["e"], i, axis=0, mode="clip")

    params = {"e": normal(7, 6)}
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4())])
    index = jnp.array([0, 6, 9, -3])
    got = jax.jit(qjax.quantized(fn))(qjax.quantize(fn, params, policy, calibration=[index]).params, index)
    want = jax.jit(fn)(dequantized(qjax.quantize(fn, params, policy, calibration=[index]).params), index)
    chex.assert_trees_all_equal(got, want)
