"""Run-time input scales: where nothing can take 1 / s, the product divides its input, and everything else sees the weight as it was."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import Policy, Rule
from qjax.core import QTensor, assemble, quantize
from tests.program.cases import CASES, normal, sharded

STATIC = {"weight": qjax.int8(), "activation": qjax.static(qjax.int8())}
SMOOTH = qjax.smoothquant("search", unfoldable="scale")
INTEGER = re.compile(r"dot_general\b.*xi8>, tensor<[0-9x]*xi8>\) -> tensor<[0-9x]*i32>")
FLOAT = re.compile(r"dot_general\b.*x(?:f32|bf16)>\) -> ")


def norm(x):
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def outliers(n, factor=60.0, seed=9):
    return jnp.asarray(np.where(np.random.default_rng(seed).random(n) < 0.1, factor, 1.0), jnp.float32)


def gelu(p, x):
    """A non-linearity makes the input of the second product; its channels differ, and nothing homogeneous stands between."""
    return jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]


def post_norm(p, x):
    """The stream itself is read, behind an addition, by what cannot take its scales."""
    h = x * p["by"] + jnp.tanh(x @ p["a"])
    return norm(h @ p["b"]) + h


BIAS = outliers(48, 50.0) - 1
CASES_OF_NO_FOLD = {
    "gelu": (gelu, {"up": normal(24, 48) / 5, "bias": BIAS, "down": normal(48, 16, seed=1) / (1 + BIAS)[:, None] / 7},
             (normal(2, 19, 24, seed=2),)),
    "post_norm": (post_norm, {"by": outliers(24), "a": normal(24, 24) / 5, "b": normal(24, 24, seed=1) / outliers(24)[:, None]},
                  (normal(2, 19, 24, seed=3),)),
}  # fmt: skip


def run(fn, params, inputs, method=None, **how):
    return qjax.quantize(fn, params, Policy([Rule("*", method=method, **(how or STATIC))]), [inputs])


def error(fn, params, result, inputs):
    want = fn(params, *inputs).astype(jnp.float32)
    got = jax.jit(qjax.quantized(fn))(result.params, *inputs).astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("name", ["gelu", pytest.param("post_norm", marks=pytest.mark.slow)])
def test_it_saves_static_activations_where_nothing_folds(name):
    fn, params, inputs = CASES_OF_NO_FOLD[name]
    plain = run(fn, params, inputs)
    left = run(fn, params, inputs, qjax.smoothquant())
    divided = run(fn, params, inputs, qjax.smoothquant(unfoldable="scale"))
    first, last = ("up", "down") if name == "gelu" else ("a", "b")
    # By default the site goes on without it, and the report says why.
    np.testing.assert_array_equal(left.params[last].codes, plain.params[last].codes)
    said = {row.path: " ".join(row.notes) for row in left.report.rows}
    assert "smoothquant without rescaling" in said[last] and left.params[last].input_scale is None
    said = {row.path: " ".join(row.notes) for row in divided.report.rows}
    assert "its input is divided at run time, because" in said[last] and "its input is divided at run time" in said[first]
    assert error(fn, params, divided, inputs) < 0.35 * error(fn, params, plain, inputs)
    text = jax.jit(qjax.quantized(fn)).lower(divided.params, *inputs).as_text()
    assert len(INTEGER.findall(text)) == 2 and not FLOAT.search(text)
    assert {row.kernel for row in divided.report.rows if row.spec} == {"xla int8"}


def test_the_packed_weight_stands_for_the_weight_and_its_range_for_the_quotient(tmp_path):
    fn, params, inputs = CASES_OF_NO_FOLD["gelu"]
    result = run(fn, params, inputs, qjax.smoothquant(0.5, unfoldable="scale"))
    q = result.params["down"]
    assert q.input_scale.shape == (1, 48) and q.nbytes == 48 * 16 + 4 * 16 + 4 + 4 * 48
    hidden = jax.nn.gelu(inputs[0] @ result.params["up"].dequantize() + params["bias"]).reshape(-1, 48)
    exact = jax.nn.gelu(inputs[0] @ params["up"] + params["bias"]).reshape(-1, 48)
    s = jnp.sqrt(jnp.abs(exact).max(0) / jnp.abs(params["down"]).max(1))  # the formula, of the float activations
    np.testing.assert_allclose(q.input_scale[0], s, rtol=1e-4)
    assert float(q.act_scale.item()) * 127.5 == pytest.approx(float(jnp.abs(hidden / s).max()), rel=1e-3)
    stored = q.codes.astype(jnp.float32).T * q.scale[:, 0]
    np.testing.assert_allclose(q.dequantize(), stored / s[:, None], rtol=1e-4)
    assert jnp.linalg.norm(q.dequantize() - params["down"]) < 0.02 * jnp.linalg.norm(params["down"])
    assert float(jnp.abs(q.input_scale - 1).max()) > 1
    qjax.save(tmp_path / "ckpt", result)
    loaded = qjax.load(tmp_path / "ckpt")
    assert loaded.policy == result.policy and loaded.report == result.report
    np.testing.assert_array_equal(loaded.params["down"].input_scale, q.input_scale)
    both = (jax.jit(qjax.quantized(fn))(r.params, *inputs) for r in (result, loaded))
    np.testing.assert_array_equal(*both)


def layer(x, w):
    return jnp.tanh(x) * w["by"] @ w["w"]


def scanned(p, x):
    return lax.scan(lambda x, w: (jax.nn.gelu(layer(x, w)), None), x, p)[0]


def unrolled(p, x):
    for i in range(3):
        x = jax.nn.gelu(layer(x, jax.tree.map(lambda a, i=i: a[i], p)))
    return x


def test_every_layer_of_a_scan_has_scales_of_its_own():
    """A shift keeps the norm's factor from taking the scales."""
    by = jnp.stack([outliers(20, seed=i) for i in range(3)])
    fn = lambda p, x: scanned({"by": by, "w": p["w"]}, x)  # noqa: E731
    apart = lambda p, x: unrolled({"by": by, "w": p["w"]}, x)  # noqa: E731
    params, x = {"w": normal(3, 20, 20) / by[..., None]}, normal(31, 20, seed=4)
    results = [run(f, params, (x,), qjax.smoothquant(unfoldable="scale")) for f in (fn, apart)]
    one, other = (result.params["w"] for result in results)
    assert one.input_scale.shape == (3, 1, 20)
    np.testing.assert_allclose(one.input_scale, other.input_scale, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(qjax.quantized(fn))({"w": one}, x), jax.jit(qjax.quantized(apart))({"w": one}, x), atol=1e-4)
    assert error(fn, params, results[0], (x,)) < 0.5 * error(fn, params, run(fn, params, (x,)), (x,))


def experts(p, x):
    return jnp.einsum("ecd,edh->ech", jnp.tanh(x) * BY[:, None], p["w"])


def ragged(p, x, sizes):
    return lax.ragged_dot(jnp.tanh(x) * jnp.repeat(BY, sizes, axis=0, total_repeat_length=30), p["w"], sizes)


def heads(p, x):
    return jnp.einsum("bthd,hdm->btm", jnp.tanh(x) * BY[0].reshape(2, 6), p["w"])


BY = jnp.stack([outliers(12, seed=i) for i in (2, 5, 8)])
FORMS = {
    "experts": (experts, {"w": normal(3, 12, 7) / BY[..., None]}, (normal(3, 20, 12, seed=2),), (3, 1, 12)),
    "ragged": (ragged, {"w": normal(3, 12, 7) / BY[..., None]}, (normal(30, 12, seed=2), jnp.asarray([11, 6, 13])), (3, 1, 12)),
    "heads": (heads, {"w": normal(2, 6, 7) / BY[0].reshape(2, 6, 1)}, (normal(2, 9, 2, 6, seed=2),), (1, 12)),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_experts_and_heads(form):
    fn, params, inputs, shape = FORMS[form]
    result = run(fn, params, inputs, SMOOTH)
    assert result.params["w"].input_scale.shape == shape
    # An error of the mean expert would hide that of the one without outliers, whose range is its own.
    assert error(fn, params, result, inputs) < 0.5 * error(fn, params, run(fn, params, inputs), inputs)
    text = jax.jit(qjax.quantized(fn)).lower(result.params, *inputs).as_text()
    assert INTEGER.search(text) and not FLOAT.search(text)


METHODS = [qjax.awq(clip=False, unfoldable="scale"), qjax.awq(unfoldable="scale"),
           qjax.awq(then=qjax.gptq(act_order=True), unfoldable="scale")]  # fmt: skip


@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])], ids=lambda m: m.name)
def test_weights_alone_with_awq(method):
    """The float product needs no division: `dequantize` gives w. With act-order the scale is in the order of the columns all the same."""
    x, w = jnp.tanh(normal(200, 32, seed=4)) * outliers(32, 20.0), normal(32, 6)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    spec = qjax.int3(group_size=8)
    rounded, result = (run(fn, {"w": w}, (x,), m, weight=spec) for m in (None, method))
    q = result.params["w"]
    assert (q.perm is not None) == ("gptq" in method.name) and q.input_scale is not None and q.dtype == w.dtype
    assert error(fn, {"w": w}, result, (x,)) < 0.9 * error(fn, {"w": w}, rounded, (x,))
    where = jnp.argsort(q.perm, axis=-1) if q.perm is not None else jnp.arange(32)[None]
    stored = np.asarray(q.codes_unpacked(), np.float32) * np.repeat(np.asarray(q.scale), 8, axis=-1)
    np.testing.assert_array_equal(q.dequantize(), (np.take_along_axis(stored, np.asarray(where), axis=-1) / np.asarray(q.input_scale)).T)


def test_act_order_and_an_integer_product():
    x, w = normal(40, 32, seed=4) * outliers(32, 20.0), normal(32, 6)
    rng = np.random.default_rng(0)
    perm, s = rng.permutation(32), np.asarray(outliers(32, 20.0))
    whole = quantize(w * s[:, None], qjax.uint8(), (-2,))
    codes, spec = whole.codes_unpacked()[:, perm], whole.spec
    q = assemble(codes, whole.scale, whole.zero_point, spec, (-2,), (32,), w.dtype, perm[None], input_scale=s[None])
    np.testing.assert_allclose(q.dequantize(), whole.dequantize() / s[:, None], rtol=1e-6)
    q = dataclasses.replace(q, act=qjax.dynamic(qjax.int8()))
    fn = lambda p, x: x @ p  # noqa: E731
    np.testing.assert_allclose(
        jax.jit(qjax.quantized(fn))(q, x),
        jax.jit(qjax.quantized(fn))(dataclasses.replace(whole, act=qjax.dynamic(qjax.int8())), x / s), rtol=1e-5, atol=1e-4,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("conv", "loop_index", "layers_apart", "grouped_attention_bf16", "interleaved")], ids=str
)
def test_every_program(case):
    """Divided or refused by name, the model runs as well as it does without."""
    result = run(case.fn, case.params, case.inputs, qjax.awq(grid=4, clip=False, unfoldable="scale"), weight=qjax.int8(),
                 activation=qjax.dynamic(qjax.int8()))  # fmt: skip
    got, want = jax.jit(qjax.quantized(case.fn))(result.params, *case.inputs), case.fn(case.params, *case.inputs)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(g - w) <= 0.05 * np.linalg.norm(w)
    packed = {row.path: row for row in result.report.rows if row.spec}
    for row in packed.values():
        assert any(text in note for note in row.notes for text in ("rescaled", "divided at run time", "without rescaling", "rounded, not"))


def divided(w, seed=0, spec=None, **how):
    s = jnp.exp(normal(w.shape[-2], seed=seed))
    q = quantize(w * s[:, None], spec or qjax.int8(), (-2,), **how)
    lead = (w.shape[0],) if w.ndim == 3 else ()
    return dataclasses.replace(q, input_scale=jnp.broadcast_to(s, (*lead, 1, s.shape[0])))


def test_shards_loops_vmap_and_lookups_divide_their_own_part(tmp_path):
    params = {"columns": divided(normal(8, 16)), "rows": divided(normal(16, 6, seed=1))}
    floats = jax.tree.map(QTensor.dequantize, params, is_leaf=lambda q: isinstance(q, QTensor))
    x = normal(5, 8, seed=100)
    np.testing.assert_allclose(jax.jit(qjax.quantized(sharded))(params, x), sharded(floats, x), rtol=1e-5, atol=1e-5)
    stack = divided(normal(3, 8, 8), stacked=(-3,))
    want = jax.vmap(lambda q: q.dequantize())(stack)
    np.testing.assert_array_equal(want, stack.dequantize())
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]  # noqa: E731
    np.testing.assert_allclose(jax.jit(qjax.quantized(fn))(stack, x), fn(stack.dequantize(), x), rtol=1e-5, atol=1e-5)
    table = dataclasses.replace(quantize(normal(9, 4), qjax.int4(), (-1,)), input_scale=jnp.exp(normal(1, 4)))
    look = lambda p, i: p[i]  # noqa: E731
    np.testing.assert_array_equal(jax.jit(qjax.quantized(look))(table, jnp.asarray([3, 8, 3])), table.dequantize()[jnp.asarray([3, 8, 3])])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d", None))
    qjax.save(tmp_path / "ckpt", {"w": params["rows"]})
    loaded = qjax.load(tmp_path / "ckpt", sharding=lambda path, shape: place).params["w"]
    assert loaded.input_scale.sharding.spec == jax.sharding.PartitionSpec(None, "d")
    np.testing.assert_array_equal(loaded.dequantize(), floats["rows"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: qjax.smoothquant(unfoldable="fold"), "`unfoldable` must be 'leave' or 'scale', got 'fold'"),
        (lambda: qjax.awq(unfoldable=None), "`unfoldable` must be 'leave' or 'scale'"),
        (lambda: assemble(np.int8([[1, 2]]), np.ones((1, 1)), None, qjax.int8(), (-2,), (2,), "float32", input_scale=[[1.0, 0.0]]),
         "`input_scale` of `w` must be positive"),
        (lambda: assemble(np.int8([[1, 2]]), np.ones((1, 1)), None, qjax.int8(), (-2,), (2,), "float32", input_scale=[[1.0]]),
         r"`input_scale` of `w` must have the shape \(1, 2\)"),
    ],
)  # fmt: skip
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
