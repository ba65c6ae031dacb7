"""Decode attention: one query token against a quantized KV cache, no key or value ever dequantized.

    s_t = a_t (q . k_t) / sqrt(D),   p = softmax(s),   o = sum_t (p_t b_t) v_t

with codes k_t, v_t and their token's scales a_t, b_t: both scales are a row along the tokens, multiplied onto scores and
probabilities, of which there are D times fewer than codes. A zero point of a token costs as little: it is a row, too,

    s_t = a_t (q . k_t - y_t sum_i q_i) / sqrt(D),   o = sum_t (p_t b_t) v_t - sum_t p_t b_t z_t

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

from qjax_kernels.request import Cached, CacheRead
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.chips import chip_of, why_not_chip
from qjax_kernels.tpu.tiles import Interpret

BLOCK = 512
"""Tokens of a block: 64 KiB of int8 codes with 128 channels, so that a copy is long enough to run at full bandwidth."""

_LOW = -1e30  # stands for a score that is not there; minus infinity less itself is NaN


def why_not(read: CacheRead) -> str:
    """Returns why this kernel does not read a cache, or nothing.

    Example:
      >>> from qjax_kernels.request import Cached, Device
      >>> eight, four = Cached("int", 8), Cached("int", 4, group_size=32)
      >>> why_not(CacheRead(Device("tpu", "v6e"), 1, 128, 4096, eight, eight))
      ''
      >>> why_not(CacheRead(Device("tpu", "v6e"), 1, 128, 4096, four, four))
      'keys: groups of 32 channels: a token shares its scale here, or scores could not be scaled instead of keys'
    """
    from_chip = why_not_chip(read.device.platform, read.device.chip)
    if from_chip:
        return from_chip
    if read.queries != 1:
        return f"{read.queries} queries a head: one token is decoded here"
    for name, cached in (("keys", read.keys), ("values", read.values)):
        reason = _why_not_codes(cached, read.channels)
        if reason:
            return f"{name}: {reason}"
    one, other = read.keys, read.values
    if (one.kind, one.bits) != (other.kind, other.bits):
        return f"keys are {one.kind}{one.bits} and values {other.kind}{other.bits}: both have one width and sign here"
    return ""


def _why_not_codes(cached: Cached, channels: int) -> str:
    if cached.kind not in ("int", "uint") or cached.bits not in (4, 8):
        return f"codes of kind {cached.kind} with {cached.bits} bits: integers of 4 and 8 are read here"
    if cached.tokens != 1:
        return f"{cached.tokens} tokens share the scales of their channels: a token shares its scale here"
    if cached.group_size is not None and cached.group_size < channels:
        return f"groups of {cached.group_size} channels: a token shares its scale here, or scores could not be scaled instead of keys"
    if channels * cached.bits % 256:
        return f"{channels} channels of {cached.bits} bits: a multiple of 32 bytes fills tiles"
    return ""


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    k_scale: jax.Array,
    v: jax.Array,
    v_scale: jax.Array,
    lengths: jax.Array,
    k_zero: jax.Array | None = None,
    v_zero: jax.Array | None = None,
    *,
    chip: str,
    tokens_last: bool = False,
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
      k_zero: (B, G, T) float32, zero points of unsigned codes; with them k and v are uint8.
      v_zero: as `k_zero`.
      chip: "v5e", "v5p", "v6e" or "tpu7x".
      tokens_last: k and v are (B, G, D, T) in int8 or uint8, or bytes (B, G, D / 2, T) of two codes of four bits, the low one first;
        which of the two the width says. So XLA lays a token out that is narrower than 128 bytes.
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
    if (k_zero is None) != (v_zero is None):
        raise ValueError("`k_zero` and `v_zero` come together: give zeros for the one that has none")
    zeros = [] if k_zero is None or v_zero is None else [k_zero, v_zero]
    _check(q, k, k_scale, v, v_scale, lengths, zeros, tokens_last, block)
    (b, h, d), (g, t) = q.shape, k_scale.shape[1:]
    queries, nibbles = q.reshape(b, g, h // g, d), tokens_last and 2 * k.shape[2] == d
    block = min(block, tiles.up(t, 128))

    def last(i, lengths):
        return jnp.maximum(lax.div(lengths[i] + (block - 1), block) - 1, 0)

    def of_codes(i, j, step, lengths):
        at = jnp.minimum(step, last(i, lengths))
        return (i, j, 0, at) if tokens_last else (i, j, at, 0)

    def of_scales(i, j, step, lengths):
        return i, j, 0, jnp.minimum(step, last(i, lengths))

    codes = pl.BlockSpec((None, None, *((k.shape[2], block) if tokens_last else (block, d))), of_codes)
    scales = pl.BlockSpec((None, None, 1, block), of_scales)
    heads = pl.BlockSpec((None, None, h // g, d), lambda i, j, step, lengths: (i, j, 0, 0))
    sums = pl.BlockSpec((None, None, h // g, 128), lambda i, j, step, lengths: (i, j, 0, 0))
    o, total = pl.pallas_call(
        functools.partial(_kernel, block=block, tokens=t, tokens_last=tokens_last, nibbles=nibbles, unsigned=bool(zeros)),
        out_shape=(jax.ShapeDtypeStruct(queries.shape, q.dtype), jax.ShapeDtypeStruct((b, g, h // g, 128), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, g, pl.cdiv(t, block)),
            in_specs=[heads, codes, scales, codes, scales, *(scales for _ in zeros)],
            out_specs=[heads, sums],
            scratch_shapes=[pltpu.VMEM((h // g, width), jnp.float32) for width in (1, 1, d)],
        ),
        compiler_params=tiles.params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="decode_attention",
    )(lengths, queries, k, k_scale[:, :, None], v, v_scale[:, :, None], *(z[:, :, None] - (8 if nibbles else 128) for z in zeros))
    return o.reshape(b, h, d), total[..., 0].reshape(b, h)


def _check(q, k, k_scale, v, v_scale, lengths, zeros, tokens_last: bool, block: int) -> None:
    tokens, widths = k.shape[-1 if tokens_last else -2], (q.shape[-1], *((q.shape[-1] // 2,) if tokens_last else ()))
    fits = q.ndim == 3 and k.ndim == 4 and k.shape[0] == q.shape[0] and q.shape[1] % k.shape[1] == 0
    if not fits or k.shape[-2 if tokens_last else -1] not in widths:
        form = "(B, G, D, T) or (B, G, D / 2, T)" if tokens_last else "(B, G, T, D)"
        raise ValueError(f"`q` (B, H, D) and `k` {form} with H a multiple of G do not fit: {q.shape} and {k.shape}")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"`q` must be float32 or bfloat16, got {q.dtype}")
    taken = ("int8", "uint8") if tokens_last else ("uint8",) if zeros else ("int4", "int8")
    if v.shape != k.shape or any(a.dtype.name not in taken for a in (k, v)):
        what = f"{' or '.join(taken)} {'with zero points ' if zeros else ''}of one shape"
        raise ValueError(f"`k` and `v` must be {what}, got {k.dtype}{k.shape} and {v.dtype}{v.shape}")
    rows = (*k.shape[:2], tokens)
    if any(a.shape != rows for a in (k_scale, v_scale, *zeros)):
        raise ValueError(f"`k_scale` and `v_scale` and zero points must be {rows}, got {k_scale.shape} and {v_scale.shape}")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"`lengths` must be ({q.shape[0]},), got {lengths.shape}")
    if block % 128:
        raise ValueError(f"`block` must be a multiple of 128, got {block}")


def _kernel(
    lengths, q_ref, k_ref, k_scale_ref, v_ref, v_scale_ref, *refs, block: int, tokens: int, tokens_last: bool, nibbles: bool, unsigned: bool
):
    *zeros, o_ref, total_ref, largest_ref, sum_ref, rows_ref = refs
    step = pl.program_id(2)
    length = jnp.minimum(lengths[pl.program_id(0)], tokens)
    channels, along = (0, 1) if tokens_last else (1, 0)

    @pl.when(step == 0)
    def _():
        largest_ref[...] = jnp.full_like(largest_ref, _LOW)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        rows_ref[...] = jnp.zeros_like(rows_ref)

    @pl.when(step * block < length)
    def _():
        q = q_ref[...]
        there = step * block + lax.broadcasted_iota(jnp.int32, (q.shape[0], block), 1) < length
        scores = _dot(q, _codes(k_ref, nibbles, unsigned).astype(q.dtype), channels)
        if zeros:
            scores -= jnp.sum(q.astype(jnp.float32), axis=1, keepdims=True) * zeros[0][...]
        scores = jnp.where(there, scores * (k_scale_ref[...] * (1 / math.sqrt(q.shape[1]))), _LOW)
        largest = jnp.maximum(largest_ref[...], jnp.max(scores, axis=1, keepdims=True))
        old, p = jnp.exp(largest_ref[...] - largest), jnp.where(there, jnp.exp(scores - largest), 0.0)
        # A scale that is not there may be NaN, and NaN times the probability 0 too.
        weights = jnp.where(there, p * v_scale_ref[...], 0.0).astype(q.dtype)
        rows = _dot(weights, _codes(v_ref, nibbles, unsigned).astype(q.dtype), along)
        if zeros:
            moved = jnp.where(there, weights.astype(jnp.float32) * zeros[1][...], 0.0)
            rows -= jnp.sum(moved, axis=1, keepdims=True)
        largest_ref[...] = largest
        sum_ref[...] = sum_ref[...] * old + jnp.sum(p, axis=1, keepdims=True)
        rows_ref[...] = rows_ref[...] * old + rows

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total = sum_ref[...]
        empty = total == 0
        o_ref[...] = (rows_ref[...] / jnp.where(empty, 1.0, total)).astype(o_ref.dtype)
        logarithm = jnp.where(empty, _LOW, largest_ref[...] + jnp.log(jnp.where(empty, 1.0, total)))
        total_ref[...] = jnp.broadcast_to(logarithm, total_ref.shape)


def _codes(ref, nibbles: bool, unsigned: bool) -> jax.Array:
    """Signed codes of a block: unsigned ones less half their range, which turns their highest bit; a byte along sublanes is two codes."""
    codes = ref[...]
    if unsigned:
        bits = pltpu.bitcast(codes, jnp.int32) ^ jnp.int32(-0x77777778 if nibbles else -0x7F7F7F80)  # 0x88888888, 0x80808080
        codes = pltpu.bitcast(bits, jnp.int8)
    return pltpu.bitcast(codes, jnp.int4) if nibbles else codes


def _dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
