"""Double quantization against bitsandbytes, and scales that are bytes."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import assemble, fp4, nf4, quantize, with_plain_scales
from qjax.core.dynamic_map import DYNAMIC
from qjax.core.scales import nest, unnest

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "bitsandbytes.npz")


def test_the_dynamic_map_is_bitsandbytes_to_the_bit():
    np.testing.assert_array_equal(np.float32(DYNAMIC.levels), GOLDEN["nf4_double_code2"])


def padded_absmax(kind):
    """The golden scales are those of a stack that is longer than `x`."""
    return GOLDEN[f"{kind}_absmax"]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_scales_are_those_of_bitsandbytes_within_one_code(kind):
    codes, statistic, offset = nest(jnp.asarray(padded_absmax(kind))[None], ())
    np.testing.assert_allclose(offset.reshape(()), GOLDEN[f"{kind}_double_offset"], rtol=1e-6)
    np.testing.assert_allclose(statistic.reshape(-1), GOLDEN[f"{kind}_double_absmax2"], rtol=1e-5)
    away = np.abs(np.int64(codes[0]) - np.int64(GOLDEN[f"{kind}_double_absmax"]))
    assert away.max() <= 1 and np.mean(away != 0) < 0.01


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantized_codes_are_those_of_bitsandbytes(kind):
    x = GOLDEN["x"]
    spec = {"nf4": nf4, "fp4": fp4}[kind](double_quant=True)
    q = quantize(jnp.asarray(x), spec, axes=(-1,))
    golden = GOLDEN[f"{kind}_double_codes"].reshape(-1)
    codes = np.stack([golden >> 4, golden & 15], axis=-1).reshape(-1)[: x.size].reshape(x.shape)
    np.testing.assert_array_equal(q.codes_unpacked(), codes)
    assert q.scale.dtype == jnp.uint8 and q.nested_scale.dtype == q.nested_offset.dtype == jnp.float32


def test_dequantizing_is_code_times_statistic_plus_offset():
    """Of bitsandbytes' own bytes: its absmax within float32's rounding."""
    codes = jnp.asarray(GOLDEN["nf4_double_absmax"])[None]
    statistic, offset = jnp.asarray(GOLDEN["nf4_double_absmax2"])[None], jnp.asarray(GOLDEN["nf4_double_offset"]).reshape(1, 1)
    level = np.float64(GOLDEN["nf4_double_code2"])[GOLDEN["nf4_double_absmax"]]
    wanted = level * np.repeat(np.float64(statistic), 256) + np.float64(offset[0])
    np.testing.assert_allclose(unnest(codes, statistic, offset)[0], wanted, rtol=2e-7, atol=1e-6)


def test_bits_a_weight():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((512, 512)), jnp.float32)
    q = quantize(w, nf4(64, double_quant=True), (-2,))
    assert q.nbytes == w.size // 2 + w.size // 64 + 4 * (w.size // 64 // 256) + 4
    assert round(q.bits_per_weight, 3) == 4.127


@pytest.mark.parametrize(("spec", "wanted"), [(nf4(double_quant=True), 0.072798), (fp4(double_quant=True), 0.096543)], ids=str)
def test_mean_absolute_error_on_a_normal_distribution(spec, wanted):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 2048)), jnp.float32)
    error = jnp.mean(jnp.abs(quantize(x, spec, axes=(-1,)).dequantize() - x))
    assert abs(float(error) - wanted) < 7.4e-5 * 2  # half of the room is for the nesting


def test_every_stacked_part_nests_on_its_own():
    w = jnp.asarray(np.random.default_rng(1).standard_normal((2, 64, 3, 40)), jnp.float32) * jnp.float32([1, 100]).reshape(2, 1, 1, 1)
    spec = nf4(16, double_quant=True)
    whole = quantize(w, spec, (1,), stacked=(0, 2))
    assert whole.nested_scale.shape == (2, 3, 1, 1) and whole.nested_offset.shape == (2, 3, 1, 1)
    for i in range(2):
        for j in range(3):
            part = quantize(w[i, :, j], spec, (0,))
            np.testing.assert_array_equal(whole.scale[i, j], part.scale)
            np.testing.assert_array_equal(whole.dequantize()[i, :, j], part.dequantize())


EVERY_WAY = [nf4(16, double_quant=True), qjax.nvfp4(), qjax.mxfp4(), qjax.ternary(), qjax.binary(group_size=8)]


@pytest.mark.parametrize("spec", EVERY_WAY, ids=str)
def test_assembled_from_codes_and_float_scales(spec):
    w = jnp.asarray(np.random.default_rng(2).standard_normal((2, 32, 5)), jnp.float32)
    q = quantize(w, spec, (-2,), stacked=(0,))
    before = q if q.nested_offset is None else quantize(w, nf4(16), (-2,), stacked=(0,))
    again = assemble(q.codes_unpacked(), before.scales(), None, spec, q.axes, q.sizes, q.dtype, stacked=(0,))
    for name in ("codes", "scale", "nested_scale", "nested_offset"):
        np.testing.assert_array_equal(getattr(again, name), getattr(q, name))
    bytes_too = assemble(q.codes_unpacked(), q.scale, None, spec, q.axes, q.sizes, q.dtype, stacked=(0,),
                         nested_scale=q.nested_scale, nested_offset=q.nested_offset)  # fmt: skip
    np.testing.assert_array_equal(bytes_too.dequantize(), q.dequantize())


def test_assemble_names_what_does_not_fit():
    q = quantize(jnp.ones((32, 4)), qjax.nvfp4(), (0,))
    with pytest.raises(ValueError, match="`nested_scale` and `nested_offset` of `w` must be given and None for nvfp4"):
        assemble(q.codes_unpacked(), q.scale, None, q.spec, q.axes, q.sizes, q.dtype)
    with pytest.raises(ValueError, match="`scale` of `w` must hold e8m0 numbers"):
        assemble(jnp.zeros((4, 32), jnp.uint8), jnp.full((4, 1), 3.0), None, qjax.mxfp4(), (-2,), (32,), jnp.float32)
    with pytest.raises(ValueError, match="`nested_scale` of `w` must have the shape"):
        assemble(q.codes_unpacked(), q.scale, None, q.spec, q.axes, q.sizes, q.dtype, nested_scale=jnp.ones((4, 1)))
    fp8 = qjax.fp8_e4m3()
    with pytest.raises(ValueError, match=r"must lie in 0 \.\. 126, got 0 \.\. 127"):
        assemble(jnp.full((4, 32), 255, jnp.uint8).at[0].set(0), jnp.ones((4, 1)), None, fp8, (-2,), (32,), jnp.float32)


@pytest.mark.parametrize("spec", [nf4(16, double_quant=True), qjax.nvfp4()], ids=str)
def test_plain_scales_stand_for_the_same_numbers(spec):
    q = quantize(jnp.asarray(np.random.default_rng(3).standard_normal((32, 5)), jnp.float32), spec, (-2,))
    plain = with_plain_scales(q)
    assert plain.scale.dtype == jnp.float32 and plain.nested_scale is None and plain.codes is q.codes
    np.testing.assert_array_equal(plain.dequantize(), q.dequantize())
