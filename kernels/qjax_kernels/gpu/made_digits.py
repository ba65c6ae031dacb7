"""Digits of a tile of x, made in shared memory by the warpgroup that copies: the tensor cores read them there."""

from __future__ import annotations

import math
from typing import Any

from .direct_rows import LANES, NIBBLES, as_elements, digit_words, met_by_nibbles, piece_units
from .parts import THREADS
from .tiles import PIECE
from .warps import Int, Warps

_AHEAD = 4  # pieces whose elements a thread has in registers at once


def make(w: Warps, block_m: int, block_k: int, x: Int, digits: Int, units: Int) -> None:
    """A tile of rows as two signed digits to the base 256 and a unit for 128 columns (`digits_kernel.digits`, `.units`).

    Eight threads take a piece of a row, each the sixteen elements that meet two words of codes (`order`).

    Args:
      w: the instructions.
      block_m: rows, a multiple of 8.
      block_k: columns, a multiple of 128.
      x: where the tile (block_m, block_k) bfloat16 begins in shared memory, row behind row (`mosaic.swizzled_rows`).
      digits: where (2 block_m, block_k) int8 begin, as the tensor cores read them: the high digits, then the low ones, columns in the
        order in which nibbles are met (`digits_kernel.as_met`).
      units: where (block_k / 128, block_m) float32 begin.
    """
    thread = w.thread % THREADS
    pieces = block_k // PIECE
    lane, wanted, at_once = thread & (LANES - 1), block_m * pieces, THREADS // LANES
    each = min(_AHEAD, math.ceil(wanted / at_once))

    def some(go: Int, carry: list[Any]) -> list[Any]:
        numbers = [w.minimum((go * each + i) * at_once + thread // LANES, wanted - 1) for i in range(each)]
        places = [(number % block_m, number // block_m) for number in numbers]
        taken = [_taken(w, x, block_k, lane, *place) for place in places]
        for (row, piece), words, (unit, inverse) in zip(places, taken, piece_units(w, taken), strict=True):
            for side, found in enumerate(digit_words(w, as_elements(w, words), inverse, NIBBLES)):
                at = digits + _tile(row + side * block_m, piece, pieces) + (lane & 1) * 8
                for parity in (0, 1):
                    w.store_shared(at + (((lane >> 1) * 2 + parity) ^ (row & 7)) * 16, found[parity], found[parity + 2])
            w.when(lane == 0, lambda row=row, piece=piece, unit=unit: w.store_shared(units + (piece * block_m + row) * 4, unit))
        return carry

    w.loop(w.integer(math.ceil(wanted / (at_once * each))), [], some)
    w.meet_tensor_cores()


def _tile(row: Int, column: Int, columns: int) -> Int:
    """Where a row begins in a tile of eight rows of 128 bytes, of which so many lie side by side; its sixteens are swapped by the row."""
    return ((row >> 3) * columns + column) * 1024 + (row & 7) * 128


def _taken(w: Warps, x: Int, block_k: int, lane: Int, row: Int, piece: Int) -> list[Int]:
    """A thread's elements, as `direct_rows.nibble_words` gives them."""
    stretch = row * (block_k // 64) + piece * 2 + (lane >> 2)  # of 128 bytes, whose sixteens are swapped by its number
    at, first = x + stretch * 128 + (lane & 1) * 8, ((lane >> 1) & 1) * 4
    return met_by_nibbles(*(w.load_shared(at + ((first + i) ^ (stretch & 7)) * 16, 2) for i in range(4)))
