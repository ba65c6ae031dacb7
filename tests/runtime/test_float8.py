"""FP8 activations: f8 x f8 -> float32 where weights are FP8 too, rounded in front of a float product elsewhere."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.core import round_activation

K, N = 64, 12
E4M3, E5M2 = qjax.fp8_e4m3, qjax.fp8_e5m2
CASTS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rounded(x, element, size):
    """float32 absmax scales of runs of the last axis, ml_dtypes' cast: what the codes stand for, in float64."""
    blocks = np.asarray(x).reshape(*x.shape[:-1], -1, size)
    most = np.float32(ml_dtypes.finfo(CASTS[element]).max)
    scale = np.abs(blocks).max(-1, keepdims=True) / most
    return (np.float64((blocks / scale).astype(CASTS[element])) * scale).reshape(x.shape)


def linear(p, x):
    return x @ p["w"]


def quantized(fn, params, weight, activation, x, **rule):
    policy = qjax.Policy([qjax.Rule("*", weight=weight, activation=activation, **rule)])
    result = qjax.quantize(fn, params, policy, calibration=[x])
    return jax.jit(qjax.quantized(fn)), result


@pytest.mark.parametrize(
    ("weight", "activation", "size"),
    [
        (E4M3(), qjax.dynamic(E4M3()), K),
        (E4M3(per="tensor"), qjax.dynamic(E5M2()), K),
        (E5M2(group_size=16), qjax.dynamic(E4M3()), K),
        (E4M3(block=(4, 16)), qjax.dynamic(E4M3(group_size=16)), 16),
        (E4M3(group_size=16, scale_dtype="bfloat16"), qjax.dynamic(E4M3(group_size=16)), 16),
    ],
    ids=str,
)
def test_the_product_runs_on_fp8_operands_and_float32_sums(weight, activation, size):
    x = normal(3, 5, K, seed=1)
    fn, result = quantized(linear, {"w": normal(K, N)}, weight, activation, x)
    text = fn.lower(result.params, x).as_text()
    (product,) = [line for line in text.splitlines() if "dot_general" in line and "f8E" in line][-1:]
    assert product.count("xf8E") == 2 and product.rstrip().endswith("f32>"), product
    assert not any("dot_general" in line and "f8E" not in line for line in text.splitlines())
    want = rounded(x, activation.spec.element, size) @ np.float64(result.params["w"].dequantize())
    np.testing.assert_allclose(fn(result.params, x), want, rtol=1e-5, atol=1e-4)
    assert [row.kernel for row in result.report.rows] == ["xla float8"]


def einsum(p, x):
    return jnp.einsum("bshd,hde->bse", x, p["w"])


def experts(p, x):
    return jax.lax.ragged_dot(x, p["w"], jnp.array([3, 0, 4], jnp.int32))


@pytest.mark.parametrize(("form", "shape"), [(linear, (K, N)), (experts, (3, K, N))], ids=["matmul", "experts"])
def test_one_scale_for_all_rows(form, shape):
    x = normal(7, K, seed=1) * jnp.float32([[1.0], [10.0], [100.0], [1.0], [1e-6], [1.0], [0.0]])
    fn, result = quantized(form, {"w": normal(*shape)}, E4M3(), qjax.dynamic(E4M3(), per="tensor"), x)
    want = jnp.float32(rounded(x.reshape(1, -1), "e4m3", 7 * K).reshape(7, K))
    assert not want[4].any() and [row.kernel for row in result.report.rows] == ["xla float8"]
    np.testing.assert_allclose(fn(result.params, x), form({"w": result.params["w"].dequantize()}, want), rtol=1e-5, atol=1e-3)


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


@pytest.mark.parametrize(
    ("fn", "w", "x"),
    [(einsum, (4, 16, N), (2, 3, 4, 16)), (experts, (3, K, N), (7, K)), (scanned, (2, K, K), (5, K))],
    ids=["heads", "experts", "layers"],
)
def test_other_forms_of_products(fn, w, x):
    w, x = normal(*w) / 8, normal(*x, seed=1)
    packed, result = quantized(fn, {"w": w}, E4M3(), qjax.dynamic(E4M3()), x)
    want = fn({"w": w}, x)
    assert [row.kernel for row in result.report.rows] == ["xla float8"]
    assert 0 < jnp.linalg.norm(packed(result.params, x) - want) < 0.06 * jnp.linalg.norm(want)


@pytest.mark.parametrize("weight", [qjax.mxfp4(), qjax.int4(), E4M3(), qjax.bf16()], ids=str)
def test_elsewhere_activations_are_rounded_and_the_report_says_so(weight):
    x = normal(5, K, seed=1)
    activation = qjax.dynamic(E4M3(group_size=16))
    fn, result = quantized(linear, {"w": normal(K, N)}, weight, activation, x)
    want = rounded(x, "e4m3", 16) @ np.float64(result.params["w"].dequantize())
    np.testing.assert_allclose(fn(result.params, x), want, rtol=1e-4, atol=1e-4)
    (row,) = result.report.rows
    assert row.kernel == "xla" and any("rounded in front of a float product" in note for note in row.notes)


def test_activations_of_every_format():
    """The last group is padded; a row knows nothing of the others, and is a tensor of its own for NVFP4."""
    x = normal(4, 40, seed=2)
    for spec in (qjax.mxfp4(), qjax.mxfp8(), qjax.mxint8(), qjax.floating("e2m1", group_size=16)):
        got = round_activation(x, qjax.dynamic(spec), (1,))
        padded = jnp.pad(x, ((0, 0), (0, -40 % spec.granularity.size)))
        np.testing.assert_array_equal(got, qjax.core.round_trip(padded, spec, (1,))[:, :40])
    nvfp4 = round_activation(x, qjax.dynamic(qjax.nvfp4()), (1,))
    want = qjax.core.round_trip(jnp.pad(x, ((0, 0), (0, 8))), qjax.nvfp4(), (1,), stacked=(0,))[:, :40]
    np.testing.assert_array_equal(nvfp4, want)
    halves = round_activation(x.reshape(4, 2, 20).transpose(1, 0, 2), qjax.dynamic(qjax.nvfp4()), (0, 2))
    np.testing.assert_array_equal(halves.transpose(1, 0, 2).reshape(4, 40), nvfp4)


EVERY = [
    qjax.int8(), qjax.uint8(), E4M3(), E5M2(), E4M3(group_size=16), E4M3(group_size=16, scale_dtype="bfloat16"), qjax.mxfp4(),
    qjax.mxfp4(exponent_rule="round"), qjax.mxfp6(), qjax.mxfp8(), qjax.mxint8(), qjax.nvfp4(), qjax.floating("e2m1", group_size=16),
]  # fmt: skip


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_a_row_is_the_same_beside_any_other_and_none_that_is_not_finite_becomes_numbers(spec):
    x, act = normal(4, 40, seed=2), qjax.dynamic(spec)
    want = round_activation(x, act, (1,))
    rows = jnp.concatenate([round_activation(row[None], act, (1,)) for row in x])
    np.testing.assert_array_equal(rows, want)
    for bad in (jnp.nan, -jnp.nan, jnp.inf, -jnp.inf, 1e30):
        got = round_activation(x.at[1, 3].set(bad), act, (1,))
        assert bool(jnp.all(jnp.isfinite(got[1]))) == (bad == 1e30)
        if spec not in (qjax.int8(), qjax.uint8()) and bad != 1e30:
            assert bool(jnp.all(jnp.isnan(got[1, :16])))  # the whole block, as OCP has it
        np.testing.assert_array_equal(got[np.array([0, 2, 3])], want[np.array([0, 2, 3])])


@pytest.mark.parametrize("spec", [qjax.int8(), E4M3(), E4M3(group_size=16), qjax.mxfp4(), qjax.nvfp4()], ids=str)
def test_a_product_keeps_what_is_not_finite_to_its_row(spec):
    x, weight = normal(4, K, seed=2), qjax.int8() if spec == qjax.int8() else E4M3(block=(4, 16))
    fn, result = quantized(linear, {"w": normal(K, N)}, weight, qjax.dynamic(spec), x)
    want = fn(result.params, x)
    for bad in (jnp.nan, jnp.inf):
        got = fn(result.params, x.at[1, 3].set(bad))
        assert not bool(jnp.any(jnp.isfinite(got[1])))
        np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(want, 1, 0))


@pytest.mark.parametrize("spec", [qjax.mxfp4(), qjax.mxint8(), qjax.nvfp4()], ids=str)
def test_a_packed_block_that_is_not_finite_stands_for_nan(spec):
    x = normal(2, 64, seed=2)
    pack = jax.jit(lambda x: qjax.core.quantize(x, spec, (1,), stacked=(0,)))  # inside jit there is no one to refuse it
    want, q = pack(x).dequantize(), pack(x.at[0, 3].set(jnp.inf))
    assert q.scale[0, 0] == {"e8m0": 255, "e4m3": 127}[spec.scale_dtype]
    assert bool(jnp.all(jnp.isnan(q.dequantize()[0, :16])))
    np.testing.assert_array_equal(q.dequantize()[1], want[1])


def test_training_rounds_like_the_packed_model_and_passes_gradients():
    w, x = normal(K, N), normal(3, K, seed=1)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.mxfp8(), activation=qjax.dynamic(qjax.mxfp8()))])
    fq, result = qjax.fake_quant(linear, policy), qjax.quantize(linear, {"w": w}, policy, calibration=[x])
    np.testing.assert_allclose(fq({"w": w}, x), qjax.quantized(linear)(result.params, x), rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda w: jnp.sum(fq({"w": w}, x)))(w)
    assert grad.shape == w.shape and bool(jnp.all(grad != 0))
    of_x = jax.grad(lambda x: jnp.sum(qjax.quantized(linear)(result.params, x)))(x)
    np.testing.assert_allclose(of_x, jnp.ones((3, N)) @ result.params["w"].dequantize().T, rtol=1e-5)


def test_a_saved_model_keeps_its_activations(tmp_path):
    x = normal(3, K)
    fn, result = quantized(linear, {"w": normal(K, N)}, E4M3(block=(4, 16)), qjax.dynamic(E4M3(group_size=16)), x)
    qjax.save(tmp_path, result)
    loaded = qjax.load(tmp_path)
    assert loaded.params["w"].act == result.params["w"].act and loaded.policy == result.policy
    np.testing.assert_array_equal(fn(loaded.params, x), fn(result.params, x))


def test_static_fp8_multiplies_by_the_scale_that_calibration_found(tmp_path):
    """One scale of all data, absmax / 448, in the weight; what lies beyond it is the largest number; two FP8 operands."""
    seen, x = normal(9, K, seed=1), 3 * normal(4, K, seed=2)
    fn, result = quantized(linear, {"w": normal(K, N)}, E4M3(), qjax.static(E4M3()), seen)
    scale = np.abs(np.float64(seen)).max() / 448
    np.testing.assert_allclose(result.params["w"].act_scale, [[scale]], rtol=1e-6)
    assert np.abs(x).max() > 448 * scale
    codes = np.clip(np.float32(x) / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    want = np.float64(codes) * scale @ np.float64(result.params["w"].dequantize())
    np.testing.assert_allclose(fn(result.params, x), want, rtol=1e-5, atol=1e-4)
    (product,) = [line for line in fn.lower(result.params, x).as_text().splitlines() if "dot_general" in line]
    assert product.count("xf8E") == 2 and [row.kernel for row in result.report.rows] == ["xla float8"]
    qjax.save(tmp_path, result)
    loaded = qjax.load(tmp_path)
    assert loaded.params["w"].act == result.params["w"].act and loaded.policy == result.policy
    np.testing.assert_array_equal(fn(loaded.params, x), fn(result.params, x))
    params = {"w": normal(K, N)}
    fq = qjax.fake_quant(linear, result.policy)  # trains on the same numbers; nothing comes back from beyond the range
    state = fq.calibrate(fq.init(jax.random.key(0), params, x), params, [seen])
    out, back = jax.vjp(lambda x: fq(params, x, quant=state), x)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(back(jnp.ones_like(out))[0] == 0, np.abs(x) > 448 * scale)


def test_products_of_two_activations_run_on_fp8(tmp_path):
    """Attention's two products: scores of e4m3 per row, values of static e5m2 probabilities; both on FP8 operands, float32 sums."""

    def attend(p, q, k, v):
        scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
        return {"scores": jnp.einsum("btd,bsd->bts", q, k), "out": jnp.einsum("bts,bsd->btd", scores, v)}

    q, k, v = normal(2, 5, 16), normal(2, 7, 16, seed=1), normal(2, 7, 16, seed=2)
    rules = [qjax.Rule("*:dot_general.0", activation=qjax.dynamic(E4M3())), qjax.Rule("*:dot_general.1", activation=qjax.dynamic(E4M3())),
             qjax.Rule("*:dot_general.2", activation=(qjax.static(E4M3()), qjax.static(E5M2())))]  # fmt: skip
    result = qjax.quantize(attend, {}, qjax.Policy(rules), calibration=[(q, k, v)])
    run = jax.jit(qjax.quantized(attend, sites=result.sites))
    np.testing.assert_allclose(
        run({}, q, k, v)["scores"], np.einsum("btd,bsd->bts", rounded(q, "e4m3", 16), rounded(k, "e4m3", 16)), rtol=1e-5, atol=1e-5
    )
    lines = [line for line in run.lower({}, q, k, v).as_text().splitlines() if "dot_general" in line]
    assert lines and all(line.count("xf8E") == 2 for line in lines)
    assert [row.kernel for row in result.report.rows] == ["xla float8"] * 3
    (name,) = [name for name in result.sites if result.sites[name].nbytes == 8]
    float_scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
    np.testing.assert_allclose(result.sites[name].operands[0].scale, float(float_scores.max()) / 448, rtol=0.2)
    qjax.save(tmp_path, result)
    again = jax.jit(qjax.quantized(attend, sites=qjax.load(tmp_path).sites))({}, q, k, v)
    np.testing.assert_array_equal(again["out"], run({}, q, k, v)["out"])


@pytest.mark.slow
def test_a_range_searched_for_fp8_is_measured_on_fp8():
    """Clipping does not help floats: their small numbers stay as exact however far the range goes. Integers it does."""
    x = normal(64, K, seed=1).at[0, 0].set(40.0)
    ranges = {}
    for name, spec in (("fp8", E4M3()), ("int4", qjax.int4())):
        weight = E4M3() if name == "fp8" else spec
        _, result = quantized(linear, {"w": normal(K, N)}, weight, qjax.static(spec, qjax.mse()), x)
        ranges[name] = float(result.params["w"].act_scale[0, 0])
    assert ranges["fp8"] * 448 > 20.0 > 10.0 > ranges["int4"] * 7.5


BAD = [
    (lambda: qjax.static(qjax.mxfp8()), TypeError, r"`spec` of static activations must be integers .* or FP8 .* take qjax.dynamic"),
    (lambda: qjax.static(E4M3(group_size=16)), ValueError, "`spec` of activations must have no groups"),
    (lambda: qjax.dynamic(E4M3(block=(4, 4))), ValueError, "`spec` of activations must have no groups"),
    (lambda: qjax.dynamic(qjax.mxfp4(), per="tensor"), ValueError, "`spec` of activations must have no groups"),
    (lambda: qjax.dynamic(qjax.ternary()), ValueError, "`spec` of activations must not be ternary"),
    (lambda: qjax.Rule("a:b", activation=qjax.dynamic(qjax.mxfp8())), ValueError, "multiply integers, or FP8 with a float scale"),
    (lambda: qjax.Rule("a:b", activation=(qjax.dynamic(E4M3()), qjax.dynamic(qjax.int8()))), ValueError, "FP8 .* on both sides"),
    (lambda: qjax.Rule("*", weight=qjax.mxfp4(), activation=qjax.dynamic(qjax.int8())), TypeError, "needs a `weight` spec of integers"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
