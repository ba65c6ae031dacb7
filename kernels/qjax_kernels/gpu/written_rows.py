"""Rows of y that threads write themselves, as many as there are: the copy engine takes fewer than eight, or whole eights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic import Layout
from .tiles import ROWS
from .warps import Int, Long, Real, Warps, device_address


def write(y: Any, total: jax.Array, place: tuple[Any, Any], block_n: int, interpreted: bool) -> None:
    """Rounds a sum to bfloat16 and writes it; what lies past the edge is left out.

    Args:
      y: (M, N) bfloat16 in device memory, N a multiple of 64.
      total: the sum (R, C) float32 of a warpgroup, R rows of w, a multiple of 64, and C rows of x.
      place: the number of the block of rows of x; the first row of w.
      block_n: rows of w of a thread block.
      interpreted: there are no threads.
    """
    (m, n), (rows, columns), (block, first) = y.shape, total.shape, place

    def rows_of_x(count: int) -> None:
        for start in range(0, rows, ROWS):
            target = y.at[pl.ds(block * columns, count), pl.ds(first + start, ROWS)]
            part = functools.partial(_part, target, total[start : start + ROWS], n, interpreted)
            if n % block_n == 0:
                part()
            else:
                pl.when(first + start < n)(part)

    whole, rest = divmod(m, columns)
    if not rest or not whole:
        rows_of_x(rest or columns)
    else:
        lax.cond(block < whole, lambda: rows_of_x(columns), lambda: rows_of_x(rest))


def _part(target: Any, part: jax.Array, n: int, interpreted: bool) -> None:
    """Each thread writes what it has of a part; columns that the target has no rows for are left out."""
    count, most = target.shape[0], part.shape[1]
    if interpreted:
        target[...] = part.T[:count].astype(jnp.bfloat16)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), Layout.WGMMA))
    def put(_, own, values):
        w, at = Warps(), device_address(own)

        def one(value: Any, index: tuple[Any, Any]) -> None:
            row, column = map(Int.of_index, index)
            element(w, at, n, row, column, Real(value), count if count < most else None)

        values.foreach(one)

    put(target, plgpu.layout_cast(part, Layout.WGMMA))  # pyright: ignore[reportCallIssue]


def element(w: Warps, at: Long, n: int, row: Int, column: Int, value: Real, count: int | None) -> None:
    """Writes one number of a sum, two bytes, where it belongs.

    Args:
      w: the instructions.
      at: where its rows of y begin, at the first of its rows of w.
      n: columns of y.
      row: of w.
      column: the row of x.
      value: is rounded.
      count: rows of x; None: all columns are.
    """

    def store() -> None:
        w.store_bfloat16(at.times(column, 2 * n) + row * 2, value)

    if count is None:
        store()
    else:
        w.when(column < count, store)
