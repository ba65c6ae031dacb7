"""Products beyond `x @ w` through the kernels of this CPU: experts, activations that are rounded in other ways, shards."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from qjax_kernels import cpu

import qjax
from qjax.core import quantize
from tests.program.cases import normal

pytestmark = pytest.mark.skipif(bool(cpu.why_not_loaded()), reason=f"no kernels for CPUs here: {cpu.why_not_loaded()}")
N, K = 144, 136  # no multiples of the kernels' blocks


def product(p, x):
    return x @ p["w"]


def experts(p, x, sizes):
    return lax.ragged_dot(x, p["w"], sizes)


def compiled_text(fn, *arguments):
    """The program as it is compiled, which must run a kernel and hold no copy of a weight in floats or widened integers."""
    compiled = jax.jit(fn).lower(*arguments).compile()
    text = compiled.as_text() or ""
    assert "qjax_cpu" in text
    assert not re.search(rf"(?:f32|bf16|s32)\[(?:3,)?(?:{N},{K}|{K},{N})\]", text), "a copy of the weight"
    return compiled


ACTIVATIONS = {
    "static": (qjax.static(qjax.int8()), qjax.int4(group_size=34)),
    "zero points on both sides": (qjax.static(qjax.uint8()), qjax.uint4(group_size=34)),
    "four bits": (qjax.dynamic(qjax.int4()), qjax.int8()),
    "one scale for all rows": (qjax.dynamic(qjax.integer(8, symmetric=False), per="tensor"), qjax.int8()),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ("static", "four bits") else n for n in ACTIVATIONS])
def test_activations_that_are_rounded_in_front_of_the_kernel(name):
    act, weight = ACTIVATIONS[name]
    x = normal(5, K, seed=1) + 0.3
    policy = qjax.Policy([qjax.Rule("*", weight=weight, activation=act)])
    result = qjax.quantize(product, {"w": normal(K, N)}, policy, calibration=[x])
    assert result.report.rows[0].kernel == "cpu int8"
    laid = qjax.prepack(product)(result.params, x)
    got = compiled_text(qjax.quantized(product), laid, x)(laid, x)
    q = result.params["w"]
    axes, static = (1,) if act.per_token else (0, 1), (q.act_scale, q.act_zero_point)
    rounded = qjax.core.round_activation(x, act, axes, *static)
    want = np.asarray(rounded, np.float64) @ np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-5)


@pytest.mark.slow
def test_static_ranges_of_parts_and_of_what_is_vmapped():
    """Experts with ranges of their own; rows that share a scale are not mixed with those of another example."""

    def fn(p, x):
        return jnp.einsum("etk,ekn->etn", x, p["w"])

    x = normal(3, 4, K, seed=1) * jnp.float32([1, 2, 5])[:, None, None]
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8(), activation=qjax.static(qjax.int8()))])
    params = qjax.quantize(fn, {"w": normal(3, K, N)}, policy, calibration=[x]).params
    laid = qjax.prepack(fn)(params, x)
    got = compiled_text(qjax.quantized(fn), laid, x)(laid, x)
    want = jax.jit(qjax.quantized(fn, kernel="xla"))(params, x)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-5)

    act = qjax.dynamic(qjax.int8(), per="tensor")
    one = dataclasses.replace(quantize(normal(K, N), qjax.int8(), (0,)), act=act)
    laid = qjax.prepack(product)({"w": one}, x[0])
    got = compiled_text(jax.vmap(qjax.quantized(product), (None, 0)), laid, x)(laid, x)
    w = np.asarray(one.dequantize(), np.float64)
    for given, found in zip(x, got, strict=True):
        rounded = qjax.core.round_activation(given, act, (0, 1))
        np.testing.assert_allclose(found, np.asarray(rounded, np.float64) @ w, rtol=2e-6, atol=4e-5)


@pytest.mark.parametrize("weight", [qjax.int8(), pytest.param(qjax.uint4(group_size=34), marks=pytest.mark.slow)], ids=str)
def test_outlier_columns_stay_out_of_the_integers_and_only_they_are_decoded(weight):
    columns = [3, 77, K - 1]
    x = normal(5, K, seed=1).at[:, jnp.asarray(columns)].multiply(30)
    policy = qjax.Policy([qjax.Rule("*", weight=weight, method=qjax.llm_int8(capacity=4))])
    result = qjax.quantize(product, {"w": normal(K, N)}, policy, calibration=[x])
    assert result.report.rows[0].kernel == "cpu int8"
    laid = qjax.prepack(product)(result.params, x)
    got = compiled_text(qjax.quantized(product), laid, x)(laid, x)
    want = jax.jit(qjax.quantized(product, kernel="xla"))(result.params, x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-4)
    exact = np.asarray(x, np.float64) @ np.asarray(result.params["w"].dequantize(), np.float64)
    assert np.abs(got - exact).max() < 0.02 * np.abs(exact).max()


def of_parts(x, w, sizes):
    """Rows expert after expert, in float64; zeros behind the last."""
    out, first = np.zeros((len(x), w.shape[-1])), 0
    for part, count in enumerate(sizes):
        out[first : first + count] = np.asarray(x[first : first + count], np.float64) @ w[part]
        first += count
    return out


@pytest.mark.parametrize("act", [None, pytest.param(qjax.dynamic(qjax.int8()), marks=pytest.mark.slow)], ids=["float", "int8"])
def test_experts_that_share_a_list_of_rows(act):
    x, sizes = normal(11, K, seed=2), jnp.asarray([4, 0, 6], jnp.int32)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(group_size=34), activation=act)])
    result = qjax.quantize(experts, {"w": normal(3, K, N)}, policy, calibration=[(x, sizes)])
    assert result.report.rows[0].kernel == ("cpu int8" if act else "cpu weight-only")
    laid = qjax.prepack(experts)(result.params, x, sizes)
    run = qjax.quantized(experts)
    whole = compiled_text(run, laid, x, sizes)
    got, pull = jax.vjp(lambda x: run(laid, x, sizes), x)
    np.testing.assert_array_equal(got, whole(laid, x, sizes))
    w = np.asarray(result.params["w"].dequantize(), np.float64)
    rows = x if act is None else qjax.core.round_activation(x, act, (1,))
    np.testing.assert_allclose(got, of_parts(rows, w, [4, 0, 6]), rtol=1e-5, atol=1e-4)
    assert not np.any(got[10:])
    (gradient,) = pull(jnp.ones_like(got))
    np.testing.assert_allclose(gradient, of_parts(np.ones((11, N)), w.swapaxes(1, 2), [4, 0, 6]), rtol=1e-4, atol=1e-4)
    if act is not None:  # each with its own sizes: one after another
        pair = jnp.stack([x, x[::-1]]), jnp.stack([sizes, sizes[::-1]])
        got = compiled_text(jax.vmap(run, (None, 0, 0)), laid, *pair)(laid, *pair)
        for found, given, count in zip(got, *pair, strict=True):
            rounded = qjax.core.round_activation(given, act, (1,))
            np.testing.assert_allclose(found, of_parts(rounded, w, count.tolist()), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_layers_of_experts_in_a_scan():
    def fn(p, x, sizes):
        return lax.scan(lambda x, w: (jnp.tanh(experts({"w": w}, x, sizes))[:, :K], None), x, p["w"])[0]

    x, sizes = normal(5, K, seed=2), jnp.asarray([2, 0, 3], jnp.int32)
    params = {"w": quantize(0.1 * normal(2, 3, K, N), qjax.int8(), (2,), (0, 1))}
    laid = qjax.prepack(fn)(params, x, sizes)
    got = compiled_text(qjax.quantized(fn), laid, x, sizes)(laid, x, sizes)
    want = x
    for w in np.asarray(params["w"].dequantize(), np.float64):
        want = np.tanh(of_parts(want, w, [2, 0, 3]))[:, :K]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_rows_of_an_embedding_are_all_that_is_read_of_it():
    def tied(p, tokens):
        return jnp.take(p["e"], tokens, axis=0) @ p["e"].T

    table, tokens = {"e": quantize(normal(N, K), qjax.uint4(group_size=34), (1,))}, jnp.asarray([[3, 0, N - 1]])
    laid = qjax.prepack(tied)(table, tokens)
    assert laid["e"].form is not None
    got = compiled_text(qjax.quantized(tied), laid, tokens)(laid, tokens)
    w = np.asarray(table["e"].dequantize(), np.float64)
    np.testing.assert_allclose(got, w[np.asarray(tokens)] @ w.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act", [None, pytest.param(qjax.static(qjax.uint8()), marks=pytest.mark.slow)], ids=["float", "static"])
def test_convolutions_with_windows_of_one_value_are_products_of_rows(act):
    """With steps and padding, in torch's order of axes; larger windows say why they are not."""

    def conv(p, x, order=("NCHW", "OIHW", "NCHW")):
        return lax.conv_general_dilated(x, p["w"], (2, 1), ((1, 0), (0, 1)), dimension_numbers=order)

    x, policy = normal(2, K, 5, 6) + 0.3, qjax.Policy([qjax.Rule("*", weight=qjax.uint8(), activation=act)])
    result = qjax.quantize(conv, {"w": normal(N, K, 1, 1, seed=1)}, policy, calibration=[x])
    assert result.report.rows[0].kernel == ("cpu int8" if act else "cpu weight-only")
    laid = qjax.prepack(conv)(result.params, x)
    compiled = compiled_text(qjax.quantized(conv), laid, x)
    assert " convolution(" not in compiled.as_text()
    q, rows = result.params["w"], np.pad(np.asarray(x), ((0, 0), (0, 0), (1, 0), (0, 1)))[:, :, ::2]
    if act is not None:
        rows = qjax.core.round_activation(jnp.asarray(rows), act, (), q.act_scale.reshape(()), q.act_zero_point.reshape(()))
    want = np.einsum("nkhw,mk->nmhw", np.asarray(rows, np.float64), np.asarray(q.dequantize(), np.float64)[..., 0, 0])
    np.testing.assert_allclose(compiled(laid, x), want, rtol=1e-5, atol=1e-4)
    report = qjax.sites(conv, policy)({"w": jnp.ones((N, K, 3, 3))}, x)
    assert any("convolution" in reason for reason in report.rows[0].kernel_reasons)


def test_shards_of_a_batch_run_the_kernel_and_shards_of_a_weight_do_not():
    mesh, spec = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec
    params, x = {"w": quantize(normal(K, N), qjax.int4(group_size=34), (0,))}, normal(4, K, seed=1)
    w = np.asarray(params["w"].dequantize(), np.float64)
    over = functools.partial(jax.shard_map, mesh=mesh)
    batch = {"in_specs": (spec(), spec("data")), "out_specs": spec("data")}
    columns = {"in_specs": (spec(None, "data"), spec()), "out_specs": spec(None, "data")}

    def inside(p, x):
        return over(lambda w, x: x @ w, **batch)(p["w"], x)

    def split(p, x):
        return over(lambda w, x: x @ w, **columns)(p["w"], x)

    laid = qjax.prepack(inside)(params, x)
    assert laid["w"].form is not None and qjax.prepack(split)(params, x)["w"] is params["w"]
    for run in (over(qjax.quantized(product), **batch), qjax.quantized(inside)):
        np.testing.assert_allclose(compiled_text(run, laid, x)(laid, x), x @ w, rtol=1e-5, atol=1e-4)
    got = jax.jit(jax.grad(lambda x: jnp.sum(qjax.quantized(inside)(laid, x) ** 2)))(x)
    np.testing.assert_allclose(got, 2 * (x @ w) @ w.T, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="each device has a part of it inside a shard_map"):
        qjax.quantized(split, kernel="cpu weight-only")(params, x)


def test_forward_mode_is_refused_by_name_and_there_without_kernels():
    x = normal(2, K)
    params = {"w": quantize(normal(K, N), qjax.int4(), (0,))}
    laid = qjax.prepack(product)(params, x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: qjax.quantized(product)(laid, x), (x,), (x,))
    y, t = jax.jvp(lambda x: qjax.quantized(product, kernel="xla")(params, x), (x,), (x,))
    np.testing.assert_allclose(y, t, rtol=1e-5, atol=1e-5)
