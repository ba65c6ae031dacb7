"""Low-rank corrections: the optimum in float64, thin products in the program, every form of weight, files, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.core import quantize, round_activation, views
from qjax.ptq.method import Problem
from tests.parameters import every_other

SPEC = qjax.int2(group_size=8)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def packed(fn, params, inputs, method, spec=SPEC, activation=None):
    return qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=spec, method=method, activation=activation)]), calibration=[inputs])


def correlated(rows, columns, seed=1):
    return normal(rows, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)


def matmul(p, x):
    return x @ p["w"]


def least(error, s, rank):
    """The least |(error - L R) s|_F in float64."""
    return np.sqrt(np.sum(np.linalg.svd(np.float64(error) @ s, compute_uv=False)[rank:] ** 2))


@pytest.mark.parametrize("kind", ["eora", "lqer", "svd"])
@pytest.mark.parametrize(("then", "outputs"), [(None, 20), pytest.param(qjax.gptq(mse=False), 45, marks=pytest.mark.slow)],
                         ids=["rtn", "gptq"])  # fmt: skip
def test_it_is_the_optimum_of_its_measure(kind, then, outputs):
    w, x = normal(32, outputs), correlated(96, 32)
    q = packed(matmul, {"w": w}, (x,), qjax.low_rank(6, then=then, kind=kind, dtype="float32")).params["w"]
    error = np.float64(w - q.with_adapter(None).dequantize()).T
    moment = np.float64(x).T @ np.float64(x) / 96
    values, vectors = np.linalg.eigh(moment)
    s = {"eora": (vectors * np.sqrt(values)) @ vectors.T, "lqer": np.diag(np.sqrt(np.diag(moment))), "svd": np.eye(32)}[kind]
    got = np.linalg.norm(np.float64(w - q.dequantize()).T @ s)
    np.testing.assert_allclose(got, least(error, s, 6), rtol=1e-3)
    assert got < 0.9 * np.linalg.norm(error @ s)


def test_data_of_few_directions_need_no_damping():
    w, x = normal(32, 20), correlated(5, 32).at[:, 7].set(0.0)
    result = packed(matmul, {"w": w}, (x,), qjax.low_rank(5))
    q = result.params["w"]
    assert np.linalg.norm(x @ (q.dequantize() - w)) < 0.02 * np.linalg.norm(x @ (q.with_adapter(None).dequantize() - w))
    assert np.abs(q.dequantize()).max() < 10
    zeros = packed(matmul, {"w": w}, (jnp.zeros((4, 32)),), qjax.low_rank(5))
    assert zeros.report.rows[0].notes == ("no calibration data but zeros reached it: all errors of its low-rank part count alike",)
    want = packed(matmul, {"w": w}, (x,), qjax.low_rank(5, kind="svd")).params["w"].dequantize()
    np.testing.assert_allclose(zeros.params["w"].dequantize(), want, atol=1e-5)


def test_it_is_counted_kept_in_its_dtype_and_exchangeable():
    w = normal(32, 20)
    row = packed(matmul, {"w": w}, (normal(4, 32),), qjax.low_rank(4, kind="svd", dtype="bfloat16")).report.rows[0]
    assert row.nbytes == 20 * (32 * 2 // 8 + 4 * 4) + 4 * (20 + 32) * 2 and row.method == "low_rank(4, svd, bfloat16, then=rtn)"
    q = quantize(w, SPEC, (-2,))
    adapter = qjax.Adapter(normal(20, 3), normal(1, 3, 32))
    more = q.with_adapter(adapter)
    np.testing.assert_allclose(more.dequantize(), q.dequantize() + (adapter.left @ adapter.right[0]).T, atol=1e-5)
    for a, b in zip(more.adapter, adapter, strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match=r"`adapter` must be left \(20, 'r'\) and right"):
        q.with_adapter(qjax.Adapter(normal(20, 3), normal(1, 2, 32)))
    gradient = jax.grad(lambda a: jnp.sum(jnp.square(qjax.quantized(matmul)({"w": q.with_adapter(a)}, normal(4, 32)))))(adapter)
    assert all(np.abs(g).max() > 0 for g in gradient)  # it can be trained where it is


def dots(jaxpr):
    """Every matrix product of a program: (shape of the result, contracted sizes)."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot_general"):
            numbers = eqn.params.get("dimension_numbers") or eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
            yield eqn.outvars[0].aval.shape, tuple(eqn.invars[0].aval.shape[a] for a in numbers[0][0])
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from dots(getattr(inner, "jaxpr", inner))


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


FORMS = {
    "matmul": (matmul, (32, 20), (7, 32)),
    "transposed": (lambda p, x: p["w"].T @ x, (32, 20), (32, 7)),
    "scan": (scanned, (3, 16, 16), (7, 16)),
    "heads in": (lambda p, x: jnp.einsum("bhd,hdm->bm", x, p["w"]), (4, 8, 20), (7, 4, 8)),
    "heads out": (lambda p, x: jnp.einsum("bm,mhd->bhd", x, p["w"]), (32, 4, 6), (7, 32)),
    "experts": (lambda p, x: jnp.einsum("ebk,ekn->ebn", x, p["w"]), (3, 16, 20), (3, 7, 16)),
    "experts of one input": (lambda p, x: jnp.einsum("bk,ekn->ben", x, p["w"]), (3, 16, 20), (7, 16)),
    "ragged experts": (lambda p, x: lax.ragged_dot(x, p["w"], jnp.int32([3, 0, 4])), (3, 16, 20), (7, 16)),
    "cast": (lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), (32, 20), (7, 32)),
}


@pytest.mark.parametrize("form", every_other(FORMS))
def test_every_form_multiplies_by_the_thin_parts(form):
    fn, shape, x_shape = FORMS[form]
    params, x = {"w": normal(*shape)}, normal(*x_shape, seed=3)
    rank = 5
    result = packed(fn, params, (x,), qjax.low_rank(rank))
    run, q = qjax.quantized(fn), result.params["w"]
    want = fn({"w": q.dequantize()}, x)
    loose = form == "cast"
    np.testing.assert_allclose(jax.jit(run)(result.params, x).astype(jnp.float32), want.astype(jnp.float32), rtol=2e-2 if loose else 1e-4,
                               atol=0.2 if loose else 2e-5)  # fmt: skip
    found = list(dots(jax.make_jaxpr(run)(result.params, x).jaxpr))
    assert sum(rank in shape[-1:] or (rank,) == sizes or rank in shape for shape, sizes in found) >= 2
    weights = {q.size, q.size // shape[0]}
    assert not [s for s, sizes in found if sizes == (rank,) and int(np.prod(s)) in weights and 7 not in s]
    assert not any("multiplied out" in note for note in result.report.rows[0].notes)


def test_activations_are_integers_for_the_codes_and_float_for_the_adapter():
    params, x, act = {"w": normal(32, 20)}, normal(7, 32, seed=3), qjax.dynamic(qjax.int8())
    result = packed(matmul, params, (x,), qjax.low_rank(5), qjax.int4(), act)
    q, run = result.params["w"], jax.jit(qjax.quantized(matmul))
    thin = x @ (q.adapter.left @ q.adapter.right[0]).astype(jnp.float32).T
    want = round_activation(x, act, (1,)) @ q.with_adapter(None).dequantize() + thin
    np.testing.assert_allclose(run(result.params, x), want, rtol=1e-2, atol=2e-3)
    assert result.report.rows[0].kernel == "xla int8" and "xi8>" in run.lower(result.params, x).as_text()


def test_a_convolution_gets_the_sum_and_the_report_says_so():
    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = normal(2, 5, 5, 4)
    result = packed(fn, {"w": normal(3, 3, 4, 6)}, (x,), qjax.low_rank(3), qjax.int2())
    np.testing.assert_allclose(jax.jit(qjax.quantized(fn))(result.params, x), fn({"w": result.params["w"].dequantize()}, x), atol=1e-4)
    assert "its low-rank part is multiplied out in front of the product: a convolution" in result.report.rows[0].notes


def test_a_convolution_of_integers_keeps_it():
    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, act = normal(2, 5, 5, 4), qjax.dynamic(qjax.int8())
    result = packed(fn, {"w": normal(3, 3, 4, 6)}, (x,), qjax.low_rank(3, kind="svd"), qjax.int2(), act)
    want = fn({"w": result.params["w"].dequantize()}, round_activation(x, act, (1, 2, 3)))
    np.testing.assert_allclose(jax.jit(qjax.quantized(fn))(result.params, x), want, atol=1e-4)
    (row,) = result.report.rows
    assert row.kernel == "xla" and any("in front of a float product: so is the low-rank part" in note for note in row.notes)


@pytest.mark.parametrize("act", [qjax.int8(), qjax.fp8_e4m3()], ids=str)
def test_experts_that_divide_their_input_keep_it(act):
    sizes = jnp.int32([3, 0, 9])
    x, weight = correlated(12, 16) * jnp.exp(normal(16, seed=4)), qjax.int3() if act == qjax.int8() else act
    method = qjax.awq(unfoldable="scale", then=qjax.low_rank(4, kind="svd"))
    fn = lambda p, x: lax.ragged_dot(x, p["w"], sizes)  # noqa: E731
    result = packed(fn, {"w": normal(3, 16, 20)}, (x,), method, weight, qjax.dynamic(act))
    q = result.params["w"]
    assert q.input_scale is not None and q.input_scale.shape == (3, 1, 16)
    s = jnp.repeat(q.input_scale[:, 0], sizes, axis=0, total_repeat_length=12)
    codes = dataclasses.replace(q.with_adapter(None), input_scale=None)
    want = fn({"w": codes.dequantize()}, round_activation(x / s, q.act, (1,))) + fn({"w": q.dequantize()}, x)
    want = want - fn({"w": q.with_adapter(None).dequantize()}, x)
    run = jax.jit(qjax.quantized(fn))
    np.testing.assert_allclose(run(result.params, x), want, rtol=1e-4, atol=1e-3)
    text = run.lower(result.params, x).as_text()
    assert "xi8>" in text if act == qjax.int8() else "xf8E4M3FN>" in text
    assert result.report.rows[0].kernel == ("xla int8" if act == qjax.int8() else "xla float8")


def test_views_carry_it_or_say_no():
    q = quantize(normal(3, 16, 4, 5), qjax.int4(group_size=8), (-3,), (-4,))
    q = q.with_adapter(qjax.Adapter(normal(3, 4, 5, 2), normal(3, 1, 1, 2, 16)))
    back = q.dequantize()
    assert np.allclose(views.transpose(q, (0, 3, 1, 2)).dequantize(), back.transpose(0, 3, 1, 2), atol=1e-6)
    assert np.allclose(views.reshape(q, (3, 16, 20)).dequantize(), back.reshape(3, 16, 20), atol=1e-6)
    assert np.allclose(views.slice(q, (1, 0, 0, 2), (3, 16, 4, 4)).dequantize(), back[1:3, :, :, 2:4], atol=1e-6)
    assert np.allclose(views.squeeze(views.dynamic_slice(q, (2, 0, 0, 0), (1, 16, 4, 5)), (0,)).dequantize(), back[2], atol=1e-6)
    assert np.allclose(jax.vmap(lambda q: q.dequantize())(q), back, atol=1e-6)
    assert views.reshape(views.transpose(q, (1, 0, 2, 3)), (16, 60)) is None  # the right parts would be repeated for every row


def test_a_lookup_adds_the_parts_of_its_rows():
    params, index = {"w": normal(40, 16)}, jnp.int32([3, 39])
    fn = lambda p, i: jnp.take(p["w"], i, axis=0)  # noqa: E731
    result = packed(fn, params, (index,), qjax.low_rank(4, kind="svd"))
    run = jax.jit(qjax.quantized(fn))
    np.testing.assert_allclose(run(result.params, index), result.params["w"].dequantize()[index], atol=1e-6)
    assert "f32[40,16]" not in run.lower(result.params, index).compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eora", "lqer"])
def test_behind_other_methods_saved_and_loaded(kind, tmp_path):
    params, x = {"w": normal(2, 16, 16, dtype=jnp.bfloat16)}, correlated(48, 16)
    inner = qjax.low_rank(4, then=qjax.gptq(act_order=True), kind=kind)
    result = packed(scanned, params, (x.astype(jnp.bfloat16),), inner)
    learned = packed(scanned, params, (x.astype(jnp.bfloat16),), qjax.low_rank(4, then=qjax.kmeans(), kind=kind), qjax.learned(2))
    scaled = packed(matmul, {"w": normal(16, 12)}, (x,), qjax.awq(then=qjax.low_rank(4, then=qjax.gptq(), kind=kind), unfoldable="scale"))
    np.testing.assert_allclose(jax.jit(qjax.quantized(matmul))(scaled.params, x), x @ scaled.params["w"].dequantize(), atol=2e-4)
    for i, one in enumerate((result, learned, scaled)):
        qjax.save(tmp_path / str(i), one)
        loaded = qjax.load(tmp_path / str(i))
        assert loaded.policy == one.policy and loaded.params["w"].adapter is not None
        assert np.array_equal(loaded.params["w"].dequantize(), one.params["w"].dequantize())


def test_what_it_wraps_sees_the_float_program():
    params = {"a": normal(32, 24) / 6, "b": normal(24, 16, seed=7)}

    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    gptaq = qjax.gptaq(mse=False)
    inside, alone = (packed(fn, params, (correlated(96, 32),), m) for m in (qjax.low_rank(2, then=gptaq), gptaq))
    for row, other in zip(inside.report.rows, alone.report.rows, strict=True):
        assert row.notes == other.notes == ()
    np.testing.assert_array_equal(inside.params["a"].codes, alone.params["a"].codes)


def test_zeros_that_are_none_any_more_are_told():
    params = {"w": jnp.where(jnp.arange(32)[:, None] < 2, 0.0, normal(32, 20))}
    assert packed(matmul, params, (normal(4, 32),), qjax.low_rank(2, kind="svd")).report.rows[0].notes == (
        "6.2 % of it was exactly zero, which low_rank(2, svd, then=rtn) does not keep",
    )


def test_what_it_refuses():
    for make, message in (
        (lambda: qjax.low_rank(0), "`rank` must be an int of at least 1, got 0"),
        (lambda: qjax.low_rank(qjax.gptq()), r"the method goes behind it, qjax.low_rank\(32, then="),
        (lambda: qjax.low_rank(kind="pca"), "`kind` must be one of 'eora', 'lqer', 'svd', got 'pca'"),
        (lambda: qjax.low_rank(dtype="int8"), "`dtype` must be one of 'float16'"),
        (lambda: qjax.low_rank(then=qjax.awq()), "`then` must be a method that rounds"),
        (lambda: qjax.low_rank(then=qjax.low_rank()), "give one low-rank part a larger `rank`"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    shape = jax.ShapeDtypeStruct((32, 6), jnp.float32)
    with pytest.raises(ValueError, match=r"`rank`=8 is more than a matrix of 6 outputs and 32 inputs has.*'mlp/w': take at most 6"):
        qjax.low_rank(8).shapes(Problem(shape, SPEC, (-2,), (), 1, "mlp/w"))
    with pytest.raises(ValueError, match="no low-rank part for the grouped convolution 'mlp/w'"):
        qjax.low_rank(2).shapes(Problem(shape, SPEC, (-2,), (), 2, "mlp/w"))
