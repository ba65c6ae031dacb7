"""Scales as they are stored: floats, bytes, or 8-bit codes with statistics of their own (double quantization)."""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.codebook import codebook_decode, codebook_encode, codebook_params
from qjax.core.dynamic_map import DYNAMIC, DYNAMIC_BLOCK
from qjax.core.elements import E4M3, decode_minifloat, encode_minifloat
from qjax.core.reductions import divide, tree_mean
from qjax.core.specs import BlockSpec, CodebookSpec, FloatSpec, Spec

NAN_BYTES = {"e8m0": 255, "e4m3": 127}  # the scales that stand for NaN
NESTED_BLOCK = DYNAMIC_BLOCK  # scales that share a statistic


def is_nested(spec: Spec) -> TypeGuard[CodebookSpec]:
    """Whether scales are stored as 8-bit codes with statistics of their own."""
    return isinstance(spec, CodebookSpec) and spec.double_quant


def stored_scale_dtype(spec: BlockSpec) -> str:
    """The dtype of `QTensor.scale`.

    >>> from qjax.core.specs import IntSpec
    >>> stored_scale_dtype(IntSpec(4)), stored_scale_dtype(FloatSpec("e2m1", scale_dtype="e8m0"))
    ('float32', 'uint8')
    """
    return "uint8" if is_nested(spec) or spec.scale_dtype in ("e8m0", "e4m3") else spec.scale_dtype


def nest(scale: jax.Array, stacked: Sequence[int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Double quantization: scales in 8 bits.

    `offset = mean(scale)`; blocks of 256 of `scale - offset` by their absmax to the nearest level of the dynamic map.

    Args:
      scale: float32 (kept-like..., G).
      stacked: axes of `scale` that hold independent tensors, each with an offset and blocks of its own.

    Returns:
      (codes uint8, the shape of `scale`; statistic float32 (stacked axes full, others 1, blocks); offset float32 (stacked axes full,
      others 1, 1)).

    >>> codes, statistic, offset = nest(jnp.float32([[1.0, 2.0, 3.0]]), ())
    >>> unnest(codes, statistic, offset).tolist(), statistic.shape
    ([[1.0070312023162842, 2.0, 3.0]], (1, 1))

    Source: QLoRA (arXiv 2305.14314), section 3, as in bitsandbytes' `quantize_4bit(compress_statistics=True)`.
    """
    stacked = sorted(a % scale.ndim for a in stacked)
    order = [*stacked, *(i for i in range(scale.ndim) if i not in stacked)]
    moved = scale.astype(jnp.float32).transpose(order)
    lead = moved.shape[: len(stacked)]
    flat = moved.reshape(*lead, -1)
    offset = tree_mean(flat)
    centred = flat - jax.lax.optimization_barrier(offset)
    count = -(-flat.shape[-1] // NESTED_BLOCK)
    short = count * NESTED_BLOCK - flat.shape[-1]
    blocks = jnp.pad(centred, [(0, 0)] * len(lead) + [(0, short)]).reshape(*lead, count, NESTED_BLOCK)
    statistic = codebook_params(blocks, DYNAMIC)
    codes = codebook_encode(blocks, statistic, DYNAMIC).astype(jnp.uint8).reshape(*lead, -1)[..., : flat.shape[-1]]
    codes = codes.reshape(moved.shape).transpose(np.argsort(order))
    like = [scale.shape[i] if i in stacked else 1 for i in range(scale.ndim - 1)]
    return codes, statistic.reshape(*like, count), offset.reshape(*like, 1)


def unnest(codes: jax.Array, statistic: jax.Array, offset: jax.Array) -> jax.Array:
    """`level(code) * statistic + offset`: the scales that `nest` stored, float32.

    Args:
      codes: uint8 (kept-like..., G).
      statistic: float32; its axes of size 1, the last aside, are those over which blocks run.
      offset: float32, the same with a last axis of 1.

    Returns:
      float32, the shape of `codes`.
    """
    stacked = [i for i, n in enumerate(statistic.shape[:-1]) if n != 1]
    order = [*stacked, *(i for i in range(codes.ndim) if i not in stacked)]
    moved = codes.transpose(order)
    lead = moved.shape[: len(stacked)]
    count = math.prod(moved.shape[len(lead) :])
    each = jnp.repeat(statistic.reshape(*lead, -1), NESTED_BLOCK, axis=-1)[..., :count].reshape(moved.shape)
    product = codebook_decode(moved, each, DYNAMIC)
    # A selection between the product and the sum, or they are contracted to one operation that rounds once, in some programs.
    product = jnp.where(jnp.isnan(product), 0.0, product)
    total = product + offset.reshape(*lead, *[1] * (moved.ndim - len(lead)))
    return total.transpose(np.argsort(order))


def store_scale(
    scale: jax.Array, spec: BlockSpec, stacked: Sequence[int], of_tensor: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Scales as a `QTensor` holds them: `scale`, `nested_scale` and `nested_offset`.

    Args:
      scale: float32 (kept-like..., G), what `block_params` gave.
      spec: says how it is stored.
      stacked: its axes that hold independent tensors.
      of_tensor: the scale of the tensor of an "e4m3" spec, float32 (kept-like..., 1).

    Returns:
      The three, the last two None where the spec has none.
    """
    if is_nested(spec):
        return nest(scale, stacked)
    if isinstance(spec, FloatSpec) and spec.scale_dtype == "e8m0":
        exponent = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.int32) >> 23
        return _or_nan_byte(exponent, scale, "e8m0"), None, None
    if of_tensor is not None:
        # scale is e4m3 / g, rounded once: its product with g is nearer to that number than to any other.
        return _or_nan_byte(encode_minifloat(scale * of_tensor, E4M3), scale, "e4m3"), of_tensor, None
    return scale.astype(spec.scale_dtype), None, None


def _or_nan_byte(codes: jax.Array, scale: jax.Array, scale_dtype: str) -> jax.Array:
    return jnp.where(jnp.isnan(scale), NAN_BYTES[scale_dtype], codes).astype(jnp.uint8)


def read_scale(scale: jax.Array, nested_scale: Any, nested_offset: Any, spec: BlockSpec) -> jax.Array:
    """The float32 scales that a `QTensor` holds, the inverse of `store_scale`. A byte that stands for NaN gives NaN."""
    if is_nested(spec):
        return unnest(scale, nested_scale, nested_offset)
    if isinstance(spec, FloatSpec) and spec.scale_dtype == "e8m0":
        exponent = scale.astype(jnp.int32)
        power = jax.lax.bitcast_convert_type(jnp.maximum(exponent << 23, 1 << 22), jnp.float32)
        return jnp.where(exponent == 255, jnp.nan, power)
    if isinstance(spec, FloatSpec) and spec.scale_dtype == "e4m3":
        return divide(decode_minifloat(scale, E4M3), nested_scale)
    return scale.astype(jnp.float32)
