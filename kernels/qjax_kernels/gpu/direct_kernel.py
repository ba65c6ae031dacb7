"""The Hopper kernel of products with few rows: warps load codes straight into operand A of the tensor cores.

Sixteen rows of w are a tile: the warps of a block share its K, a few pieces of 128 at a time, and the loads of the next pieces are on
their way while the tensor cores work. A warp meets the same pieces in every tile: it makes their digits while it works on its first one,
for itself alone, and keeps them in shared memory; codes never pass through it. Blocks stay on their multiprocessor and take tiles in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from .direct_rows import Rows, norm_of, write_norms, write_nothing
from .direct_shape import TILE, Shape, shape_of
from .mosaic import LANE
from .tiles import PIECE, SHARED_BYTES, Direct
from .warps import Int, Long, Real, Warps


def multiply(
    w: Warps, s: Shape, shared: Int, x: Long, codes: Long, scales: Long, *rest: Long, wait: Callable[[], None] | None = None,
    rows: Callable[[Int], Rows] | None = None,
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
    """
    bias, y = rest[0], rest[-1]
    part, begin, each = w.block % s.parts, w.block // s.parts, s.blocks // s.parts
    tiles, first = s.n // TILE, part * s.own
    flat = (w.integer(tiles + each - 1) - begin) // each * s.rounds
    source = _Source(w, s, first, codes, scales)
    ahead = source.load(begin, w.integer(0), w.integer(0) < flat)
    if wait is not None:
        wait()  # attention has the same shared memory
    write_nothing(w, s, shared)
    own = Rows(w, s, first, x) if rows is None else rows(first)

    def step(i: Int, carry: list[Any], new: bool) -> list[Any]:
        """Turn i; in a `new` block digits are still to be made."""
        now, sums = carry[: source.count], carry[source.count :]
        turn, tile = i % s.rounds, i // s.rounds
        ahead = source.load(begin + ((i + 1) // s.rounds) * each, (i + 1) % s.rounds, i + 1 < flat)
        sums = [w.where(turn == 0, w.real(0.0), total) for total in sums]
        piece = (turn * s.warps + (w.thread >> 5)) * s.turn
        if new:
            w.when(piece < s.own, lambda: own.write(shared, piece))
            w.warp_barrier()
        piece = w.minimum(piece, s.held - s.turn)
        for u in range(s.turn):
            sums = _piece(w, s, shared, piece + u, *source.taken(now, u), sums)
        w.when(turn == s.rounds - 1, lambda: _finish(w, s, shared, tile, part, begin + tile * each, sums, bias, y, new))
        return [*ahead, *sums]

    first_tile = w.minimum(flat, s.rounds)
    carry = w.loop(first_tile, [*ahead, *[w.real(0.0)] * (2 * s.quads)], lambda i, carry: step(i, carry, True))
    w.loop(flat - first_tile, carry, lambda i, carry: step(i + s.rounds, carry, False))


class _Source:
    """Loads of codes and scales: of a piece a thread takes 16 bytes (32 with eight bits) of rows g and g + 8; four lanes share a row."""

    def __init__(self, w: Warps, s: Shape, first: Int, codes: Long, scales: Long):
        self.w, self.s, self.first = w, s, first
        lane = w.thread & 31
        self.codes = codes.times(lane >> 2, s.k * s.bits // 8) + (lane & 3) * 16
        self.scales = scales.times(lane >> 2, s.columns * self.width)
        # Scales of neighbouring groups in one load, where they fill words.
        self.words = s.turn * self.width // 4 if s.group == PIECE and s.turn * self.width in (4, 8, 16) else 0
        self.count = s.words * s.turn + 2 * (self.words or s.turn)

    @property
    def width(self) -> int:
        """Bytes of a scale."""
        return jnp.dtype(self.s.dtype).itemsize

    def load(self, tile: Int, turn: Int, wanted: Any) -> list[Int]:
        """Codes of rows g and g + 8, then their scales; zeros where they are not wanted and behind the end of K."""
        w, s = self.w, self.s
        piece = (turn * s.warps + (w.thread >> 5)) * s.turn
        wanted = w.both(w.both(wanted, piece < s.own), self.first + piece < s.pieces)
        return w.only_where(wanted, lambda: self._load(tile, self.first + piece), self.count)

    def _load(self, tile: Int, first: Int) -> list[Int]:
        w, s = self.w, self.s
        pieces = [first + u if s.pieces % s.turn == 0 else w.minimum(first + u, s.pieces - 1) for u in range(s.turn)]
        found: list[Int] = []
        row = s.k * s.bits // 8  # bytes
        near = self.codes.times(tile, TILE * row)
        for piece in pieces:
            at = near + piece * (PIECE * s.bits // 8)
            for place in (at, at + 8 * row):
                for stretch in range(s.bits // 4):
                    found += w.load(place + 64 * stretch, 4)
        near = self.scales.times(tile, TILE * s.columns * self.width)
        for half in (0, 1):
            at = near + half * 8 * s.columns * self.width
            if self.words:
                found += w.load_shared_by_all(at + first * self.width, self.words)
                continue
            for piece in pieces:
                column = at + (piece * PIECE // s.group) * self.width
                found += [w.load_half(column)] if self.width == 2 else w.load_shared_by_all(column, 1)
        return found

    def taken(self, found: list[Int], u: int) -> tuple[list[Int], list[Int], list[Real]]:
        """Codes of rows g and g + 8 of piece u, and their scales."""
        s, w = self.s, self.w
        codes, rest = found[s.words * u : s.words * (u + 1)], found[s.words * s.turn :]
        scales = []
        for half in (0, 1):
            words = rest[half * (self.words or s.turn) :]
            if self.width == 4:
                scales.append(w.as_real(words[u]))
            elif self.words:
                word = words[u // 2]
                scales.append(w.half_as_real(word >> 16 if u % 2 else word & 0xFFFF, s.dtype))
            else:
                scales.append(w.half_as_real(words[u], s.dtype))
        return codes[: s.bits], codes[s.bits :], scales


def _piece(
    w: Warps, s: Shape, shared: Int, piece: Int, upper: list[Int], lower: list[Int], scales: list[Real], sums: list[Real]
) -> list[Real]:
    """The sums with one piece of K in them.

    Operand A wants four bytes of row g and of g + 8 in columns 4t to 4t + 3, and four more in 16 + 4t on. A word of eight codes gives both:
    the even nibbles, moved up, and the odd ones, each sixteen times itself; of eight-bit codes it takes two words. Digits of x lie in the
    same order.
    """
    lane = w.thread & 31
    if s.bits == 4:
        left = [[(a << 4) & 0xF0F0F0F0, (b << 4) & 0xF0F0F0F0, a & 0xF0F0F0F0, b & 0xF0F0F0F0] for a, b in zip(upper, lower, strict=True)]
    else:
        left = [[upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]] for i in range(4)]
    new = list(sums)
    for quad in range(s.quads):
        # Columns behind the last row of x repeat it; their sums are not stored. Low digits come first in the second half.
        column = w.minimum((lane >> 2) + 8 * quad, 2 * s.m - 1)
        at = shared + (piece * (4 * s.m) + column) * 64 + (lane & 3) * 16
        right = w.load_shared(at, 4) + w.load_shared(at + (2 * s.m + 1) * 64 - (column & 1) * 128, 4)
        total = [w.integer(0)] * 4
        for i in range(4):
            total = w.product(left[i], right[2 * i : 2 * i + 2], total)
        row = w.minimum((lane & 3) + 4 * quad, s.m - 1)
        unit = w.as_real(w.load_shared(shared + s.places.units + (piece * s.m + row) * 4, 1)[0])
        for half in (0, 1):
            whole = w.to_real((total[2 * half] << 8) + total[2 * half + 1])
            new[2 * quad + half] = w.fma(whole, scales[half] * unit, new[2 * quad + half])
    return new


def _finish(
    w: Warps, s: Shape, shared: Int, number: Int, part: Int, tile: Int, sums: list[Real], bias: Long, y: Long, new: bool
) -> None:
    """Adds what the warps have of a tile, in their order, and writes it. Sums lie in two places in turn: one barrier a tile suffices.

    Behind the first barrier of a `new` block all squares of x are there, behind another one its norms.
    """
    warp, lane = w.thread >> 5, w.thread & 31
    place = shared + s.places.sums + (number & 1) * (s.warps * s.quads * 256) + lane * 8
    for quad in range(s.quads):
        w.store_shared(place + (warp * s.quads + quad) * 256, sums[2 * quad], sums[2 * quad + 1])
    w.barrier()
    if new and s.norm is not None:
        write_norms(w, s, shared)
        w.barrier()

    def write(quad: int) -> None:
        parts = [w.load_shared(place + (other * s.quads + quad) * 256, 2) for other in range(s.warps)]
        row, totals = (lane & 3) + 4 * quad, []
        for half in (0, 1):
            total = w.as_real(parts[0][half])
            for other in parts[1:]:
                total = total + w.as_real(other[half])
            if s.bits == 4:
                total = total * 0.0625  # codes are sixteen times themselves
            totals.append(total if s.norm is None else total * norm_of(w, s, shared, row))
        _store(w, s, part, row, tile, totals, bias, y)

    for quad in range(s.quads):
        w.when(warp == (number + quad) % s.warps, lambda quad=quad: write(quad))


def _store(w: Warps, s: Shape, part: Int, row: Int, tile: Int, totals: list[Real], added: Long, y: Long) -> None:
    """What a product does with the sums of rows g and g + 8 of a tile, and their place in y."""
    if s.gated:
        totals = [totals[0] * w.logistic(totals[0]) * totals[1]]
    store, size = (w.store_bfloat16, 2) if s.whole else (w.store_real, 4)
    for half, total in enumerate(totals):
        column = tile * (TILE // 2 * len(totals)) + ((w.thread & 31) >> 2) + 8 * half
        if s.bias is not None:
            width = s.out * jnp.dtype(s.bias).itemsize if s.by_row else 0
            total = total + _element(w, added.times(w.minimum(row, s.m - 1), width), column, s.bias)
        at = y.times(part * s.m + row, s.out * size) + column * size
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
      (M, N); with a split K (split_k, M, N) float32, without norm and bias.

    Raises:
      ValueError: the digits of x do not fit into shared memory; a split K with norm or bias.
    """
    (m, k), n, parts = x.shape, codes.shape[0], tiles.split_k
    if parts > 1 and not (bias is None and norm is None):
        raise ValueError(f"`tiles.split_k` is {parts}: bias and norm belong behind the sum of the parts")
    s = shape_of(m, n, k, group=group, columns=scales.shape[1], dtype=scales.dtype, tiles=tiles, cores=cores,
                 bias=None if bias is None else bias.dtype, norm=norm, whole=whole and parts == 1,
                 bits=4 if codes.dtype == jnp.int4 else 8)  # fmt: skip
    if s.places.end > SHARED_BYTES:
        raise ValueError(f"`tiles` need {s.places.end} bytes of shared memory for {m} rows of K = {k}, the GPU has {SHARED_BYTES}; split K")
    operands = [x, codes, scales, *([] if bias is None else [bias])]

    def hopper_direct(*references):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (len(operands) + 2))
        def work(_, *own):
            addresses = [Long(llvm.ptrtoint(ir.Type.parse("i64"), mgpu_utils.memref_ptr(ref))) for ref in own[:-1]]
            start = Int(llvm.ptrtoint(ir.Type.parse("i32"), mgpu_utils.memref_ptr(own[-1])))
            w = Warps()
            multiply(w, s, start, *addresses, wait=(lambda: _early(w)) if s.early else None)

        work(*references)  # pyright: ignore[reportCallIssue]

    warpgroups = tiles.warps // 4
    kernel = plgpu.kernel(
        hopper_direct,
        out_type=jax.ShapeDtypeStruct((parts, m, n) if parts > 1 else (m, n), jnp.bfloat16 if s.whole else jnp.float32),
        scratch_types=[plgpu.SMEM((s.places.end,), jnp.int8)],
        grid=(s.blocks,),
        grid_names=("n",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        **({} if warpgroups == 1 else {"num_threads": warpgroups, "thread_name": "wg"}),
    )
    return kernel(*operands)
