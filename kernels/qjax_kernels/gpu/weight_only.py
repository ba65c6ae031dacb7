"""Products with weights of 4 or 8 bits and bfloat16 rows, for Hopper GPUs."""

import importlib.util

import jax
import jax.numpy as jnp

from ..request import Request
from .tiles import SHARED_BYTES, Tiles, padded_rows, weight_only_tiles


def why_not(request: Request) -> str:
    """Why the kernel cannot serve a request; "" where it can.

    Args:
      request: what is asked.

    Returns:
      One sentence that names the obstacle, or "".
    """
    weight = request.weight
    group = weight.group_size
    scale_row = None if group is None else request.k // group * 2
    reasons = (
        (request.device.platform != "cuda" or request.device.chip != "sm_90a", f"written for sm_90a, not {request.device.chip}"),
        (weight.kind != "int" or weight.bits not in (4, 8), f"takes signed codes of 4 or 8 bits, not {weight.kind}{weight.bits}"),
        (request.activation is not None, "keeps x in bfloat16"),
        (request.dtype != "bfloat16", f"takes bfloat16 rows, not {request.dtype}"),
        (request.parts != 1, "takes one product, not several side by side"),
        (request.k % 128 != 0, f"K must be a multiple of 128, not {request.k}"),
        (request.n % 64 != 0, f"N must be a multiple of 64, not {request.n}"),
        (group is not None and group % 128 != 0, f"groups must be a multiple of 128, not {group}"),
        (group is not None and request.k % group != 0, f"K = {request.k} is not a multiple of the group {group}"),
        (scale_row is not None and scale_row % 16 != 0, f"a row of {request.k // (group or 1)} scales is no multiple of 16 bytes"),
        (importlib.util.find_spec("absl") is None, "Mosaic GPU needs the package absl-py"),
    )
    return next((reason for unmet, reason in reasons if unmet), "")


def weight_only_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *,
    group_size: int | None = None,
    tiles: Tiles | None = None,
    cores: int = 132,
    interpret=None,
) -> jax.Array:
    """x (M, K) times the transpose of codes (N, K) scaled by row, or by row and group.

    y_mn = sum_k x_mk s_ng(k) c_nk

    Args:
      x: (M, K) bfloat16.
      codes: (N, K) int4 or int8.
      scales: (N, K / group_size), or (N, 1) per channel: bfloat16, float16 or float32.
      group_size: consecutive k that share a scale; None per channel.
      tiles: the cut; None for the one that suits the shape.
      cores: multiprocessors of the GPU.
      interpret: an interpreter's parameters, for tests without a GPU.

    Returns:
      (M, N) bfloat16. Sums are float32; the scale multiplies the float32 sum of a group unless `tiles.scale_first`.

    Raises:
      ValueError: the tiles cannot be used for these codes.
    """
    from .digits_kernel import digit_products
    from .weight_only_kernel import reordered, weight_only

    m, k = x.shape
    bits = 4 if codes.dtype == jnp.int4 else 8
    tiles = weight_only_tiles(m, codes.shape[0], k, bits, cores, group_size) if tiles is None else tiles
    if tiles.reorder and bits != 4:
        raise ValueError(f"`tiles.reorder` is for codes of 4 bits, these have {bits}; leave it False")
    if tiles.digits and (bits != 4 or group_size is None):
        raise ValueError("`tiles.digits` is for codes of 4 bits in groups; leave it False")
    per_copy = 16 // scales.dtype.itemsize
    if group_size is not None and (group_size * per_copy) % tiles.block_k:
        raise ValueError(
            f"`tiles.block_k` is {tiles.block_k}; it must divide {group_size * per_copy}, the k whose scales are copied at once"
        )
    if (used := tiles.shared_bytes(bits)) > SHARED_BYTES:
        raise ValueError(f"`tiles` need {used} bytes of shared memory, the GPU has {SHARED_BYTES}; take fewer stages or smaller blocks")
    if tiles.digits:
        y = digit_products(x, codes, scales, group=group_size or k, tiles=tiles, interpret=interpret)
        return y.sum(0).astype(x.dtype) if tiles.split_k > 1 else y
    x = jnp.pad(x, ((0, padded_rows(m) - m), (0, 0)))
    if tiles.reorder:
        x = reordered(x)
    y = weight_only(x, codes, scales, bits=bits, group=group_size, tiles=tiles, interpret=interpret)
    y = y.sum(0).astype(x.dtype) if tiles.split_k > 1 else y
    return y[:m]
