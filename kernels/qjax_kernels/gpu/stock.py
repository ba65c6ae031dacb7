"""Products with weights of 4 or 8 bits by groups on GPUs that have no kernel of ours (Ampere, Ada, Blackwell), as XLA formulations.

Dequantize-then-multiply writes the whole float weight to memory there. Few rows: one product for each group, side by side, into which XLA
fuses the conversion of the codes, and the scales on their sums. Many rows: one block of rows of w after the other, so that no more than
a block is ever float, and the cache holds it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from ..request import Request

FEW_ROWS = 16  # of x: the sums of groups of 128 take a quarter of the bytes of the bfloat16 weight then
BLOCK_BYTES = 8 * 2**20  # of the float weight at once: a fifth of the cache of an A100


def why_not(request: Request) -> str:
    """Why these formulations are of no use for a request; "" where they are.

    Args:
      request: what is asked.

    Returns:
      One sentence that names the obstacle, or "".
    """
    weight, group = request.weight, request.weight.group_size
    reasons = (
        (request.device.platform != "cuda", f"written for GPUs, not for {request.device.platform}"),
        (weight.kind != "int" or weight.bits not in (4, 8), f"takes signed codes of 4 or 8 bits, not {weight.kind}{weight.bits}"),
        (request.activation is not None, "keeps x float"),
        (request.parts != 1, "takes one product, not several side by side"),
        (group is None, "XLA fuses the conversion of a weight with a scale a row by itself"),
        (group is not None and request.k % group != 0, f"K = {request.k} is not a multiple of the group {group}"),
        (request.n * request.k * 2 < 2 * BLOCK_BYTES, f"a float weight of {request.n} x {request.k} fits into the cache"),
        (request.m > FEW_ROWS and request.n % 128 != 0, f"N must be a multiple of 128, not {request.n}"),
    )
    return next((reason for unmet, reason in reasons if unmet), "")


def grouped_matmul(x: jax.Array, codes: jax.Array, scales: jax.Array, *, group_size: int) -> jax.Array:
    """x (M, K) times the transpose of codes (N, K) scaled by row and group.

    y_mn = sum_g s_ng sum_{k in g} x_mk c_nk

    Args:
      x: (M, K) float32 or bfloat16.
      codes: (N, K) int4 or int8.
      scales: (N, at least K / group_size) floating; further columns are not used.
      group_size: consecutive k that share a scale, a divisor of K.

    Returns:
      (M, N) of the type of x. Few rows: sums and scales are float32. Many: the scaled weight is rounded to the type of x.
      It is ordinary jax, derivatives included.

    Example:
      >>> grouped_matmul(jnp.ones((1, 4)), jnp.int8([[1, 2, 3, 4]]), jnp.float32([[1.0, 10.0]]), group_size=2).tolist()
      [[73.0]]
    """
    (m, k), n = x.shape, codes.shape[0]
    scales = scales[:, : k // group_size]
    if m <= FEW_ROWS:
        return _group_sums(x, codes, scales, group_size)
    rows = _block_rows(n, k, x.dtype.itemsize)
    block = functools.partial(_scaled, group_size=group_size, dtype=x.dtype)

    def part(start):
        w = block(lax.dynamic_slice_in_dim(codes, start, rows), lax.dynamic_slice_in_dim(scales, start, rows))
        return jnp.einsum("mk,nk->mn", x, w, preferred_element_type=jnp.float32).astype(x.dtype)

    return lax.map(part, jnp.arange(0, n, rows)).swapaxes(0, 1).reshape(m, n)


def _group_sums(x: jax.Array, codes: jax.Array, scales: jax.Array, group_size: int) -> jax.Array:
    (m, k), n = x.shape, codes.shape[0]
    each = codes.reshape(n, k // group_size, group_size).astype(x.dtype)
    sums = jnp.einsum("mgk,ngk->gmn", x.reshape(m, k // group_size, group_size), each, preferred_element_type=jnp.float32)
    return jnp.sum(sums * scales.T[:, None].astype(jnp.float32), axis=0).astype(x.dtype)


def _scaled(codes: jax.Array, scales: jax.Array, group_size: int, dtype) -> jax.Array:
    n, k = codes.shape
    wide = codes.reshape(n, k // group_size, group_size).astype(jnp.float32) * scales[..., None].astype(jnp.float32)
    return wide.astype(dtype).reshape(n, k)


def _block_rows(n: int, k: int, size: int) -> int:
    """Rows of a block: the most that divide N and keep it within `BLOCK_BYTES`, 128 at least where 128 divides N."""
    most = max(128, BLOCK_BYTES // (k * size))
    return next((rows for rows in range(min(n, most), 0, -1) if n % rows == 0 and (rows % 128 == 0 or rows == n)), math.gcd(n, 128))
