"""Decode attention: one query token against a quantized KV cache, no key or value ever dequantized.

    s_t = a_t (q . k_t) / sqrt(D),   p = softmax(s),   o = sum_t (p_t b_t) v_t

with codes k_t, v_t and their token's scales a_t, b_t: both scales are a row along the tokens, multiplied onto scores and
probabilities, of which there are D times fewer than codes.

Data flow: blocks of codes and scales stream in, tokens of a block at a time, for one sequence and one head of the cache; its query heads
share them. Running maximum, sum and output stay in vector memory (online softmax). Blocks behind the sequence's length are not read.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.chips import chip_of, why_not_chip
from qjax_kernels.tpu.tiles import Interpret

BLOCK = 512
"""Tokens of a block: 64 KiB of int8 codes with 128 channels, so that a copy is long enough to run at full bandwidth."""

_LOW = -1e30  # stands for a score that is not there; minus infinity less itself is NaN


def why_not(platform: str, chip: str, bits: int, channels: int, group: int | None, zero_point: bool = False) -> str:
    """Returns why this kernel does not read a cache, or nothing.

    Args:
      platform: as `Device` has it.
      chip: the generation.
      bits: of a code.
      channels: of a head.
      group: channels of a token that share a scale; None for all of them.
      zero_point: whether codes have one.

    Example:
      >>> why_not("tpu", "v6e", 8, 128, None)
      ''
      >>> why_not("tpu", "v6e", 8, 128, 32)
      'groups of 32 channels: a token shares its scale here, or scores could not be scaled instead of keys'
    """
    from_chip = why_not_chip(platform, chip)
    if from_chip:
        return from_chip
    if bits not in (4, 8):
        return f"codes of {bits} bits: the chip has no such integers; 4 and 8 are there"
    if zero_point:
        return "a zero point: the codes would have to be moved before every product"
    if group is not None and group < channels:
        return f"groups of {group} channels: a token shares its scale here, or scores could not be scaled instead of keys"
    return ""


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    k_scale: jax.Array,
    v: jax.Array,
    v_scale: jax.Array,
    lengths: jax.Array,
    *,
    chip: str,
    block: int = BLOCK,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one new token of each sequence to its cache. No gradient: decoding is not trained through.

    The number of tokens may be any; what lies behind a sequence's length, or behind the cache, is masked whatever it is. Rounding: codes
    and their sums with a bfloat16 q are exact in float32; `p b` is rounded to bfloat16 (2^-8) before it meets the codes of v, unless q is
    float32.

    Args:
      q: (B, H, D) float32 or bfloat16, unscaled.
      k: codes (B, G, T, D), int8 or `jnp.int4`; G divides H, and H / G query heads share a head of the cache.
      k_scale: (B, G, T) float32.
      v: codes as `k`.
      v_scale: as `k_scale`.
      lengths: int32 (B,), tokens that are there; 0 gives zeros.
      chip: "v5e", "v5p", "v6e" or "tpu7x".
      block: tokens of a block, a multiple of 128.
      interpret: run on a CPU, for tests.

    Returns:
      (o (B, H, D), the dtype of q; the scores' log-sum-exp (B, H) float32, -1e30 for an empty cache). With the two, the result joins
      that of tokens kept elsewhere, such as the float window: weights `softmax` of the log-sum-exps.

    Raises:
      ValueError: shapes that do not fit, an unknown chip.

    Example:
      >>> q, codes, scale = jnp.ones((1, 2, 128)), jnp.ones((1, 1, 128, 128), jnp.int8), jnp.full((1, 1, 128), 0.5)
      >>> o, total = decode_attention(q, codes, scale, codes, scale, jnp.int32([100]), chip="v6e", block=128, interpret=True)
      >>> round(o[0, 0, 0].item(), 4), round(total[0, 0].item() - 64 / 128**0.5, 4), round(math.log(100), 4)
      (0.5, 4.6052, 4.6052)
    """
    chip_of(chip)
    _check(q, k, k_scale, v, v_scale, lengths, block)
    (b, h, d), (_, g, t, _) = q.shape, k.shape
    queries = q.reshape(b, g, h // g, d)
    block = min(block, tiles.up(t, 128))

    def last(i, lengths):
        return jnp.maximum(lax.div(lengths[i] + (block - 1), block) - 1, 0)

    def of_codes(i, j, step, lengths):
        return i, j, jnp.minimum(step, last(i, lengths)), 0

    def of_scales(i, j, step, lengths):
        return i, j, 0, jnp.minimum(step, last(i, lengths))

    codes = pl.BlockSpec((None, None, block, d), of_codes)
    scales = pl.BlockSpec((None, None, 1, block), of_scales)
    heads = pl.BlockSpec((None, None, h // g, d), lambda i, j, step, lengths: (i, j, 0, 0))
    sums = pl.BlockSpec((None, None, h // g, 128), lambda i, j, step, lengths: (i, j, 0, 0))
    o, total = pl.pallas_call(
        functools.partial(_kernel, block=block, tokens=t),
        out_shape=(jax.ShapeDtypeStruct(queries.shape, q.dtype), jax.ShapeDtypeStruct((b, g, h // g, 128), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, g, pl.cdiv(t, block)),
            in_specs=[heads, codes, scales, codes, scales],
            out_specs=[heads, sums],
            scratch_shapes=[pltpu.VMEM((h // g, width), jnp.float32) for width in (1, 1, d)],
        ),
        compiler_params=tiles.params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="decode_attention",
    )(lengths, queries, k, k_scale[:, :, None], v, v_scale[:, :, None])
    return o.reshape(b, h, d), total[..., 0].reshape(b, h)


def _check(q, k, k_scale, v, v_scale, lengths, block: int) -> None:
    if q.ndim != 3 or k.ndim != 4 or k.shape[::3] != q.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"`q` (B, H, D) and `k` (B, G, T, D) with H a multiple of G do not fit: {q.shape} and {k.shape}")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"`q` must be float32 or bfloat16, got {q.dtype}")
    if v.shape != k.shape or any(a.dtype not in (jnp.int4, jnp.int8) for a in (k, v)):
        raise ValueError(f"`k` and `v` must be int4 or int8 of one shape, got {k.dtype}{k.shape} and {v.dtype}{v.shape}")
    if k_scale.shape != k.shape[:3] or v_scale.shape != k.shape[:3]:
        raise ValueError(f"`k_scale` and `v_scale` must be {k.shape[:3]}, got {k_scale.shape} and {v_scale.shape}")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"`lengths` must be ({q.shape[0]},), got {lengths.shape}")
    if block % 128:
        raise ValueError(f"`block` must be a multiple of 128, got {block}")


def _kernel(lengths, q_ref, k_ref, k_scale_ref, v_ref, v_scale_ref, o_ref, total_ref, largest_ref, sum_ref, rows_ref, *, block, tokens):
    step = pl.program_id(2)
    length = jnp.minimum(lengths[pl.program_id(0)], tokens)

    @pl.when(step == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, _LOW)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        rows_ref[...] = jnp.zeros_like(rows_ref)

    @pl.when(step * block < length)
    def _():
        q = q_ref[...]
        there = step * block + lax.broadcasted_iota(jnp.int32, (q.shape[0], block), 1) < length
        scores = _dot(q, k_ref[...].astype(q.dtype), 1) * (k_scale_ref[...] * (1 / math.sqrt(q.shape[1])))
        scores = jnp.where(there, scores, _LOW)
        largest = jnp.maximum(largest_ref[...], jnp.max(scores, axis=1, keepdims=True))
        old, p = jnp.exp(largest_ref[...] - largest), jnp.where(there, jnp.exp(scores - largest), 0.0)
        # A scale that is not there may be NaN, and NaN times the probability 0 too.
        weights = jnp.where(there, p * v_scale_ref[...], 0.0).astype(q.dtype)
        largest_ref[...] = largest
        sum_ref[...] = sum_ref[...] * old + jnp.sum(p, axis=1, keepdims=True)
        rows_ref[...] = rows_ref[...] * old + _dot(weights, v_ref[...].astype(q.dtype), 0)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total = sum_ref[...]
        empty = total == 0
        o_ref[...] = (rows_ref[...] / jnp.where(empty, 1.0, total)).astype(o_ref.dtype)
        logarithm = jnp.where(empty, _LOW, largest_ref[...] + jnp.log(jnp.where(empty, 1.0, total)))
        total_ref[...] = jnp.broadcast_to(logarithm, total_ref.shape)


def _dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
