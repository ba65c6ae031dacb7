"""Codes and scales on their way from device memory to the tensor cores."""

from __future__ import annotations

import jax.numpy as jnp

from .direct_parts import Order
from .direct_shape import TILE, Shape
from .tiles import PIECE
from .warps import Int, Long, Real, Warps


class Codes:
    """Codes and scales of a block: of a piece a thread takes 16 bytes (32 with eight bits) of rows g and g + 8; four lanes share a row.

    The scales of a turn come in one of three ways: those of neighbouring groups in one load (`packed`), which all four lanes have; or, of
    four pieces whose scales fill more than two words, one in each lane (`spread`), since copies would take the registers of codes; or one
    a piece.
    """

    def __init__(self, w: Warps, s: Shape, order: Order, codes: Long, scales: Long) -> None:
        """Those that begin at `codes` and `scales`."""
        self.w, self.s, self.order = w, s, order
        lane = w.thread & 31
        row = (lane >> 2) + (w.thread >> 5 & 3) * TILE if s.wide else lane >> 2
        self.codes = codes.times(row, s.k * s.bits // 8) + (lane & 3) * 16
        self.scales = scales.times(row, s.columns * self.width)
        # A scale a row has no neighbours, even of K = 128.
        neighbours, size = s.group == PIECE and s.columns * self.width % 16 == 0, s.turn * self.width
        self.packed = neighbours and size in (4, 8, 16) and not (s.turn == 4 and self.width == 4)
        self.spread = s.turn == 4 and not self.packed
        self.scale_words = size // 4 if self.packed else 1 if self.spread else s.turn  # of a row

    @property
    def width(self) -> int:
        """Bytes of a scale."""
        return jnp.dtype(self.s.dtype).itemsize

    @property
    def count(self) -> int:
        """Words of a turn."""
        return self.s.words * self.s.turn + 2 * self.scale_words

    def load(self, i: Int) -> list[Int]:
        """Codes of rows g and g + 8 of a block's turn i, then their scales; zeros behind the last one and behind the end of K."""
        w, s, order = self.w, self.s, self.order
        piece, first = piece_of(w, s, i % s.rounds), order.member * s.own
        there = w.both(w.both(i < order.count * s.rounds, piece < s.own), first + piece < s.pieces)
        return w.only_where(there, lambda: self._load(order.tile(i // s.rounds), first + piece), self.count)

    def _load(self, tile: Int, first: Int) -> list[Int]:
        w, s = self.w, self.s
        pieces = [first + u if s.pieces % s.turn == 0 else w.minimum(first + u, s.pieces - 1) for u in range(s.turn)]
        found: list[Int] = []
        row = s.k * s.bits // 8  # bytes
        near = self.codes.times(tile, s.high * TILE * row)
        for piece in pieces:
            at = near + piece * (PIECE * s.bits // 8)
            for place in (at, at + 8 * row):
                for stretch in range(s.bits // 4):
                    found += w.load(place + 64 * stretch, 4)
        near = self.scales.times(tile, s.high * TILE * s.columns * self.width)
        for half in (0, 1):
            at = near + half * 8 * s.columns * self.width
            if self.packed:
                found += w.load_shared_by_all(at + first * self.width, self.scale_words)
                continue
            own = [w.minimum(first + (w.thread & 3), s.pieces - 1)] if self.spread else pieces
            for piece in own:
                column = at + (piece * PIECE // s.group) * self.width
                found += [w.load_half(column)] if self.width == 2 else w.load_shared_by_all(column, 1)
        return found

    def taken(self, found: list[Int], u: int) -> tuple[list[Int], list[Int], list[Real]]:
        """Codes of rows g and g + 8 of piece u of a turn, and their scales."""
        s, w = self.s, self.w
        codes, rest = found[s.words * u : s.words * (u + 1)], found[s.words * s.turn :]
        scales = []
        for half in (0, 1):
            words = rest[half * self.scale_words :]
            if self.packed and self.width == 2:
                word = words[u // 2] >> 16 if u % 2 else words[u // 2] & 0xFFFF
            else:
                word = w.of_four(words[0], u) if self.spread else words[u]
            scales.append(w.as_real(word) if self.width == 4 else w.half_as_real(word, s.dtype))
        return codes[: s.bits], codes[s.bits :], scales


def piece_of(w: Warps, s: Shape, turn: Int) -> Int:
    """The first piece that a warp takes of a block's part of K in a turn of a tile."""
    return (turn * s.sharers + (w.thread >> (7 if s.wide else 5))) * s.turn
