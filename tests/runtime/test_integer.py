"""Integer products: exact against float64, integers in the program, gradients, and every form of program."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.core import quantize, round_activation
from qjax.program import Packed
from qjax.runtime.integer import product, why_no_product
from tests.program.cases import CASES, normal

WEIGHTS = [qjax.int8(), qjax.uint8(), qjax.int4(), qjax.uint3(group_size=4, pad=True), qjax.int8(per="tensor")]
ACTIVATIONS = [
    qjax.dynamic(qjax.int8()),
    qjax.dynamic(qjax.int8(), per="tensor"),
    qjax.dynamic(qjax.uint8()),
    qjax.dynamic(qjax.integer(8, symmetric=False)),
]
IN_CUSTOM_RULE = ("custom_vjp", "custom_jvp")
INTEGER = re.compile(r"(?:dot_general|convolution)\b.*xi8>, tensor<[0-9x]*xi8>\) -> tensor<[0-9x]*i32>")
FLOAT = re.compile(r"(?:dot_general|convolution)\b.*x(?:f32|bf16)>\) -> ")


def packed(fn, params, inputs, weight, activation):
    policy = qjax.Policy([qjax.Rule("*", weight=weight, activation=activation)])
    return qjax.quantize(fn, params, policy, calibration=[inputs])


def reference(x, w, act, axes):
    """The product of what the codes stand for, in float64."""
    return np.asarray(round_activation(x, act, axes), np.float64), np.asarray(w.dequantize(), np.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_a_matmul_is_that_of_the_rounded_numbers(weight, activation):
    x, w = normal(7, 13) + 0.5, {"w": normal(13, 5, seed=1)}
    result = packed(lambda p, x: x @ p["w"], w, (x,), weight, activation)
    axes = (1,) if activation.per_token else (0, 1)
    a, b = reference(x, result.params["w"], activation, axes)
    got = jax.jit(qjax.quantized(lambda p, x: x @ p["w"]))(result.params, x)
    np.testing.assert_allclose(got, a @ b, rtol=2e-6, atol=2e-6)
    assert [row.kernel for row in result.report.rows] == ["xla int8"]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_batched_heads_contracted_over_two_axes(activation):
    def fn(p, x):
        return jnp.einsum("bthd,bhdm->btm", x, p["w"])

    x, params = normal(2, 3, 4, 6), {"w": normal(2, 4, 6, 5, seed=1)}
    result = packed(fn, params, (x,), qjax.int8(), activation)
    a, b = reference(x, result.params["w"], activation, (2, 3) if activation.per_token else (0, 1, 2, 3))
    got = jax.jit(qjax.quantized(fn))(result.params, x)
    np.testing.assert_allclose(got, np.einsum("bthd,bhdm->btm", a, b), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_with_padding_and_strides(activation, groups):
    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    x, params = jax.nn.relu(normal(3, 9, 7, 4)) + 0.1, {"w": normal(3, 3, 4 // groups, 6, seed=1)}
    result = packed(fn, params, (x,), qjax.int8(), activation)
    rounded = round_activation(x, activation, (1, 2, 3) if activation.per_token else (0, 1, 2, 3))
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        want = fn({"w": jnp.asarray(np.asarray(result.params["w"].dequantize(), np.float64))}, jnp.asarray(np.asarray(rounded, np.float64)))
    got = jax.jit(qjax.quantized(fn))(result.params, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("sizes", [(5, 0, 7), (0, 40, 1), (3, 4, 2), (0, 0, 0)])
def test_experts_do_not_pay_for_each_other(activation, sizes):
    rows = 41

    def fn(p, x, sizes):
        return lax.ragged_dot(x, p["w"], sizes)

    x, params, sizes = normal(rows, 8), {"w": normal(3, 8, 6, seed=1)}, jnp.array(sizes, jnp.int32)
    result = packed(fn, params, (x, sizes), qjax.int8(), activation)
    a, b = reference(x, result.params["w"], activation, (1,) if activation.per_token else (0, 1))
    owner = np.repeat(np.arange(4), [*np.asarray(sizes), rows - int(sizes.sum())])
    want = np.stack([a[i] @ b[e] if e < 3 else np.zeros(6) for i, e in enumerate(owner)])
    run = jax.jit(qjax.quantized(fn))
    np.testing.assert_allclose(run(result.params, x, sizes), want, rtol=2e-6, atol=2e-6)
    # The one integer product has a block of rows, whatever the number of experts.
    text = run.lower(result.params, x, sizes).as_text()
    (line,) = [line for line in text.splitlines() if INTEGER.search(line)]
    assert "tensor<16x8xi8>" in line and not FLOAT.search(text)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_program_multiplies_integers(case):
    result = packed(case.fn, case.params, case.inputs, qjax.int8(), qjax.dynamic(qjax.int8()))
    run = jax.jit(qjax.quantized(case.fn))
    text = run.lower(result.params, *case.inputs).as_text()
    products = {path: op for path, op, *_ in case.sites if op != "gather"}
    kernels = {row.path: row.kernel for row in result.report.rows if row.spec}
    if case.name in IN_CUSTOM_RULE:
        assert not INTEGER.search(text) and kernels == {"w": "xla"}
        assert any("custom derivative rule" in note for row in result.report.rows for note in row.notes)
    else:
        assert all("xla int8" in kernels[path] for path in products)
        assert len(INTEGER.findall(text)) >= len(products)
        attention = 2 if case.name == "grouped_attention_bf16" else 0  # products of two activations
        assert len(FLOAT.findall(text)) == attention
    both = run(result.params, *case.inputs), case.fn(case.params, *case.inputs)
    for got, want in zip(*map(jax.tree.leaves, both), strict=True):
        assert got.dtype == want.dtype
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.linalg.norm(got - want) <= 0.05 * np.linalg.norm(want)


@pytest.mark.parametrize("field", ["input_scale", "perm", "act_scale"])
def test_parts_that_want_the_same_rows_in_another_form_each(field):
    def fn(p, x):
        return jnp.einsum("bk,lkn->lbn", x, p["w"])

    x, act = normal(5, 8), qjax.static(qjax.int8()) if field == "act_scale" else qjax.dynamic(qjax.int8())
    own = {
        "input_scale": jnp.abs(normal(2, 1, 8, seed=3)) + 0.5,
        "perm": jnp.int32([[[*range(8)]], [[*range(7, -1, -1)]]]),
        "act_scale": jnp.float32([[[0.02]], [[0.03]]]),
    }
    q = quantize(normal(2, 8, 6, seed=1), qjax.int8(), (1,), (0,))
    q = dataclasses.replace(q, act=act, **{field: own[field]})
    got = jax.jit(qjax.quantized(fn))({"w": q}, x)
    np.testing.assert_allclose(got, fn({"w": q.dequantize()}, x), rtol=0.05, atol=0.1)


def test_the_compiled_program_keeps_integers():
    result = packed(lambda p, x: x @ p["w"], {"w": normal(64, 32)}, (normal(8, 64),), qjax.int8(), qjax.dynamic(qjax.int8()))
    text = jax.jit(qjax.quantized(lambda p, x: x @ p["w"])).lower(result.params, normal(8, 64)).compile().as_text()
    assert "s32[8,32]" in text
    assert not re.search(r"f32\[8,32\]\S* dot\(", text)


def test_an_activation_that_is_all_zeros_or_one_row():
    result = packed(lambda p, x: x @ p["w"], {"w": normal(8, 3)}, (normal(1, 8),), qjax.int8(), qjax.dynamic(qjax.int8()))
    run = jax.jit(qjax.quantized(lambda p, x: x @ p["w"]))
    assert not np.asarray(run(result.params, jnp.zeros((1, 8)))).any()
    mixed = jnp.stack([jnp.zeros(8), 1e-3 * normal(8), 1e3 * normal(8)])
    want = mixed @ result.params["w"].dequantize()
    np.testing.assert_allclose(run(result.params, mixed), want, rtol=0.05, atol=1e-6)


def test_the_gradient_reaches_activations_straight_through():
    fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    params, x = {"w": normal(8, 3)}, normal(5, 8, seed=2)
    result = packed(fn, params, (x,), qjax.int8(), qjax.dynamic(qjax.int8()))
    loss = lambda x: jnp.sum(qjax.quantized(fn)(result.params, x) ** 2)  # noqa: E731
    got = jax.jit(jax.grad(loss))(x)
    want = jax.grad(lambda x: jnp.sum(fn({"w": result.params["w"].dequantize()}, x) ** 2))(x)
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
    per_example = jax.vmap(jax.grad(lambda x: jnp.sum(qjax.quantized(fn)(result.params, x[None]) ** 2)))(x)
    np.testing.assert_allclose(per_example, got, rtol=1e-4, atol=1e-5)


def test_vmap_and_scan_give_what_a_loop_gives():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    result = packed(fn, {"w": normal(8, 3)}, (normal(5, 8),), qjax.int8(), qjax.dynamic(qjax.int8()))
    xs, run = normal(4, 5, 8, seed=3), qjax.quantized(fn)
    want = jnp.stack([jax.jit(run)(result.params, x) for x in xs])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: run(result.params, x)))(xs), want)
    np.testing.assert_array_equal(jax.jit(lambda xs: lax.map(lambda x: run(result.params, x), xs))(xs), want)


BAD = [
    (lambda: qjax.dynamic(qjax.nf4()), TypeError, r"`spec` of activations must be integers .* got "),
    (lambda: qjax.dynamic(qjax.int8(group_size=8)), ValueError, "must have no groups"),
    (lambda: qjax.dynamic(qjax.int8(), per="row"), ValueError, "`per` must be 'token' or 'tensor', got 'row'"),
    (lambda: qjax.Rule("*", weight=qjax.nf4(), activation=qjax.dynamic(qjax.int8())), TypeError, "needs a `weight` spec of integers"),
    (lambda: qjax.Rule("*", weight=qjax.int8(), activation=qjax.int8()), TypeError, "`activation` must be qjax.dynamic"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_weight_without_an_activation_has_no_product_of_codes_and_says_so():
    """`product` and its reason are asked of any weight that arrives; without a spec for its rows there is nothing to multiply."""
    params, x = {"w": normal(8, 5)}, normal(3, 8)
    program = qjax.trace(lambda p, x: x @ p["w"], params, x)
    (site,), (eqn,) = program.sites, program.jaxpr.eqns
    q = quantize(params["w"], qjax.int8(), axes=(0,))
    assert why_no_product(site, eqn, q, 2) == "its activations stay float" and product(site, eqn, [x, Packed(q)]) is None
    rounded = dataclasses.replace(q, act=qjax.dynamic(qjax.int8()))
    assert why_no_product(site, eqn, rounded, 2) == ""
    np.testing.assert_allclose(product(site, eqn, [x, Packed(rounded)]), x @ params["w"], atol=0.1)
