"""Codes that are small floats: `w ~= number(code) * scale`, on arrays whose last axis is one block.

Everything here gives the same bits inside and outside `jit`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.affine import round_scale
from qjax.core.elements import E4M3, MINIFLOATS, decode_minifloat, encode_minifloat, floor_log2, power_of_two
from qjax.core.reductions import divide
from qjax.core.specs import FloatSpec

_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)
_LARGEST_GLOBAL = 2.0**116  # a block's scale, at least 2^-9 over it, is still a normal number


def global_scale(absmax: jax.Array, spec: FloatSpec) -> jax.Array:
    """`g = 448 * largest / absmax` of a whole tensor: blocks then have scales up to 448 / g. 1 where all is zero.

    Args:
      absmax: float32, any shape.
      spec: with scales of "e4m3".

    Returns:
      float32, the shape of `absmax`; at most 2^116.

    >>> global_scale(jnp.float32(2.0), FloatSpec("e2m1", scale_dtype="e4m3")).item()
    1344.0
    """
    absmax = absmax.astype(jnp.float32)
    most = E4M3.largest * spec.largest
    small = absmax < most / _LARGEST_GLOBAL
    scale = jnp.where(small, _LARGEST_GLOBAL, divide(jnp.full_like(absmax, most), jnp.where(small, 1.0, absmax)))
    # The largest number a block can hold must be finite, whatever the divisions round to.
    return jnp.where(absmax == 0, 1.0, jnp.maximum(scale, most / _LARGEST * (1 + 2.0**-20)))


def float_scale(absmax: jax.Array, spec: FloatSpec, of_tensor: jax.Array | None = None) -> jax.Array:
    """The scale of blocks whose largest magnitude is known.

    A float: `absmax / largest`, rounded to `scale_dtype`; 1 where that is below float32's smallest normal number.
    "e8m0": `2^(floor(log2(absmax)) - emax)` with emax the exponent of the largest number; under the rule "round" one more where the
    mantissa of absmax is at least 2 - 2^-(M + 1), with M bits of mantissa in an element (1.75 for E2M1). From 2^-126 to 2^(127 - emax).
    "e4m3": `e4m3(absmax / largest * g) / g`, at least 2^-9 / g.
    NaN, for which E8M0 and E4M3 have a byte, where absmax is NaN or infinite: then the whole block stands for NaN.

    Args:
      absmax: any shape, floating.
      spec: a `FloatSpec`.
      of_tensor: g, see `global_scale`; broadcasts against `absmax`. For "e4m3" only.

    Returns:
      float32, the shape of `absmax`.

    >>> float_scale(jnp.float32([7.9, 8.0]), FloatSpec("e2m1", scale_dtype="e8m0")).tolist()
    [1.0, 2.0]

    Source: OCP Microscaling formats v1.0, section 6.3; compressed-tensors and torchao ("EVEN") for "round".
    """
    if spec.scale_dtype in ("e8m0", "e4m3"):
        return neighbour_scale(absmax, 0, spec, of_tensor)
    scale = divide(absmax.astype(jnp.float32), spec.largest)
    scale = round_scale(jnp.minimum(scale, _largest_scale(spec)), spec.scale_dtype)
    return _or_nan(jnp.where(scale < _SMALLEST_NORMAL, 1.0, scale), absmax)


def neighbour_scale(absmax: jax.Array, steps: jax.Array | int, spec: FloatSpec, of_tensor: jax.Array | None = None) -> jax.Array:
    """The scale of one byte that lies so many steps above that of `float_scale`.

    Args:
      absmax: as for `float_scale`.
      steps: integer, broadcasts against `absmax`.
      spec: a `FloatSpec` with scales of "e8m0" or "e4m3".
      of_tensor: as for `float_scale`.

    Returns:
      float32, the shape of `absmax`.

    >>> neighbour_scale(jnp.float32([6.0]), 1, FloatSpec("e2m1", scale_dtype="e8m0")).tolist()
    [2.0]
    """
    absmax = absmax.astype(jnp.float32)
    if spec.scale_dtype == "e8m0":
        return _or_nan(power_of_two(jnp.clip(_exponent(absmax, spec) + steps, -126, 127 - _largest_exponent(spec))), absmax)
    if of_tensor is None:
        raise ValueError(f"`of_tensor` must be given for {spec}: see `global_scale`")
    codes = encode_minifloat(divide(absmax, spec.largest) * of_tensor, E4M3)
    codes = jnp.clip(jnp.maximum(codes, 1) + steps, 1, E4M3.largest_code)
    return _or_nan(divide(decode_minifloat(codes, E4M3), of_tensor), absmax)


def _or_nan(scale: jax.Array, absmax: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(absmax), scale, jnp.nan)


def _exponent(absmax: jax.Array, spec: FloatSpec) -> jax.Array:
    """The exponent of a shared power of two, see `float_scale`."""
    mantissa = 6 if spec.element == "int8" else MINIFLOATS[spec.element].mantissa_bits
    bits = jax.lax.bitcast_convert_type(absmax.astype(jnp.float32), jnp.int32)
    if spec.exponent_rule == "round":
        bits = bits + (1 << (22 - mantissa))
    return floor_log2(jax.lax.bitcast_convert_type(bits, jnp.float32)) - _largest_exponent(spec)


def _largest_exponent(spec: FloatSpec) -> int:
    return 0 if spec.element == "int8" else MINIFLOATS[spec.element].largest_exponent


def _largest_scale(spec: FloatSpec) -> float:
    """The largest number of 8 digits, which bfloat16 has too, whose product with the largest element is finite."""
    mantissa, exponent = np.frexp(_LARGEST / spec.largest)
    return float(np.ldexp(np.floor(mantissa * 256) / 256, exponent))


def float_encode(x: jax.Array, scale: jax.Array, spec: FloatSpec) -> jax.Array:
    """The code of the number nearest to `x / scale`, a tie to the even code, saturating; that of zero where this is NaN.

    Args:
      x: (..., group), floating.
      scale: broadcasts against `x`.
      spec: a `FloatSpec`.

    Returns:
      int32 codes, the shape of `x`.

    >>> float_encode(jnp.float32([1.0, -100.0]), jnp.float32([2.0]), FloatSpec("e2m1")).tolist()
    [1, 15]
    """
    x = divide(x.astype(jnp.float32), scale.astype(jnp.float32))
    x = jnp.where(jnp.isnan(x), 0.0, x)  # the scale is NaN there, and not every element has a code for it
    if spec.element == "int8":
        return jnp.clip(jnp.round(x * 64), -127, 127).astype(jnp.int32)
    return encode_minifloat(x, MINIFLOATS[spec.element])


def float_decode(codes: jax.Array, scale: jax.Array, spec: FloatSpec) -> jax.Array:
    """`number(codes) * scale` in float32.

    Args:
      codes: integers, (..., group).
      scale: broadcasts against `codes`.
      spec: a `FloatSpec`.

    Returns:
      float32, the shape of `codes`.

    >>> float_decode(jnp.uint8([1, 15]), jnp.float32([2.0]), FloatSpec("e2m1")).tolist()
    [1.0, -12.0]
    """
    if spec.element == "int8":
        # 2^-6 by the exponent's bits: XLA would move a factor over to the scale, where it can underflow.
        bits = jax.lax.bitcast_convert_type(codes.astype(jnp.float32), jnp.int32)
        value = jnp.where(codes == 0, 0.0, jax.lax.bitcast_convert_type(bits - (6 << 23), jnp.float32))
    else:
        value = decode_minifloat(codes, MINIFLOATS[spec.element])
    return value * scale.astype(jnp.float32)
