"""The products of this folder in plain XLA: what the kernels are compared with, and what gradients go through."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qjax_kernels.cpu.layout import Packed, dequantize, unpack


def matmul(x: jax.Array, weight: Packed) -> jax.Array:
    """x W^T in float32.

    Args:
      x: floating (parts, M, K).
      weight: as packed.

    Returns:
      float32 (parts, M, N).
    """
    return jnp.einsum("pmk,pnk->pmn", x.astype(jnp.float32), dequantize(weight), precision=lax.Precision.HIGHEST)


def round_rows(x: jax.Array, divisor: float, low: int, high: int) -> tuple[jax.Array, jax.Array]:
    """`clip(round(x / scale))` with `scale = max |x| / divisor` of each row; a row of zeros has scale 1.

    Args:
      x: floating (..., K).
      divisor: of the largest magnitude.
      low: the lowest code.
      high: the highest code.

    Returns:
      (int8 like x, scale float32 (..., 1)).

    Example:
      >>> codes, scale = round_rows(jnp.float32([[0.0, 1.0, -2.0]]), 127.0, -127, 127)
      >>> codes.tolist()
      [[0, 64, -127]]
    """
    x = x.astype(jnp.float32)
    # Every element of the divisor depends on x, lest XLA multiplies by the reciprocal, which rounds otherwise.
    reach = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = reach / jnp.where(jnp.isnan(reach), reach, divisor)
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    codes = jnp.round(x / jnp.where(jnp.isnan(x), x, scale))
    return jnp.clip(codes, low, high).astype(jnp.int8), scale


def integer_matmul(codes: jax.Array, scale: jax.Array, weight: Packed) -> jax.Array:
    """Products of codes, added up in int32 over each group, then scaled.

    Args:
      codes: int8 (parts, M, K).
      scale: float32 (parts, M, 1).
      weight: as packed, without a table.

    Returns:
      float32 (parts, M, N).
    """
    w, layout = unpack(weight), weight.layout
    total = jnp.zeros((*codes.shape[:-1], layout.n), jnp.float32)
    for k in range(0, layout.k, layout.group):
        x, one = (a[..., k : k + layout.group].astype(jnp.int32) for a in (codes, w.codes))
        sums = jnp.sum(x, axis=-1)[..., None]
        dots = jnp.einsum("pmk,pnk->pmn", x, one)
        if w.zero is not None:
            zero = w.zero[:, None, :, k]
            dots = dots - zero * sums if weight.zeros.dtype == jnp.float32 else dots - zero.astype(jnp.int32) * sums
        total = total + dots.astype(jnp.float32) * w.scale[:, None, :, k]
    return total * scale
