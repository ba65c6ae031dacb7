"""The first part of the kernel that loads weights directly: a block's rows of x as digits in shared memory."""

from __future__ import annotations

import math
from typing import Any

from .direct_shape import Shape
from .tiles import FRACTION, PIECE
from .warps import Int, Long, Real, Warps

AHEAD = 8  # pieces of x whose elements are loaded at once


class Rows:
    """Rows of x on their way to shared memory.

    A warp takes a piece of a row, a thread four elements of it: those that meet half the nibbles of a word (`order`), which are two
    neighbours and the two that are sixteen further on. Codes of eight bits take four in a row.
    """

    def __init__(self, w: Warps, s: Shape, first: Int, x: Long) -> None:
        """The rows that begin at `x`; `first` is the block's first piece."""
        self.w, self.s, self.first, self.x = w, s, first, x
        self.total = s.held * s.m
        self.each = min(AHEAD, math.ceil(self.total / s.warps))  # pieces of a warp at once

    def _places(self, turn: Int) -> list[tuple[Int, Int]]:
        """Pieces and rows of a turn."""
        w, s = self.w, self.s
        numbers = [w.minimum((turn * self.each + j) * s.warps + (w.thread >> 5), self.total - 1) for j in range(self.each)]
        return [(number // s.m, number % s.m) for number in numbers]

    def load(self, turn: Int) -> list[Int]:
        """The elements of a turn, two in a word."""
        w, s, found = self.w, self.s, []
        for piece, row in self._places(turn):
            inside = w.minimum(self.first + piece, s.pieces - 1)
            found += self.words(self.x.times(row, s.k * 2) + (inside * PIECE + self.element) * 2)
        return found

    @property
    def element(self) -> Int:
        """Which of a piece is a thread's first."""
        lane = self.w.thread & 31
        return (lane >> 3) * 32 + (lane & 7) * 2 if self.s.bits == 4 else lane * 4

    def words(self, at: Long) -> list[Int]:
        """A thread's four elements of 16 bits, where the first is at an address."""
        w = self.w
        return w.load_shared_by_all(at, 1) + w.load_shared_by_all(at + 32, 1) if self.s.bits == 4 else w.load_shared_by_all(at, 2)

    def write(self, shared: Int) -> None:
        """Writes digits of x, in the order in which threads hold nibbles, units and sums of squares. What lies behind K has units of 0.

        Args:
          shared: where the block's shared memory begins.
        """

        def some(i: Int, carry: list[Any]) -> list[Any]:
            self._write(shared, i, self.load(i))
            return carry

        self.w.loop(self.w.integer(math.ceil(self.total / (self.s.warps * self.each))), [], some)

    def _write(self, shared: Int, turn: Int, loaded: list[Int]) -> None:
        """What `write` writes of a turn."""
        w, s, lane = self.w, self.s, self.w.thread & 31
        half = 2 * s.m * 64
        if s.bits == 4:
            # The words of 32 columns are steps 0 to 3; steps lie in halves of two, even nibbles before odd ones.
            own = (lane >> 3) * 16 + ((lane >> 1) & 1) * half + (lane & 1) * 8 + ((lane >> 2) & 1) * 4
        else:  # words as they are, sixteen bytes of four lanes, in halves of 64 columns
            own = ((lane >> 2) & 3) * 16 + (lane >> 4) * half + (lane & 3) * 4
        for j, (piece, row) in enumerate(self._places(turn)):
            place = shared + s.places.units + (piece * s.m + row) * 4
            at = shared + (piece * (4 * s.m) + row * 2) * 64 + own
            _piece(w, s, at, place, self.first + piece < s.pieces, *loaded[2 * j : 2 * j + 2])


def _piece(w: Warps, s: Shape, at: Int, at_unit: Int, inside: Any, a: Int, b: Int) -> None:
    """The digits of four elements, and the unit of their piece; see `digits_kernel.units` and `digits`."""
    lane = w.thread & 31
    top = w.larger_halves(a & 0x7FFF7FFF, b & 0x7FFF7FFF)
    top = w.warp_maximum(w.maximum(top >> 16, top & 0xFFFF)) >> 7
    field = w.maximum(top, FRACTION + 1) - FRACTION
    unit = w.where(top == 255, w.integer(0x7FC00000), field << 23)
    unit = w.where(inside, unit, w.integer(0))
    inverse = w.as_real((w.integer(254) - field) << 23)
    elements = [w.as_real(bits) for bits in (a << 16, a & 0xFFFF0000, b << 16, b & 0xFFFF0000)]
    # Added to 1.5 x 2^23 a number is rounded to a whole one, to even in the middle, which stands in the lower 16 bits: no more is used.
    values = [w.as_integer(w.fma(element, inverse, w.real(1.5 * 2**23))) for element in elements]
    high = [value + 128 for value in values]
    pairs = ((0, 2), (1, 3)) if s.bits == 4 else ((0, 1), (2, 3))
    for place, digit, byte in ((at, high, 0x0051), (at + 64, values, 0x0040)):
        near, far = (w.permute(digit[i], digit[j], byte) for i, j in pairs)
        w.store_shared(place, w.permute(near, far, 0x5410))
    w.when(lane == 0, lambda: w.store_shared(at_unit, unit))
    if s.norm is not None:
        squares = elements[0] * elements[0]
        for element in elements[1:]:
            squares = w.fma(element, element, squares)
        squares = w.where(inside, w.warp_sum(squares), w.real(0.0))
        w.when(lane == 0, lambda: w.store_shared(at_unit + (s.places.squares - s.places.units), squares))


def write_norms(w: Warps, s: Shape, shared: Int) -> None:
    """1 / sqrt(mean x^2 + norm) of every row, by the first warps, from the sums of squares of its pieces."""
    warp, lane, least = w.thread >> 5, w.thread & 31, w.real(s.norm or 0.0)

    def norm(row: int) -> None:
        total = w.real(0.0)
        for turn in range(math.ceil(s.held / 32)):
            piece = w.minimum(lane + 32 * turn, s.held - 1)
            part = w.as_real(w.load_shared(shared + s.places.squares + (piece * s.m + row) * 4, 1)[0])
            total = total + w.where(lane + 32 * turn < s.held, part, w.real(0.0))
        root = w.inverse_root(w.fma(w.warp_sum(total), w.real(1 / s.k), least))
        w.when(lane == 0, lambda: w.store_shared(shared + s.places.norms + 4 * row, root))

    for row in range(s.m):
        w.when(warp == row % s.warps, lambda row=row: norm(row))


def norm_of(w: Warps, s: Shape, shared: Int, row: Int) -> Real:
    """What `write_norms` found for a row."""
    return w.as_real(w.load_shared(shared + s.places.norms + w.minimum(row, s.m - 1) * 4, 1)[0])
