"""Scales and levels so small that float16 holds them with few digits, or not at all: what is said of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qjax.core import CastSpec, QTensor, logical_blocks

SMALLEST = 2.0**-16  # below it float16 has fewer than the 8 binary digits of bfloat16
_DTYPE = jnp.float16  # the other dtypes of scales have the exponents of float32


def small_scales(w: jax.Array, q: QTensor, stacked: Sequence[int] = ()) -> tuple[str, ...]:
    """Says how many scales, or tables of levels, of what is not zero lie below `SMALLEST` in float16.

    A scale too small for float16 is its smallest positive number, 2^-24 (see `qjax.core.affine.round_scale`); a level is the nearest.

    Args:
      w: the float weight.
      q: what was made of it.
      stacked: axes that hold independent arrays.

    Returns:
      A remark for the report that names the remedy, or nothing.

    Example:
      >>> import qjax
      >>> w = jnp.float32([[1e-6, 1.0], [1e-6, 1.0]])
      >>> small_scales(w, qjax.core.quantize(w, qjax.int8(scale_dtype="float16"), (0,)))[0].split(":")[0]
      '1 of 2 scales are below 1.5e-05, where float16 has few digits or none'
    """
    axes = tuple(a % w.ndim - w.ndim for a in stacked)
    if q.scale is not None and q.scale.dtype == _DTYPE and not isinstance(q.spec, CastSpec):
        # With a permutation it is scattered which weights share a scale; a scale of 0 is that of zeros then.
        used = q.scale > 0 if q.perm is not None else jnp.any(logical_blocks(w, q.spec, q.axes, axes)[0] != 0, axis=-1)
        return _remark("scale", "scales", used & (q.scale < SMALLEST))
    if q.levels is not None and q.levels.dtype == _DTYPE:
        shared = tuple(i for i, n in enumerate(q.levels.shape[:-1]) if n == 1)
        used = jnp.any(jnp.any(w != 0, axis=q.axes), axis=shared, keepdims=True)
        return _remark("level", "tables", used & (jnp.max(jnp.abs(q.levels), axis=-1) < SMALLEST))
    return ()


def _remark(what: str, things: str, small: jax.Array) -> tuple[str, ...]:
    count = int(jnp.sum(small))
    text = f"{count} of {small.size} {things} are below {SMALLEST:.2g}, where float16 has few digits or none"
    return (f'{text}: take {what}_dtype="bfloat16" or "float32"',) if count else ()
