"""HQQ against the package hqq and a float64 transcription; floating zero points through packing, files and products."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import block_params, round_activation
from qjax.ptq.hqq import Splitting, trajectory
from qjax.ptq.method import Problem

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "hqq.npz")
FLOAT = qjax.uint3(group_size=16, zero_dtype="float32")


def weight(*shape, seed=0, scale=0.05):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def solved(w, spec, method=None, **how):
    return (method or qjax.hqq()).quantize(Problem(w, spec, (-2,), how.pop("stacked", ()), 1, "mlp/w")).q


def published(x, bits, steps=20, p=0.7, beta=10.0, kappa=1.01):
    """hqq's loop over groups x (n, group) in float64, without its early stop: zero points before and errors of each step."""
    x = np.float64(x)
    lo, hi = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale = (2**bits - 1) / (hi - lo)
    zero, zeros, errors = -lo * scale, [], []
    for _ in range(steps + 1):
        codes = np.clip(np.rint(x * scale + zero), 0, 2**bits - 1)
        rounded = (codes - zero) / scale
        zeros.append(zero)
        errors.append(np.abs(x - rounded).mean(1, keepdims=True))
        e = np.abs(x - rounded)
        e = np.sign(x - rounded) * np.maximum(e - np.power(e, p - 1, where=e > 0, out=np.full_like(e, np.inf)) / beta, 0)
        zero = np.mean(codes - (x - e) * scale, axis=1, keepdims=True)
        beta *= kappa
    return np.stack(zeros), np.stack(errors)


@pytest.mark.parametrize("name", ["narrow", "wide"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_steps_are_those_of_hqq(name, bits):
    x, spec = jnp.asarray(GOLDEN[name]), qjax.integer(bits, signed=False, zero_dtype="float32")
    scale, start = block_params(x, spec)
    zeros, errors = (np.asarray(a) for a in trajectory(x, scale, start, spec, Splitting(kappa=1.0)))  # 0.2.8 has kappa, and uses it nowhere
    want = GOLDEN[f"{name}/{bits}/errors"]
    np.testing.assert_allclose(errors.mean((1, 2))[:20], want, rtol=1e-4)
    # theirs stops all groups after the first step whose mean error is no less than the best before, and keeps that step's zero points
    worse = np.flatnonzero(want >= np.minimum.accumulate(np.concatenate([[np.inf], want[:-1]])))
    last = worse[0] + 1 if worse.size else 20
    np.testing.assert_allclose(scale, GOLDEN[f"{name}/{bits}/scale"], rtol=1e-6)
    # A value on the edge between two codes may go either way, and moves its group's mean by a code's share of it.
    off = np.abs(zeros[last] - GOLDEN[f"{name}/{bits}/zero"])
    assert np.mean(off < 1e-4) > 0.95 and off.max() < 0.1
    codes = np.clip(np.rint(np.asarray(x) / np.asarray(scale) + zeros[last]), spec.qmin, spec.qmax)
    assert np.mean(codes == GOLDEN[f"{name}/{bits}/codes"]) > 0.998


def test_the_steps_are_those_of_the_formula_in_float64():
    x, spec = jnp.asarray(GOLDEN["wide"]), qjax.uint3(zero_dtype="float32")
    scale, start = block_params(x, spec)
    got, want = trajectory(x, scale, start, spec, Splitting()), published(GOLDEN["wide"], 3)
    for a, b in zip(got, want, strict=True):
        assert np.mean(np.abs(np.asarray(a) - b) < 1e-4) > 0.98


@pytest.mark.parametrize("dtype", ["float16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "bfloat16"))])
def test_each_group_keeps_its_best_and_is_packed_as_the_spec_says(dtype):
    w, spec = weight(64, 10), qjax.uint3(group_size=16, zero_dtype=dtype, scale_dtype="float16")
    q, rounded = solved(w, spec), solved(w, spec, qjax.rtn())
    errors = [np.abs(np.asarray(a.dequantize() - w)).reshape(4, 16, 10).mean(1) for a in (q, rounded)]
    assert np.all(errors[0] <= errors[1] * (1 + 1e-6)) and errors[0].mean() < 0.97 * errors[1].mean()
    assert (q.zero_point.dtype, q.zero_point.shape) == (jnp.dtype(dtype), (10, 4))
    assert q.nbytes == 10 * (64 * 3 // 8 + 4 * (2 + jnp.dtype(dtype).itemsize))
    want = (np.float64(q.codes_unpacked()).reshape(10, 4, 16) - np.float64(q.zero_point)[..., None]) * np.float64(q.scale)[..., None]
    np.testing.assert_allclose(q.dequantize(), want.reshape(10, 64).T, rtol=1e-6, atol=1e-7)
    assert np.array_equal(jax.jit(lambda q: q.dequantize())(q), q.dequantize())


def test_integer_zero_points_are_rounded_at_every_step():
    w, spec = weight(64, 10, scale=3.0), qjax.uint2(group_size=16)
    q, rounded = solved(w, spec), solved(w, spec, qjax.rtn())
    assert q.zero_point.dtype == jnp.uint8
    errors = [np.abs(np.asarray(a.dequantize() - w)).reshape(4, 16, 10).mean(1) for a in (q, rounded)]
    assert np.all(errors[0] <= errors[1] * (1 + 1e-6))
    assert not np.asarray(solved(w.at[:, 2].set(0.0), spec).dequantize()[:, 2]).any()


@pytest.mark.parametrize("spec", [qjax.int4(), qjax.nf4()], ids=str)
def test_what_has_no_zero_point_is_refused_with_the_alternatives(spec):
    with pytest.raises(ValueError, match=r"hqq chooses zero points.*'mlp/w'.*qjax\.uint4\(.*zero_dtype=.*rtn\(mse=True\)"):
        qjax.hqq().shapes(Problem(jax.ShapeDtypeStruct((64, 8), jnp.float32), spec, (-2,), (), 1, "mlp/w"))


@pytest.mark.parametrize(("options", "message"), [
    ({"lp_norm": 1.5}, "`lp_norm` must be a positive number up to 1, got 1.5"),
    ({"beta": 0.0}, "`beta` must be a positive"), ({"iterations": 0}, "`iterations` must be an int of at least 1"),
])  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        qjax.hqq(**options)


def test_a_floating_zero_point_needs_an_asymmetric_spec_of_a_weight():
    with pytest.raises(ValueError, match=r"`zero_dtype`=\"float16\" needs a zero point: give symmetric=False"):
        qjax.int4(zero_dtype="float16")
    with pytest.raises(ValueError, match="`zero_dtype` must be one of 'int', 'float32'"):
        qjax.uint4(zero_dtype="float64")
    with pytest.raises(ValueError, match="`spec` of activations must have integer zero points"):
        qjax.dynamic(qjax.uint8(zero_dtype="float32"))
    assert str(qjax.uint4(zero_dtype="bfloat16")) == 'uint4(per="channel", zero_dtype="bfloat16")'


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def test_in_a_scan_saved_and_loaded_it_is_the_same(tmp_path):
    params, x = {"w": weight(3, 32, 32, scale=0.3)}, weight(4, 32, seed=2, scale=1.0)
    rule = qjax.Rule("*", weight=qjax.uint3(group_size=16, zero_dtype="float16"), method=qjax.hqq())
    result = qjax.quantize(scanned, params, qjax.Policy([rule]), calibration=[jax.ShapeDtypeStruct(x.shape, x.dtype)])
    want = scanned({"w": result.params["w"].dequantize()}, x)
    np.testing.assert_allclose(jax.jit(qjax.quantized(scanned))(result.params, x), want, rtol=1e-5, atol=1e-6)
    assert result.report.rows[0].method == "hqq"
    qjax.save(tmp_path / "ckpt", result)
    loaded = qjax.load(tmp_path / "ckpt")
    assert loaded.policy == result.policy and loaded.params["w"].zero_point.dtype == jnp.float16
    assert np.array_equal(loaded.params["w"].dequantize(), result.params["w"].dequantize())


@pytest.mark.parametrize("activation", [qjax.dynamic(qjax.int8()), qjax.dynamic(qjax.integer(8, symmetric=False))], ids=str)
@pytest.mark.parametrize("spec", [FLOAT, qjax.uint8(zero_dtype="float32")], ids=str)
def test_integer_products_correct_for_the_floating_zero_point(spec, activation):
    x, params = weight(7, 48, seed=3, scale=1.0) + 0.5, {"w": weight(48, 5) + 0.02}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    rule = qjax.Rule("*", weight=spec, method=qjax.hqq(), activation=activation)
    result = qjax.quantize(fn, params, qjax.Policy([rule]), calibration=[x])
    rounded = np.float64(round_activation(x, activation, (1,)))
    got = jax.jit(qjax.quantized(fn))(result.params, x)
    np.testing.assert_allclose(got, rounded @ np.float64(result.params["w"].dequantize()), rtol=2e-5, atol=2e-5)
    assert [row.kernel for row in result.report.rows] == ["xla int8"]
    assert "i32" in jax.jit(qjax.quantized(fn)).lower(result.params, x).as_text()


@pytest.mark.parametrize("spec", [FLOAT, qjax.uint8(zero_dtype="float32")], ids=str)
def test_outlier_columns_correct_for_it_too(spec):
    x, params = weight(6, 48, seed=3, scale=1.0).at[:, 5].set(20.3), {"w": weight(48, 5) + 0.02}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    rule = qjax.Rule("*", weight=spec, method=qjax.llm_int8(capacity=4))
    result = qjax.quantize(fn, params, qjax.Policy([rule]), calibration=[x])
    want = x @ result.params["w"].dequantize()
    np.testing.assert_allclose(jax.jit(qjax.quantized(fn))(result.params, x), want, atol=0.02)


@pytest.mark.parametrize("method", [qjax.rtn(mse=True), qjax.gptq(), qjax.awq()], ids=lambda m: m.name)
@pytest.mark.slow
def test_other_methods_take_floating_zero_points(method):
    params, x = {"w": weight(48, 6) + 0.02}, weight(64, 48, seed=2, scale=1.0)
    rule = qjax.Rule("*", weight=FLOAT, method=method)
    result = qjax.quantize(lambda p, x: x @ p["w"], params, qjax.Policy([rule]), calibration=[x])
    assert result.params["w"].zero_point.dtype == jnp.float32
    assert 0 < result.report.rows[0].error < 0.05
