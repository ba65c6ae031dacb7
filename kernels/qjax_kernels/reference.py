"""What the kernels compute, in plain jax on plain arrays: what runs where no kernel does, and what tests compare with.

Weights are (K, N), integer codes of any dtype; scales (groups, N) float32, a group being `ceil(K / groups)` consecutive k or stated.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax


def dequantize(w: jax.Array, scale: jax.Array, group: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """`w * scale` with the scale of each row's group, multiplied in `dtype`.

    Args:
      w: codes (..., K, N).
      scale: (..., groups, N).
      group: consecutive k that share a scale; the last group may be short.
      dtype: of the factors and of the product.

    Example:
      >>> dequantize(jnp.int8([[2], [3], [4]]), jnp.float32([[1.0], [0.5]]), 2).tolist()
      [[2.0], [3.0], [2.0]]
    """
    rows = jnp.repeat(scale.astype(dtype), group, axis=-2)[..., : w.shape[-2], :]
    return w.astype(dtype) * rows


def weight_only(x: jax.Array, w: jax.Array, scale: jax.Array, group: int) -> jax.Array:
    """`x (w * scale)` in float32, rounded once to the dtype of x.

    Args:
      x: (M, K) float32 or bfloat16.
      w: codes (K, N).
      scale: (groups, N).
      group: as `dequantize` takes it.
    """
    return jnp.dot(x.astype(jnp.float32), dequantize(w, scale, group), precision=lax.Precision.HIGHEST).astype(x.dtype)


def quantize_rows(x: jax.Array, levels: float = 127.5) -> tuple[jax.Array, jax.Array]:
    """Dynamic int8 codes of rows: `s = max|x| / levels`, `clip(round(x (1 / s)), -128, 127)`, half to even.

    Multiplying by the reciprocal, rounded once, is what a kernel does too; it moves a code by one where x / s lies within a rounding
    error of a half, as a row's largest does with 127.5 levels. A row of zeros has scale 1 and codes 0.

    Args:
      x: (..., K).
      levels: 127.5, or 127 for codes that never reach -128.

    Returns:
      (codes int8, the shape of x; scales float32 (..., 1)).

    Example:
      >>> codes, scale = quantize_rows(jnp.float32([[1.0, -2.0], [0.0, 0.0]]), 127)
      >>> codes.tolist(), scale[1].item()
      ([[64, -127], [0, 0]], 1.0)
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest * (1 / levels), 1.0)
    return jnp.clip(jnp.round(x * (1 / scale)), -128, 127).astype(jnp.int8), scale


def int8(x: jax.Array, w: jax.Array, scale: jax.Array, group: int, levels: float = 127.5) -> jax.Array:
    """Integer products of each group, exact in int32, times the scales of row and group, summed in float32.

    Args:
      x: (M, K) float32 or bfloat16; its rows are rounded by `quantize_rows`.
      w: codes (K, N) of at most 8 bits.
      scale: (groups, N).
      group: as `dequantize` takes it.
      levels: as `quantize_rows` takes it.

    Returns:
      (M, N), the dtype of x.
    """
    codes, rows = quantize_rows(x, levels)
    total = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    for g in range(scale.shape[0]):
        part = slice(g * group, (g + 1) * group)
        product = lax.dot(codes[:, part], w[part].astype(jnp.int8), preferred_element_type=jnp.int32)
        total = total + product.astype(jnp.float32) * scale[g].astype(jnp.float32)
    return (total * rows).astype(x.dtype)


def rotate(x: jax.Array, size: int) -> jax.Array:
    """`x H / sqrt(size)` along blocks of `size` values of the last axis, H the Sylvester matrix; in float32. It is its own inverse.

    Args:
      x: (..., K) floating.
      size: a power of two that divides K.

    Returns:
      float32, the shape of x.

    Example:
      >>> rotate(jnp.float32([[3.0, 1.0, 1.0, 1.0]]), 4).tolist()
      [[3.0, 1.0, 1.0, 1.0]]
    """
    z, half = x.astype(jnp.float32), 1
    while half < size:
        z = z.reshape(*x.shape[:-1], -1, 2, half)
        a, b = z[..., 0, :], z[..., 1, :]
        z = jnp.stack([a + b, a - b], axis=-2)
        half *= 2
    return z.reshape(x.shape) * (1 / math.sqrt(size))
