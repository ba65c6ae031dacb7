"""Codes that index a table: `w ~= levels[code] * absmax`, on arrays whose last axis is one block."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from qjax.core.affine import round_scale, round_stored
from qjax.core.reductions import mean_magnitude
from qjax.core.specs import CodebookSpec

_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_RECIPROCAL_IS_SUBNORMAL = 2.0**126  # above it 1 / absmax would be flushed to zero
_MOST_COMPARISONS = 32


def codebook_params(x: jax.Array, spec: CodebookSpec, real: jax.Array | np.ndarray | None = None) -> jax.Array:
    """The largest or the mean magnitude of each block, rounded to `spec.scale_dtype` (`table_scale`). A block of zeros keeps 0.

    Args:
      x: (..., group), floating.
      spec: a `CodebookSpec`.
      real: which values are no padding, for means: see `mean_magnitude`; None: all.

    Returns:
      The scale, float32 (..., 1).

    >>> from qjax.core.named_specs import nf4
    >>> codebook_params(jnp.float32([[-3.0, 2.0]]), nf4()).tolist()
    [[3.0]]
    """
    if spec.by_mean:
        return table_scale(mean_magnitude(x, real=real), spec)
    return table_scale(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True), spec)


def table_scale(scale: jax.Array, spec: CodebookSpec) -> jax.Array:
    """A scale as it will be stored, float32: `round_scale`, or the nearest number where the table has no zero to take in its stead.

    >>> from qjax.core.named_specs import binary, nf4
    >>> [table_scale(jnp.float32(1e-9), spec(scale_dtype="float16")).item() for spec in (nf4, binary)]
    [5.960464477539063e-08, 0.0]
    """
    return round_scale(scale, spec.scale_dtype) if 0.0 in spec.levels else round_stored(scale, spec.scale_dtype)


def _thresholds(spec: CodebookSpec) -> tuple[np.ndarray, np.ndarray]:
    """The midpoints between neighbouring levels, and the codes in the order of their levels."""
    levels = np.asarray(spec.levels, np.float32)
    order = np.argsort(levels, kind="stable")
    return (levels[order][1:] + levels[order][:-1]) * np.float32(0.5), order


def over_scale(x: jax.Array, absmax: jax.Array) -> jax.Array:
    """`x * float32(1 / absmax)` in float32, also where the reciprocal is no normal number; 0 where `absmax` is none.

    Args:
      x: floating.
      absmax: broadcasts against `x`.

    Returns:
      float32, the shape of `x`.

    >>> over_scale(jnp.float32([1.0, 3.0]), jnp.float32([4.0, 0.0])).tolist()
    [0.25, 0.0]
    """
    absmax = absmax.astype(jnp.float32)
    shrink = jnp.where(absmax > _RECIPROCAL_IS_SUBNORMAL, 0.25, 1.0)
    inverse = 1.0 / jnp.where(absmax < _SMALLEST_NORMAL, jnp.inf, absmax * shrink)
    return x.astype(jnp.float32) * shrink * jax.lax.optimization_barrier(inverse)


def codebook_encode(x: jax.Array, absmax: jax.Array, spec: CodebookSpec) -> jax.Array:
    """The code of the level nearest to `x * float32(1 / absmax)`; a tie goes to the lower level.

    Args:
      x: (..., group), floating.
      absmax: broadcasts against `x`.
      spec: a `CodebookSpec`.

    Returns:
      int32 codes, the shape of `x`.

    >>> from qjax.core.named_specs import nf4
    >>> codebook_encode(jnp.float32([-2.0, 0.0, 0.1, 2.0]), jnp.float32([2.0]), nf4()).tolist()
    [0, 7, 8, 15]

    Source: bitsandbytes on CPU, which multiplies by the reciprocal too. Like there, a value that FP4 rounds to zero
    gets code 8 if it is positive and code 0 if not; both stand for 0.
    """
    x = over_scale(x, absmax)
    thresholds, order = _thresholds(spec)
    if len(thresholds) > _MOST_COMPARISONS:
        return jnp.asarray(order, jnp.int32)[jnp.searchsorted(jnp.asarray(thresholds), x, side="left", method="scan_unrolled")]
    # Comparisons fuse into one pass and need no table: each threshold passed moves on to the next level's code.
    code = jnp.full(x.shape, int(order[0]), jnp.int32)
    for threshold, step in zip(thresholds, np.diff(order), strict=True):
        code = code + jnp.where(x > threshold, int(step), 0)
    return code


def codebook_decode(codes: jax.Array, absmax: jax.Array, spec: CodebookSpec) -> jax.Array:
    """`levels[codes] * absmax` in float32.

    Args:
      codes: integers, (..., group).
      absmax: broadcasts against `codes`.
      spec: a `CodebookSpec`.

    Returns:
      float32, the shape of `codes`.

    >>> from qjax.core.named_specs import nf4
    >>> codebook_decode(jnp.uint8([0, 7, 15]), jnp.float32([2.0]), nf4()).tolist()
    [-2.0, 0.0, 2.0]
    """
    levels = jnp.asarray(spec.levels, jnp.float32)
    # On a mesh with explicit axes a lookup in a table that every device has must be told that its result lies where the codes do.
    sharding = jax.typeof(codes).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        values = levels.at[codes.astype(jnp.int32)].get(mode="clip", out_sharding=sharding)
    else:
        values = jnp.take(levels, codes.astype(jnp.int32), mode="clip")
    return values * absmax.astype(jnp.float32)
