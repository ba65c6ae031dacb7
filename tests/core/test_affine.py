import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import (
    affine_decode,
    affine_encode,
    affine_params,
    divide,
    int4,
    int8,
    integer,
    params_from_range,
    uint4,
    uint8,
)


def numpy_quantize(x: np.ndarray, bits: int, signed: bool, symmetric: bool, rule: str):
    """The definition in float64, block by block, in plain Python: an independent oracle up to float32 rounding."""
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    qmin += rule == "full" and symmetric and signed
    if symmetric:
        scale, zero = np.abs(x).max() / (qmax + (0.5 if rule == "half" else 0)), 0
    else:
        lo, hi = min(x.min(), 0), max(x.max(), 0)
        scale = (hi - lo) / (2**bits - 1)
        zero = min(max(round(qmin - lo / scale), qmin), qmax)
    return [min(max(round(v / scale) + zero, qmin), qmax) for v in x], scale, zero


@pytest.mark.parametrize("rule", ["half", "full"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_against_the_definition(bits, signed, symmetric, rule):
    x = np.random.default_rng(bits).standard_normal((6, 33)).astype(np.float32)
    x = np.abs(x) if symmetric and not signed else x
    spec = integer(bits, signed=signed, symmetric=symmetric, scale_rule=rule)
    scale, zero_point = affine_params(jnp.asarray(x), spec)
    codes = affine_encode(jnp.asarray(x), scale, zero_point, spec)
    for row in range(6):
        wanted, wanted_scale, wanted_zero = numpy_quantize(np.float64(x[row]), bits, signed, symmetric, rule)
        assert scale[row, 0] == pytest.approx(wanted_scale, rel=3e-7)
        assert wanted_zero == (0 if zero_point is None else int(zero_point[row, 0]))
        np.testing.assert_array_equal(codes[row], wanted)
    assert codes.dtype == jnp.int32 and scale.dtype == jnp.float32


def test_divisors_of_the_formats():
    """compressed-tensors and GPTQ /7.5, AWQ /7, torchao int8 /127.5, bitsandbytes int8 /127."""
    x = jnp.float32([[-15.0, 3.0]])
    assert affine_params(x, int4())[0].item() == 2.0
    assert affine_params(jnp.float32([[-7.0, 3.0]]), int4(scale_rule="full"))[0].item() == 1.0
    assert affine_params(x * 8.5, int8())[0].item() == 1.0
    assert affine_params(jnp.float32([[127.0]]), int8(scale_rule="full"))[0].item() == 1.0
    assert affine_params(jnp.float32([[0.0, 3.5]]), integer(3))[0].item() == 1.0


def test_half_to_even_then_clip():
    x = jnp.float32([-99, -8.5, -7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 99])
    assert affine_encode(x, jnp.ones(1), None, int4()).tolist() == [-8, -8, -8, -2, -2, 0, 0, 2, 2, 6, 7, 7]
    assert affine_encode(x, jnp.ones(1), None, int4(scale_rule="full")).tolist()[:3] == [-7, -7, -7]


def test_symmetric_unsigned_clamps_negatives_and_ignores_them_for_the_scale():
    x = jnp.float32([[-100.0, 0.0, 15.5]])
    spec = integer(4, signed=False, symmetric=True)
    scale, zero_point = affine_params(x, spec)
    assert scale.item() == 1.0 and zero_point is None
    assert affine_encode(x, scale, None, spec).tolist() == [[0, 0, 15]]


def test_zero_is_exact_when_asymmetric():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 3, (50, 17)), jnp.float32).at[:, 3].set(0.0)
    for spec in (uint4(), uint8(), integer(3, symmetric=False)):
        scale, zero_point = affine_params(x, spec)
        assert not np.any(affine_decode(affine_encode(x, scale, zero_point, spec), scale, zero_point)[:, 3])


def test_all_positive_or_all_negative_ranges_include_zero():
    assert params_from_range(jnp.float32(3.0), jnp.float32(15.0), uint4())[0].item() == 1.0
    scale, zero_point = params_from_range(jnp.float32(-15.0), jnp.float32(-3.0), uint4())
    assert scale.item() == 1.0 and zero_point.item() == 15


@pytest.mark.parametrize("spec", [int4(), uint4(), int8(scale_dtype="float16"), int4(scale_dtype="bfloat16")], ids=str)
def test_tiny_blocks_become_exact_zeros(spec):
    x = jnp.float32([[0.0, 0.0], [1e-45, -1e-45], [1e-39, -3e-39], [1.1e-38, -1e-38]])
    scale, zero_point = affine_params(x, spec)
    assert scale.tolist() == [[1.0]] * 4
    assert not np.any(affine_decode(affine_encode(x, scale, zero_point, spec), scale, zero_point))


def test_scale_is_rounded_before_codes():
    """With a bfloat16 scale the codes are those of the rounded scale: no error is added to them."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)
    for dtype in ("bfloat16", "float16"):
        spec = int8(scale_dtype=dtype)
        scale, _ = affine_params(x, spec)
        np.testing.assert_array_equal(scale, scale.astype(dtype).astype(jnp.float32))
        inside = jnp.abs(x) <= 127.5 * scale
        error = jnp.abs(affine_decode(affine_encode(x, scale, None, spec), scale, None) - x)
        assert np.all(np.where(inside, error / scale, 0) <= 0.5 * (1 + 1e-5))


def test_large_range_does_not_overflow():
    scale, _ = params_from_range(jnp.float32(-3.4e38), jnp.float32(3.4e38), uint4())
    assert scale.item() == pytest.approx(6.8e38 / 15, rel=1e-6)


@pytest.mark.parametrize("spec", [int4(), uint4(), int8(), integer(4, symmetric=False)], ids=str)
@pytest.mark.parametrize("group", [1, 31])
def test_divisions_are_those_of_ieee_arithmetic(spec, group):
    """NumPy, float32, the same order of operations: every bit of scale, codes and value, in one compiled program."""
    x = np.random.default_rng(5).standard_normal((8192, group)).astype(np.float32)

    def both(x):
        scale, zero_point = affine_params(x, spec)
        codes = affine_encode(x, scale, zero_point, spec)
        return scale, codes, affine_decode(codes, scale, zero_point)

    if spec.symmetric:
        scale, zero_point = np.abs(x).max(-1, keepdims=True) / np.float32(spec.qmax + 0.5), np.float32(0)
    else:
        lo, hi = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
        scale = (hi - lo) / np.float32(spec.qmax - spec.qmin)
        zero_point = np.clip(np.round(spec.qmin - lo / scale), spec.qmin, spec.qmax)
    codes = np.clip(np.round(x / scale) + zero_point, spec.qmin, spec.qmax)
    for got, wanted in zip(jax.jit(both)(x), (scale, codes, (codes - zero_point) * scale), strict=True):
        np.testing.assert_array_equal(got, wanted)
    with jax.disable_jit():
        for got, wanted in zip(both(jnp.asarray(x)), jax.jit(both)(x), strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_divide_when_the_divisor_is_a_quotient():
    """`x / (a / b)`: left alone XLA computes `(x * b) / a`, and `x / broadcast(y)` as `x * broadcast(1 / y)`."""
    x = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32)
    a = np.abs(x).max(-1, keepdims=True)
    exact = x / (a / np.float32(7.5))
    np.testing.assert_array_equal(jax.jit(lambda x, a: divide(x, divide(a, 7.5)))(x, a), exact)
    np.testing.assert_array_equal(divide(jnp.asarray(x), divide(jnp.asarray(a), 7.5)), exact)
