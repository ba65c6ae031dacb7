"""The part of the kernel that loads weights directly that makes digits of x: a warp those of the pieces that it multiplies itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .direct_shape import Shape
from .tiles import FRACTION, PIECE
from .warps import Int, Long, Real, Warps

LANES = 8  # of a piece of a row: a thread takes sixteen elements
AHEAD = 2  # goes whose elements are loaded before the first digits are made
_WHOLE = 1.5 * 2**23  # added to it a number is rounded to a whole one, to even in the middle, which stands in the lower 16 bits


class Rows:
    """Rows of x on their way to shared memory.

    A thread takes the elements that meet two words of codes (`order`): four neighbours, the four that are eight further on, and the eight
    that are sixteen beyond these. Codes of eight bits take sixteen in a row.
    """

    def __init__(self, w: Warps, s: Shape, first: Int, x: Long) -> None:
        """The rows that begin at `x`; `first` is the block's first piece."""
        self.w, self.s, self.first, self.x = w, s, first, x
        self.lane = w.thread & (LANES - 1)

    def load(self, places: list[tuple[Int, Int]]) -> list[list[Int]]:
        """A thread's elements of pieces and rows, two in a word."""
        w, s, found = self.w, self.s, []
        for piece, row in places:
            inside = w.minimum(self.first + piece, s.pieces - 1)
            found.append(self.words(self.x.times(row, s.k * 2) + (inside * PIECE + self.element) * 2))
        return found

    @property
    def element(self) -> Int:
        """Which of a piece is a thread's first."""
        return (self.lane >> 1) * 32 + (self.lane & 1) * 4 if self.s.bits == 4 else self.lane * 16

    @property
    def half(self) -> Int:
        """Which half of a piece's bytes they go to: even or odd words of four bits, columns from 64 on of eight."""
        return self.lane & 1 if self.s.bits == 4 else self.lane >> 2

    def words(self, at: Long) -> list[Int]:
        """A thread's elements of 16 bits, where the first is at an address: pairs of words whose digits are four bytes."""
        w = self.w
        if self.s.bits == 8:
            return w.load_shared_by_all(at, 4) + w.load_shared_by_all(at + 16, 4)
        return nibble_words(w, at)

    def write(self, shared: Int, begin: Int) -> None:
        """Writes digits, units and sums of squares of `turn` pieces of all rows. What lies behind K has units of 0.

        Digits lie in the order in which threads hold nibbles: a piece in two halves, in which a row has 64 high digits and 64 low ones, the
        low ones first in the second half. So eight threads that write sixteen bytes each meet all banks. Those that the tensor cores read
        by themselves lie as these want them (`_spread`).

        Args:
          shared: where the block's shared memory begins.
          begin: the first of the pieces.
        """
        w, s = self.w, self.s
        wanted, threads = s.turn * s.m, 32 * s.high  # four warps that multiply together make digits together
        at_once = threads // LANES
        each = min(AHEAD, math.ceil(wanted / at_once))

        def some(i: Int, carry: list[Any]) -> list[Any]:
            places = []
            for j in range(each):
                number = w.minimum((i * each + j) * at_once + ((w.thread & (threads - 1)) >> 3), wanted - 1)
                places.append((begin + number // s.m, number % s.m))
            for (piece, row), words in zip(places, self.load(places), strict=True):
                self._write(shared, piece, row, words)
            return carry

        w.loop(w.integer(math.ceil(wanted / (at_once * each))), [], some)

    def _write(self, shared: Int, piece: Int, row: Int, words: list[Int]) -> None:
        """What `write` writes of a piece of a row."""
        w, s, half = self.w, self.s, self.half
        inside = self.first + piece < s.pieces
        ((unit, inverse),) = piece_units(w, [words])
        unit = w.where(inside, unit, w.integer(0))
        elements = as_elements(w, words)
        high, low = digit_words(w, elements, inverse, NIBBLES if s.bits == 4 else ((0, 1), (2, 3)))
        column, at = self.lane >> 1 if s.bits == 4 else self.lane & 3, shared + piece * s.piece_bytes
        if s.wide:
            self._spread(at + column * 4, row * 2, high)
            self._spread(at + column * 4, row * 2 + 1, low)
        else:
            at = at + row * 128 + half * (2 * s.m * 64) + column * 16
            w.store_shared(at + half * 64, *high)
            w.store_shared(at + 64 - half * 64, *low)
        place, first = shared + s.places.units + (piece * s.m + row) * 4, self.lane == 0
        w.when(first, lambda: w.store_shared(place, unit))
        if s.norm is not None:
            squares = elements[0] * elements[0]
            for element in elements[1:]:
                squares = w.fma(element, element, squares)
            for distance in (4, 2, 1):
                squares = squares + w.neighbour(squares, distance)
            squares = w.where(inside, squares, w.real(0.0))
            w.when(first, lambda: w.store_shared(place + (s.places.squares - s.places.units), squares))

    def _spread(self, at: Int, column: Int, words: list[Int]) -> None:
        """Four bytes each of the four stretches of 16 k that a thread has digits of, where `group_products` looks for them."""
        stretch = 8 * self.s.quads * 16
        for i, word in enumerate(words):
            self.w.store_shared(at + column * 16 + (self.half * 4 + i) * stretch, word)


def nibble_words(w: Warps, at: Long) -> list[Int]:
    """A thread's sixteen elements that meet nibbles, where the first is at an address: pairs of words whose digits are four bytes."""
    return met_by_nibbles(*(w.load_shared_by_all(at + distance, 2) for distance in (0, 16, 32, 48)))


def met_by_nibbles(near: list[Int], next_: list[Int], far: list[Int], last: list[Int]) -> list[Int]:
    """Four neighbours each, eight elements from one to the next, in the order of nibbles."""
    return [near[0], far[0], next_[0], last[0], near[1], far[1], next_[1], last[1]]


def as_elements(w: Warps, words: list[Int]) -> list[Real]:
    """Two bfloat16 a word."""
    return [w.as_real(bits) for word in words for bits in (word << 16, word & 0xFFFF0000)]


def piece_units(w: Warps, pieces: list[list[Int]]) -> list[tuple[Int, Real]]:
    """Of each piece the bits of its unit (`digits_kernel.units`), and the inverse, by the eight threads that have its elements.

    Shifted by one, only exponents are compared.
    """
    tops = []
    for words in pieces:
        each = [word << 1 for word in words]
        while len(each) > 1:
            each = [w.larger_halves(a, b) for a, b in zip(each[::2], each[1::2], strict=True)]
        tops += each
    for distance in (4, 2, 1):  # one behind the other, a piece would wait for itself
        others = [w.neighbour(w.as_real(top), distance) for top in tops]
        tops = [w.larger_halves(top, w.as_integer(other)) for top, other in zip(tops, others, strict=True)]
    return [_unit(w, w.maximum(top >> 24, (top >> 8) & 255)) for top in tops]


def _unit(w: Warps, top: Int) -> tuple[Int, Real]:
    field = w.maximum(top, FRACTION + 1) - FRACTION
    return w.where(top == 255, w.integer(0x7FC00000), field << 23), w.as_real((w.integer(254) - field) << 23)


NIBBLES = ((0, 2), (1, 3))  # the order of four elements whose codes are nibbles


def digit_words(w: Warps, elements: list[Real], inverse: Real, pairs: tuple[tuple[int, int], ...]) -> tuple[list[Int], list[Int]]:
    """Words of high and of low digits (`digits_kernel.digits`), of four elements each in the order of two pairs."""
    high, low = [], []
    values = [w.as_integer(w.fma(element, inverse, w.real(_WHOLE + 128))) for element in elements]
    for start in range(0, len(values), 4):
        near, far = (w.permute(values[start + i], values[start + j], 0x5410) for i, j in pairs)
        high.append(w.permute(near, far, 0x7531))
        low.append(w.permute(near, far, 0x6420) ^ 0x80808080)  # 128 more than it is
    return high, low


def write_nothing(w: Warps, s: Shape, shared: Int) -> None:
    """Zeros where nobody writes what warps read: pieces behind the block's own (`Shape.held`), columns behind the last row."""
    behind, spare = (s.held - s.own) * s.m, s.wide and s.m % 4 > 0
    if behind == 0 and not spare:
        return
    begin, units = 0 if spare else s.own, shared + s.places.units + s.own * s.m * 4
    digits, count = shared + begin * s.piece_bytes, (s.held - begin) * s.piece_bytes // 16  # sixteen bytes at a time
    zeros, threads = [w.integer(0)] * 4, 32 * s.warps
    for start in range(0, count, threads):
        number = w.thread + start
        w.when(number < count, lambda number=number: w.store_shared(digits + number * 16, *zeros))
    for start in range(0, behind, threads):
        number = w.thread + start
        w.when(number < behind, lambda number=number: w.store_shared(units + number * 4, zeros[0]))
    w.barrier()


def write_squares(w: Warps, s: Shape, shared: Int, write: Callable[[int, Real], None]) -> None:
    """The sum of squares of every row, from those of the block's pieces, each by one thread."""
    warp, lane = w.thread >> 5, w.thread & 31

    def add(row: int) -> None:
        total = w.real(0.0)
        for turn in range(math.ceil(s.own / 32)):
            piece = w.minimum(lane + 32 * turn, s.own - 1)
            part = w.as_real(w.load_shared(shared + s.places.squares + (piece * s.m + row) * 4, 1)[0])
            total = total + w.where(lane + 32 * turn < s.own, part, w.real(0.0))
        total = w.warp_sum(total)
        w.when(lane == 0, lambda: write(row, total))

    for row in range(s.m):
        w.when(warp == row % s.warps, lambda row=row: add(row))


def inverse_root(w: Warps, s: Shape, squares: Real) -> Real:
    """1 / sqrt(mean x^2 + norm) of a row."""
    return w.inverse_root(w.fma(squares, w.real(1 / s.k), w.real(s.norm or 0.0)))
