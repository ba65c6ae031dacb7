"""The Hopper kernel of products with few rows: warps load codes straight into operand A of the tensor cores.

Sixteen rows of w, or 64, are a tile: the warps of a block share its K, each for itself or four together, a few pieces of 128 at a time, and
the loads of the next pieces are on their way while the tensor cores work. Warps meet the same pieces in every tile: they make their digits
while they work on the first one and keep them in shared memory; codes never pass through it. Blocks stay on their multiprocessor and take
tiles in turn. Where digits are many, blocks share K as well (`direct_parts`): each reads and rounds a part of x alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from .direct_codes import Codes, piece_of
from .direct_parts import Handed, Order, Room, room
from .direct_rows import Rows, inverse_root, write_nothing, write_squares
from .direct_shape import TILE, Shape, shape_of
from .mosaic import LANE
from .tiles import SHARED_BYTES, Direct, check_waiting
from .warps import Int, Long, Real, Warps, device_address, shared_address


def multiply(
    w: Warps, s: Shape, shared: Int, x: Long, codes: Long, scales: Long, *rest: Long, wait: Callable[[], None] | None = None,
    rows: Callable[[Int], Rows] | None = None, room: Room | None = None,
) -> None:  # fmt: skip
    """The work of one block.

    Args:
      w: the instructions.
      s: what is multiplied.
      shared: where its shared memory begins.
      x: where the rows of x begin.
      codes: where those of w begin.
      scales: where its scales begin.
      *rest: where the bias begins, if there is one, and y.
      wait: what is done before x is read, while the first codes are on their way.
      rows: what x is, of the first piece of the block; None: bfloat16 as it lies.
      room: where sums are handed over, if blocks share K.
    """
    order = Order(w, s)
    source, flat = Codes(w, s, order, codes, scales), order.count * s.rounds
    ahead = source.load(w.integer(0))
    if wait is not None:
        wait()  # attention has the same shared memory
    write_nothing(w, s, shared)
    own = Rows(w, s, order.member * s.own, x) if rows is None else rows(order.member * s.own)
    end = _End(w, s, shared, order, None if room is None else Handed(w, s, order, room), rest[0], rest[-1])

    def step(i: Int, carry: list[Any], new: bool) -> list[Any]:
        """Turn i; in a `new` block digits are still to be made."""
        now, sums = carry[: source.count], carry[source.count :]
        turn, position = i % s.rounds, i // s.rounds
        piece = piece_of(w, s, turn)
        if new:  # before further codes are asked for, which would take registers
            w.when(piece < s.own, lambda: own.write(shared, piece))
            w.meet_tensor_cores() if s.wide else w.warp_barrier()
        ahead = source.load(i + 1)
        sums = [w.where(turn == 0, w.real(0.0), total) for total in sums]
        piece = w.minimum(piece, s.held - s.turn)
        for u in range(s.turn):
            sums = _piece(w, s, shared, piece + u, *source.taken(now, u), sums)
        w.when(turn == s.rounds - 1, lambda: end.finish(position, sums, new))
        return [*ahead, *sums]

    first_tile = w.minimum(flat, s.rounds)
    carry = w.loop(first_tile, [*ahead, *[w.real(0.0)] * (2 * s.quads)], lambda i, carry: step(i, carry, True))
    w.loop(flat - first_tile, carry, lambda i, carry: step(i + s.rounds, carry, False))


def _piece(
    w: Warps, s: Shape, shared: Int, piece: Int, upper: list[Int], lower: list[Int], scales: list[Real], sums: list[Real]
) -> list[Real]:
    """The sums with one piece of K in them.

    Operand A wants four bytes of row g and of g + 8 in columns 4t to 4t + 3, and four more in 16 + 4t on. A word of eight codes gives both:
    the even nibbles, moved up, and the odd ones, each sixteen times itself; of eight-bit codes it takes two words. Digits of x lie in the
    same order.
    """
    if s.bits == 4:
        left = [[(a << 4) & 0xF0F0F0F0, (b << 4) & 0xF0F0F0F0, a & 0xF0F0F0F0, b & 0xF0F0F0F0] for a, b in zip(upper, lower, strict=True)]
    else:
        left = [[upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]] for i in range(4)]
    whole = w.group_products(left, shared + piece * s.piece_bytes, 8 * s.quads) if s.wide else []
    lane, new = w.thread & 31, list(sums)
    for quad in range(s.quads):
        total = whole[4 * quad : 4 * quad + 4] if s.wide else _quad_products(w, s, shared, piece, quad, left)
        row = w.minimum((lane & 3) + 4 * quad, s.m - 1)
        unit = w.as_real(w.load_shared(shared + s.places.units + (piece * s.m + row) * 4, 1)[0])
        for half in (0, 1):
            both = w.to_real((total[2 * half] << 8) + total[2 * half + 1])
            new[2 * quad + half] = w.fma(both, scales[half] * unit, new[2 * quad + half])
    return new


def _quad_products(w: Warps, s: Shape, shared: Int, piece: Int, quad: int, left: list[list[Int]]) -> list[Int]:
    """What one warp multiplies of four rows of x. Columns behind the last row repeat it; their sums are not stored."""
    lane = w.thread & 31
    column = w.minimum((lane >> 2) + 8 * quad, 2 * s.m - 1)
    at = shared + (piece * (4 * s.m) + column) * 64 + (lane & 3) * 16
    # Low digits come first in the second half.
    right = w.load_shared(at, 4) + w.load_shared(at + (2 * s.m + 1) * 64 - (column & 1) * 128, 4)
    total = [w.integer(0)] * 4
    for i in range(4):
        total = w.product(left[i], right[2 * i : 2 * i + 2], total)
    return total


@dataclasses.dataclass(frozen=True)
class _End:
    """The end of a tile: what its warps and the other blocks of the group have of it is added, and written.

    Attributes:
      w: the instructions.
      s: what is multiplied.
      shared: where shared memory begins.
      order: of the tiles.
      handed: sums between blocks; None where they do not share K.
      added: where the bias begins, if there is one.
      y: where y begins.
    """

    w: Warps
    s: Shape
    shared: Int
    order: Order
    handed: Handed | None
    added: Long
    y: Long

    def finish(self, position: Int, sums: list[Real], new: bool) -> None:
        """Adds what the warps have of a tile, in their order. Sums lie in two places in turn: one barrier a tile suffices.

        Behind the first barrier of a `new` block all squares of its part of x are there, behind another one their sums.
        """
        w, s = self.w, self.s
        warp, lane = w.thread >> 5, w.thread & 31
        place = self.shared + s.places.sums + (position & 1) * (s.sharers * s.units * 256) + lane * 8
        for quad in range(s.quads):  # warps that multiply rows of their own stand side by side
            w.store_shared(place + (warp * s.quads + quad) * 256, sums[2 * quad], sums[2 * quad + 1])
        w.barrier()
        if new and s.norm is not None:
            write_squares(w, s, self.shared, self._write_squares)
            w.barrier()
        for begin in range(0, s.units, s.warps):
            unit = (warp + s.warps - position % s.warps) % s.warps + begin  # warps take turns
            w.when(unit < s.units, lambda unit=unit: self._unit(position, place, unit))

    def _unit(self, position: Int, place: Int, unit: Int) -> None:
        """One warp adds what all have of four rows of x and sixteen of w."""
        w, s, handed = self.w, self.s, self.handed
        place = place + unit * 256
        parts = [w.load_shared(place + other * s.units * 256, 2) for other in range(s.sharers)]
        totals = []
        for half in (0, 1):
            total = w.as_real(parts[0][half])
            for other in parts[1:]:
                total = total + w.as_real(other[half])
            totals.append(total * 0.0625 if s.bits == 4 else total)  # codes are sixteen times themselves
        if handed is None:
            self._write(position, unit, totals)
            return
        w.when(self.order.given(position), lambda: handed.give(position, unit, totals))
        w.when(self.order.kept(position), lambda: self._write(position, unit, handed.take(position, unit, totals)))

    def _write(self, position: Int, unit: Int, totals: list[Real]) -> None:
        w, s = self.w, self.s
        row = (w.thread & 3) + unit % s.quads * 4
        if s.norm is not None:
            root = self._root(w.minimum(row, s.m - 1))
            totals = [total * root for total in totals]
        tile = self.order.tile(position)
        _store(w, s, row, tile if s.high == 1 else tile * s.high + unit // s.quads, totals, self.added, self.y)

    def _write_squares(self, row: int, total: Real) -> None:
        w, s = self.w, self.s
        if self.handed is not None:
            self.handed.give_squares(row, total)
        w.store_shared(self.shared + s.places.norms + 4 * row, total if self.handed else inverse_root(w, s, total))

    def _root(self, row: Int) -> Real:
        """1 / sqrt(mean x^2 + norm) of a row."""
        w, s = self.w, self.s
        found = w.as_real(w.load_shared(self.shared + s.places.norms + row * 4, 1)[0])
        return found if self.handed is None else inverse_root(w, s, self.handed.take_squares(row, found))


def _store(w: Warps, s: Shape, row: Int, tile: Int, totals: list[Real], added: Long, y: Long) -> None:
    """What a product does with the sums of rows g and g + 8 of sixteen rows of w, and their place in y."""
    if s.gated:
        totals = [totals[0] * w.logistic(totals[0]) * totals[1]]
    store, size = (w.store_bfloat16, 2) if s.whole else (w.store_real, 4)
    for half, total in enumerate(totals):
        column = tile * (TILE // 2 * len(totals)) + ((w.thread & 31) >> 2) + 8 * half
        if s.bias is not None:
            width = s.out * jnp.dtype(s.bias).itemsize if s.by_row else 0
            total = total + _element(w, added.times(w.minimum(row, s.m - 1), width), column, s.bias)
        at = y.times(row, s.out * size) + column * size
        w.when(row < s.m, lambda at=at, total=total: store(at, total))


def _element(w: Warps, base: Long, index: Int, dtype: Any) -> Real:
    """An element of a vector of 16 or 32 bits."""
    width = jnp.dtype(dtype).itemsize
    at = base + index * width
    return w.half_as_real(w.load_half(at), dtype) if width == 2 else w.as_real(w.load_shared_by_all(at, 1)[0])


def _early(w: Warps) -> None:
    """The end of the launch before this one, and the beginning of the next."""
    w.await_before()
    w.let_next_begin()


def direct(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, group: int, tiles: Direct, cores: int, bias: jax.Array | None = None,
    norm: float | None = None, whole: bool = True,
) -> jax.Array:  # fmt: skip
    """The kernel: y_mn = r_m sum_g s_ng t_mg (256 sum_g high c + sum_g low c) + b_n.

    Args:
      x: (M, K) bfloat16.
      codes: (N, K) int8, or int4 by threads (`order.by_threads`).
      scales: (N, G), rows of a multiple of 16 bytes; (N, 1) where a row shares one.
      group: consecutive k that share a scale, a multiple of 128.
      tiles: the cut.
      cores: multiprocessors.
      bias: (N,) or None.
      norm: r_m = 1 / sqrt(mean_k x_mk^2 + norm); None: 1.
      whole: y is bfloat16, else float32.

    Returns:
      (M, N).

    Raises:
      ValueError: the digits of x do not fit into shared memory; more blocks share K than live together; wide tiles of more than 16 rows.
    """
    (m, k), n = x.shape, codes.shape[0]
    if tiles.split_k > cores * tiles.blocks:
        raise ValueError(f"`tiles.split_k` is {tiles.split_k}: so many blocks wait for each other, {cores} multiprocessors hold "
                         f"{cores * tiles.blocks}; take fewer")  # fmt: skip
    if tiles.split_k > 1:
        check_waiting(tiles)
    if tiles.wide and m > 16:
        raise ValueError(f"`tiles` are {tiles}, x has {m} rows: wide ones take up to 16; leave `wide` False, or take Tiles(...)")
    s = shape_of(m, n, k, group=group, columns=scales.shape[1], dtype=scales.dtype, tiles=tiles, cores=cores, norm=norm, whole=whole,
                 bias=None if bias is None else bias.dtype, bits=4 if codes.dtype == jnp.int4 else 8)  # fmt: skip
    together, used = s.together(tiles.blocks, cores), s.launched_bytes(tiles.blocks, cores)
    if s.parts > 1 and together == 1 and s.blocks > cores:
        raise ValueError(f"`tiles` are {tiles}: {s.blocks} blocks wait for each other on {cores} multiprocessors, which is no whole number "
                         "of `blocks` each; leave `blocks` 1, or take another `split_k`")  # fmt: skip
    if used > SHARED_BYTES:
        raise ValueError(f"`tiles` need {used} bytes of shared memory for {m} rows of K = {k}, the GPU has {SHARED_BYTES}; split K"
                         + (", or take fewer `blocks`" if tiles.blocks > 1 else ""))  # fmt: skip
    operands, met = [x, codes, scales, *([] if bias is None else [bias])], room(s)

    def hopper_direct(*references):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(operands) + len(met) + 2))
        def work(_, *own):
            addresses = [device_address(ref) for ref in own[:-1]]
            start = shared_address(own[-1])
            w = Warps(together, tiles.warps)
            given, handed = addresses[: len(operands) + 1], addresses[len(operands) + 1 :]
            multiply(w, s, start + w.part * s.bytes, *given, wait=(lambda: _early(w)) if s.early else None,
                     room=Room(*handed) if handed else None)  # fmt: skip

        work(*references)  # pyright: ignore[reportCallIssue]

    warpgroups = together * tiles.warps // 4
    kernel = plgpu.kernel(
        hopper_direct,
        out_type=(jax.ShapeDtypeStruct((m, n), jnp.bfloat16 if s.whole else jnp.float32), *met),
        scratch_types=[plgpu.SMEM((used,), jnp.int8)],
        grid=(s.blocks // together,),
        grid_names=("n",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        **({} if warpgroups == 1 else {"num_threads": warpgroups, "thread_name": "wg"}),
    )
    return kernel(*operands)[0]
