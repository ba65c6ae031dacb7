"""Tiles: how a product (M, K) x (K, N) is cut, and what of it may stick out."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.tpu.chips import Chip

Interpret = bool | pltpu.InterpretParams
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of a product: m rows of x, n columns of w, k contracted."""

    m: int
    n: int
    k: int


LARGEST = {
    "v5e": Tile(256, 1024, 1024),
    "v5p": Tile(256, 1024, 1024),
    "v6e": Tile(256, 1024, 1024),
    "tpu7x": Tile(256, 1024, 1024),
}
"""Of each generation: the tile above which bundles a multiply-add fall no further, its float weight still in registers' reach. With 256
rows eight-bit products on v6e and tpu7x wait for the weight, which is read again for every 256; taller tiles were not compiled."""


def tile_of(chip: Chip, m: int, n: int, k: int, group: int, limit: Tile | None = None, divides: bool = False) -> Tile:
    """Returns the tile of a product.

    The rows of a tile are those of x up to the limit, so that a weight is read once where x has few rows. Columns and contracted
    length are multiples of 128, the fewest and least wasteful tiles; a tile holds whole groups, or a group
    whole tiles.

    Args:
      chip: the generation.
      m: rows of x.
      n: columns of w.
      k: contracted.
      group: contracted values that share a scale; k where a column does.
      limit: the largest tile; None takes that of `LARGEST`.
      divides: whether k must be a multiple of the tile's: where codes that stick out could be NaN, which no zero cancels.

    Example:
      >>> from qjax_kernels.tpu.chips import chip_of
      >>> tile_of(chip_of("v6e"), 5, 1408, 4096, 128)
      Tile(m=16, n=768, k=1024)
    """
    limit = limit or LARGEST[chip.name]
    rows = min(up(m, 16), limit.m)
    whole = group >= k
    steps = [c for c in range(_LANES, limit.k + 1, _LANES) if whole or c % group == 0 or group % c == 0]
    steps = [c for c in steps if not divides or k % c == 0]
    return Tile(rows, _least_waste(n, range(_LANES, limit.n + 1, _LANES)), _least_waste(k, steps))


def why_not_group(group: int | None, k: int) -> str:
    """Returns why groups of this size fit no tile, or nothing.

    Example:
      >>> why_not_group(96, 4096)
      'no tile holds groups of 96: 32, 64 and multiples of 128 do'
    """
    if group is None or group >= k or group in (32, 64) or group % _LANES == 0:
        return ""
    return f"no tile holds groups of {group}: 32, 64 and multiples of 128 do"


def pad_contracted(x: jax.Array, k: int) -> jax.Array:
    """Zeros behind the last axis of x, up to a multiple of k."""
    extra = -x.shape[-1] % k
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)]) if extra else x


def scale_blocks(scale: jax.Array, group: int, k: int) -> jax.Array:
    """Scales (groups, N) as (blocks, groups a block, N), a block for each tile of k; groups that are longer have one block each.

    A reshape that moves nothing where a tile holds a multiple of eight groups.
    """
    each = 1 if scale.shape[0] == 1 else max(1, k // group)  # one scale a column is one block, however short K is beside the tile
    extra = -scale.shape[0] % each
    padded = jnp.pad(scale, ((0, extra), (0, 0))) if extra else scale
    return padded.reshape(-1, each, scale.shape[1])


def scale_block_of(group: int, k: int, tile_k: int):
    """Returns the function from a step along k to its block of scales."""
    if group >= k:
        return lambda step: 0
    span = max(1, group // tile_k)  # tiles that share a block; `//` of a traced step asks the device what it is
    return (lambda step: step) if span == 1 else (lambda step: jax.lax.div(step, span))


def cuts(m: int, n: int, k: int, tile: Tile) -> tuple[int, int, int]:
    """Tiles along M, N and K.

    Example:
      >>> cuts(5, 1408, 4096, Tile(16, 768, 1024))
      (1, 2, 4)
    """
    return pl.cdiv(m, tile.m), pl.cdiv(n, tile.n), pl.cdiv(k, tile.k)


def dot(x: jax.Array, w: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """x (m, k) times w (k, n); float32 operands keep their precision."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=dtype)


def spread(ref, row: int, rows: int, columns: slice = slice(None)) -> jax.Array:
    """Row `row` of a float `ref`, its columns `rows` times below each other, in float32.

    A load of 128 lanes spreads them over sublanes by itself; a longer row is permuted in registers, which costs the vector unit one or two
    operations for each register of results.
    """
    start, stop, _ = columns.indices(ref.shape[1])
    parts = [ref[row : row + 1, c : c + _LANES].astype(jnp.float32) for c in range(start, stop, _LANES)]
    return jnp.concatenate([jnp.broadcast_to(part, (rows, _LANES)) for part in parts], axis=1)


def accumulate(accumulator, y: jax.Array, step: jax.Array) -> None:
    """Adds y, at the first step to nothing: whatever the memory held, NaN too, is not read into the sum."""
    accumulator[...] = jnp.where(step == 0, y, accumulator[...] + y)


def params(*semantics: Literal["parallel", "arbitrary"], vmem: int = 0) -> pltpu.CompilerParams:
    """Compiler parameters; `vmem` above the default limit of 16 MiB raises it."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem if vmem > 16 * 2**20 else None)


def _least_waste(length: int, steps) -> int:
    # A tile's own costs (waiting, addresses) are about those of 128 columns more.
    return min(steps, key=lambda step: (math.ceil(length / step) * (step + _LANES), -step))


def up(value: int, multiple: int) -> int:
    """The next multiple."""
    return math.ceil(value / multiple) * multiple


