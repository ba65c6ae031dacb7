"""Small floats against ml_dtypes' casts, and scales against the formats' own rules in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.core import float_scale, quantize
from qjax.core.elements import MINIFLOATS, decode_minifloat, encode_minifloat

CASTS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
every_element = pytest.mark.parametrize("element", CASTS)


def cast(x, element):
    """ml_dtypes' codes and values, saturating."""
    most = float(ml_dtypes.finfo(CASTS[element]).max)
    small = np.clip(np.asarray(x, np.float32), -most, most).astype(CASTS[element])
    return small.view(np.uint8), small.astype(np.float32)


@every_element
def test_every_code_stands_for_what_ml_dtypes_says(element):
    e = MINIFLOATS[element]
    codes = np.arange(2**e.bits, dtype=np.uint8)
    wanted = codes.view(CASTS[element]).astype(np.float32)
    got = np.asarray(decode_minifloat(jnp.asarray(codes), e))
    np.testing.assert_array_equal(got[np.isfinite(wanted)].view(np.uint32), wanted[np.isfinite(wanted)].view(np.uint32))
    assert np.isnan(got[~np.isfinite(wanted)]).all()
    assert codes[np.isfinite(wanted)].max() & (2 ** (e.bits - 1) - 1) == e.largest_code
    assert e.largest == wanted[np.isfinite(wanted)].max() and e.smallest == wanted[1]


@every_element
def test_rounding_is_that_of_ml_dtypes(element):
    """Random numbers over all magnitudes, every tie, its neighbours, zeros with a sign, and what saturates."""
    e = MINIFLOATS[element]
    numbers = np.unique(cast(np.zeros(1), element)[1])
    values = np.sort(np.arange(e.largest_code + 1, dtype=np.uint8).view(CASTS[element]).astype(np.float32))
    ties = (values[1:] + values[:-1]) / 2
    near = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9)), values])
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(20_000).astype(np.float32) * np.exp2(rng.integers(-30, 30, 20_000)).astype(np.float32)
    extreme = np.float32([0.0, 3.4e38, 1.2e-38, e.largest, e.smallest / 2, e.largest * 1.04, e.largest * 2])
    x = np.concatenate([near, wide, extreme, numbers])
    x = np.concatenate([x, -x])
    wanted, _ = cast(x, element)
    np.testing.assert_array_equal(encode_minifloat(jnp.asarray(x), e), wanted)
    np.testing.assert_array_equal(jax.jit(encode_minifloat, static_argnums=1)(x, e), wanted)


def mx_by_hand(w, element, exponent_rule):
    """OCP MX v1.0, section 6.3, in float64, on blocks (blocks, 32): exponents and what the codes stand for."""
    emax = 0 if element == "int8" else int(np.floor(np.log2(float(ml_dtypes.finfo(CASTS[element]).max))))
    mantissa = 6 if element == "int8" else ml_dtypes.finfo(CASTS[element]).nmant
    amax = np.abs(w).max(1, keepdims=True).astype(np.float64)
    fraction, exponent = np.frexp(amax)
    shared = exponent - 1
    if exponent_rule == "round":
        shared = shared + (2 * fraction >= 2 - 2.0 ** -(mantissa + 1))
    shared = np.clip(shared - emax, -126, 127 - emax)
    scaled = np.float64(w) / 2.0**shared
    if element == "int8":
        return shared, np.clip(np.round(scaled * 64), -127, 127) / 64 * 2.0**shared
    return shared, np.float64(cast(scaled, element)[1]) * 2.0**shared


MX = [qjax.mxfp4, qjax.mxfp8, lambda **k: qjax.mxfp8("e5m2", **k), qjax.mxfp6, lambda **k: qjax.mxfp6("e3m2", **k), qjax.mxint8]


@pytest.mark.parametrize("exponent_rule", ["floor", "round"])
@pytest.mark.parametrize("make", MX, ids=lambda make: str(make()))
def test_mx_exponents_and_values(make, exponent_rule):
    spec = make(exponent_rule=exponent_rule)
    rng = np.random.default_rng(1)
    w = rng.standard_normal((64, 32)).astype(np.float32) * np.exp2(rng.integers(-100, 100, (64, 1))).astype(np.float32)
    near_edges = [(3, 1), (0, 1.75), (0, 1.7499999), (-5, 1.9999999), (2, 1.875), (1, 1.9375), (7, 1.5), (4, 1.99)]
    w[:8] = [[2.0**i * m] + [0.3] * 31 for i, m in near_edges]
    w[8], w[9], w[10] = 0.0, 3.4e38, 1.2e-38
    w[11, 3:] = 0.0
    q = quantize(jnp.asarray(w), spec, (-1,))
    exponent, value = mx_by_hand(w, spec.element, exponent_rule)
    exponent[8] = -126
    np.testing.assert_array_equal(np.int64(q.scale) - 127, exponent)
    np.testing.assert_array_equal(q.dequantize(), value)
    assert q.scale.dtype == jnp.uint8 and q.codes.nbytes == w.size * spec.bits // 8
    assert q.bits_per_weight == spec.bits + 8 / 32


def test_nvfp4_scales_codes_and_bytes():
    """compressed-tensors' rule in NumPy: g = 448 * 6 / absmax, e4m3(absmax of the block / 6 * g), E2M1 with ties to even."""
    rng = np.random.default_rng(2)
    w = (rng.standard_normal((48, 64)) * np.exp2(rng.integers(-3, 3, (48, 1)))).astype(np.float32)
    w[3, :16] = 0.0
    q = quantize(jnp.asarray(w), qjax.nvfp4(), (-1,))
    f = np.float32
    g = f(448 * 6) / np.abs(w).max()
    blocks = w.reshape(48, 4, 16)
    stored, scale = cast(np.abs(blocks).max(2) / f(6) * g, "e4m3")
    wanted = np.where(np.abs(blocks).max(2) == 0, 1, stored)
    np.testing.assert_array_equal(q.scale, wanted)
    assert q.nested_scale.shape == (1, 1) and q.nested_scale.item() == g
    scale = np.where(scale == 0, f(2**-9), scale) / g
    codes, value = cast(blocks / scale[..., None], "e2m1")
    np.testing.assert_array_equal(q.codes_unpacked(), codes.reshape(w.shape))
    np.testing.assert_array_equal(q.dequantize(), (value * scale[..., None]).reshape(w.shape))
    assert q.nbytes == w.size // 2 + w.size // 16 + 4


@pytest.mark.parametrize("make", [qjax.fp8_e4m3, qjax.fp8_e5m2])
@pytest.mark.parametrize("granularity", [{"per": "tensor"}, {"per": "channel"}, {"group_size": 128}, {"block": (4, 128)}], ids=str)
def test_fp8_is_absmax_to_the_largest_number(make, granularity):
    w = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)
    spec = make(**granularity)
    q = quantize(jnp.asarray(w), spec, (-1,))
    shape = {"tensor": (1, 8, 1, 256), "channel": (8, 1, 1, 256)}.get(granularity.get("per"))
    shape = shape or ((8, 1, 2, 128) if "group_size" in granularity else (2, 4, 2, 128))
    blocks = w.reshape(shape)
    scale = np.abs(blocks).max((1, 3), keepdims=True) / np.float32(spec.largest)
    codes, value = cast(blocks / scale, spec.element)
    np.testing.assert_array_equal(q.codes, codes.reshape(w.shape))
    np.testing.assert_array_equal(q.dequantize(), (value * scale).reshape(w.shape))
    assert q.codes.dtype == jnp.uint8 and q.nbytes == w.size + 4 * scale.size


def test_stacked_tensors_have_global_scales_of_their_own():
    w = jnp.stack([jnp.ones((16, 3)), jnp.full((16, 3), 1e-3)])
    q = quantize(w, qjax.nvfp4(), (-2,), stacked=(0,))
    assert q.nested_scale.shape == (2, 1, 1)
    np.testing.assert_allclose(q.dequantize(), w, rtol=1e-6)


def test_the_extremes_of_float32():
    w = jnp.float32([3.4028235e38, 1e-38, 0.0] * 16).reshape(1, 48)
    for spec in (qjax.nvfp4(), qjax.mxfp8(pad=True), qjax.fp8_e4m3(), qjax.floating("e2m1", scale_dtype="e4m3")):
        for x in (w, w * 1e-38, jnp.zeros_like(w)):
            back = quantize(x, spec, (-1,)).dequantize()
            assert jnp.isfinite(back).all()
            np.testing.assert_allclose(back, x, rtol=0.13, atol=float(x.max()) * 0.01)


def test_a_tensor_scale_that_is_missing_is_named():
    with pytest.raises(ValueError, match="`of_tensor` must be given for nvfp4"):
        float_scale(jnp.ones(3), qjax.nvfp4())
