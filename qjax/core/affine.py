"""Integer codes: `w ~= (code - zero_point) * scale`, on arrays whose last axis is one block.

Everything here gives the same bits inside and outside `jit`, and those of IEEE division: see `reductions.divide`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.reductions import divide as divide
from qjax.core.reductions import mean_magnitude
from qjax.core.specs import IntSpec

_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def round_stored(x: jax.Array, dtype: str) -> jax.Array:
    """`x` as it will be stored, in float32.

    The barrier keeps the rounding: XLA may drop a cast to fewer bits that is cast back ("excess precision").

    >>> round_stored(jnp.float32(1.001), "bfloat16").item()
    1.0
    """
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def round_scale(scale: jax.Array, scale_dtype: str) -> jax.Array:
    """A scale as it will be stored, in float32; no positive one becomes 0 in float16, but its smallest positive number, 2^-24.

    On a grid that has a zero a block under that scale is never further off than zeros are. Of other dtypes the smallest numbers are
    those of float32.

    >>> round_scale(jnp.float32([1.001, 1e-9, 0.0]), "float16").tolist()
    [1.0009765625, 5.960464477539063e-08, 0.0]
    """
    stored = round_stored(scale, scale_dtype)
    least = float(jnp.finfo(scale_dtype).smallest_subnormal)
    return stored if least < _SMALLEST_NORMAL else jnp.where(scale > 0, jnp.maximum(stored, least), stored)


def params_from_range(lo: jax.Array, hi: jax.Array, spec: IntSpec) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of values that lie in `lo .. hi`.

    Symmetric: `scale = max(-lo, hi) / (qmax + 1/2)` (rule "half") or `/ qmax` (any other rule), unsigned: `hi` alone.
    Asymmetric: `lo = min(lo, 0)`, `hi = max(hi, 0)`, `scale = (hi - lo) / (2^bits - 1)`,
    `zero_point = clip(round(qmin - lo / scale), qmin, qmax)`, not rounded where `spec.zero_dtype` is floating. The scale is
    rounded to `spec.scale_dtype` first; where it is zero or below float32's smallest normal number it becomes 1, and all
    codes then stand for exactly 0.

    Args:
      lo: lower ends, any shape, floating.
      hi: upper ends, the same shape.
      spec: an `IntSpec`.

    Returns:
      (scale float32, zero_point int32, float32 or None), the shape of `lo`.

    >>> scale, _ = params_from_range(jnp.float32(-1.0), jnp.float32(7.5), IntSpec(4))
    >>> scale.item()
    1.0

    Source: "half" is the grid of compressed-tensors and GPTQ, "full" that of AWQ; asymmetric as in Jacob et al. (arXiv
    1712.05877), which nudges the zero point like this too.
    """
    lo, hi = lo.astype(jnp.float32), hi.astype(jnp.float32)
    if spec.symmetric:
        reach = jnp.maximum(-lo, hi) if spec.signed else jnp.maximum(hi, 0.0)
        steps = spec.qmax + (0.5 if spec.scale_rule == "half" else 0.0)
    else:
        lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
        # Halves on both sides: the same bits as (hi - lo) / steps, but the difference cannot overflow.
        reach, steps = hi * 0.5 - lo * 0.5, (spec.qmax - spec.qmin) * 0.5
    scale = round_scale(divide(reach, steps), spec.scale_dtype)
    scale = jnp.where(scale < _SMALLEST_NORMAL, 1.0, scale)
    if spec.symmetric:
        return scale, None
    if spec.float_zero:
        return scale, round_stored(spec.qmin - divide(lo, scale), spec.zero_dtype)
    return scale, jnp.clip(jnp.round(spec.qmin - divide(lo, scale)), spec.qmin, spec.qmax).astype(jnp.int32)


def affine_params(x: jax.Array, spec: IntSpec, real: jax.Array | np.ndarray | None = None) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of each block from its extreme values, see `params_from_range`, or from the mean of its magnitudes.

    "absmean": `scale = mean(|x|)`. "twn": the mean of those |x| that exceed .7 mean(|x|). A scale below float32's smallest normal
    number becomes 1.

    Args:
      x: (..., group), floating.
      spec: an `IntSpec`.
      real: which values are no padding, for means: see `mean_magnitude`; None: all.

    Returns:
      (scale float32 (..., 1), zero_point int32, float32 or None (..., 1)).

    >>> scale, zero_point = affine_params(jnp.float32([[-3.0, 0.0, 12.0]]), IntSpec(4, signed=False, symmetric=False))
    >>> scale.item(), zero_point.item()
    (1.0, 3)
    """
    x = x.astype(jnp.float32)
    if spec.by_mean:
        scale = round_scale(mean_magnitude(x, spec.scale_rule == "twn", real), spec.scale_dtype)
        return jnp.where(scale < _SMALLEST_NORMAL, 1.0, scale), None
    if spec.symmetric and spec.signed:
        hi = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        return params_from_range(-hi, hi, spec)
    return params_from_range(jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True), spec)


def affine_encode(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: IntSpec) -> jax.Array:
    """`clip(round(x / scale) + zero_point, qmin, qmax)`, rounding half to even; a floating zero point is added before rounding.

    Args:
      x: (..., group), floating.
      scale: broadcasts against `x`; what will be stored (already rounded to `spec.scale_dtype`).
      zero_point: the same shape as `scale`, or None.
      spec: an `IntSpec`.

    Returns:
      int32 codes, the shape of `x`.

    >>> affine_encode(jnp.float32([0.5, 1.5, 2.5, 99.0]), jnp.float32([1.0]), None, IntSpec(4)).tolist()
    [0, 2, 2, 7]
    """
    steps = divide(x.astype(jnp.float32), scale.astype(jnp.float32))
    if spec.float_zero and zero_point is not None:
        return jnp.clip(jnp.round(steps + zero_point.astype(jnp.float32)), spec.qmin, spec.qmax).astype(jnp.int32)
    codes = jnp.round(steps)
    if zero_point is not None:
        codes = codes + zero_point.astype(jnp.float32)
    return jnp.clip(codes, spec.qmin, spec.qmax).astype(jnp.int32)


def affine_decode(codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """`(codes - zero_point) * scale` in float32: the difference of integers is exact, so only the product rounds.

    Args:
      codes: integers, (..., group).
      scale: broadcasts against `codes`.
      zero_point: the same shape as `scale`, or None.

    Returns:
      float32, the shape of `codes`.

    >>> affine_decode(jnp.int8([-2, 7]), jnp.float32([0.5]), jnp.int8([1])).tolist()
    [-1.5, 3.0]
    """
    codes = codes.astype(jnp.float32)
    if zero_point is not None:
        codes = codes - zero_point.astype(jnp.float32)
    return codes * scale.astype(jnp.float32)
