"""Thread blocks that share the K of their tiles: which of them finishes a tile, and how the sums of the others reach it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .direct_shape import Shape
from .parts import SIGN
from .warps import Int, Long, Real, Warps

_PLACE = 32 * 2 * 4  # bytes: a thread has two sums of four rows of x and sixteen of w


class Room(NamedTuple):
    """Where signs and sums begin: what a launch gives besides its result (`parts.room` says why it is nothing that comes in)."""

    signs: Long
    sums: Long


def room(s: Shape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Signs of 64 bits and sums of every tile, block of its group and unit, then squares of rows; nothing where K is not shared."""
    if s.parts == 1:
        return ()
    places = s.groups * s.most * s.parts * s.units
    squares = 0 if s.norm is None else s.blocks * s.m
    return jax.ShapeDtypeStruct((2 * places,), jnp.int32), jax.ShapeDtypeStruct((places * _PLACE // 4 + squares,), jnp.float32)


class Order:
    """The tiles of a block, by their position in its work.

    The blocks of a group work on the same tiles, each on its part of K, and each finishes a stretch of them. A block comes to its own last:
    the sums of the others are there by then. Giving waits for nobody, and the blocks of a group are neighbours, so that whoever is waited
    for has begun, or begins when a group before it ends: the launch has no more blocks than live together, and GPUs begin them in order.
    """

    def __init__(self, w: Warps, s: Shape) -> None:
        """That of the block which runs."""
        self.w, self.s = w, s
        self.member, self.group = w.block % s.parts, w.block // s.parts
        self.count = (w.integer(s.tiles + s.groups - 1) - self.group) // s.groups
        self.end = (self.member + 1) * self.count // s.parts  # of the stretch
        self.others = self.count + self.member * self.count // s.parts - self.end

    def local(self, position: Int) -> Int:
        """Which of the group's tiles."""
        if self.s.parts == 1:
            return position
        at = self.end + position
        return self.w.where(at < self.count, at, at - self.count)

    def tile(self, position: Int) -> Int:
        """Which of all."""
        return self.group + self.local(position) * self.s.groups

    def given(self, position: Int) -> Any:
        """Whether another block finishes it."""
        return position < self.others

    def kept(self, position: Int) -> Any:
        """Whether this block does."""
        return self.others < position + 1


class Handed:
    """Sums on their way between the blocks of a group, by whole warps: a unit is four rows of x and sixteen of w."""

    def __init__(self, w: Warps, s: Shape, order: Order, room: Room) -> None:
        """Those of the block which runs."""
        self.w, self.s, self.order, self.room = w, s, order, room
        self.lane = w.thread & 31

    def give(self, position: Int, unit: Int, totals: list[Real]) -> None:
        """Writes what this block has of a tile, and says so."""
        w, number = self.w, self._number(position, self.order.member, unit)
        w.store_words(self.room.sums.times(number, _PLACE) + self.lane * 8, *totals)
        w.warp_barrier()
        w.when(self.lane == 0, lambda: w.show(self.room.signs.times(number, 8), SIGN))

    def take(self, position: Int, unit: Int, totals: list[Real]) -> list[Real]:
        """Sums with those of the others, always in the same order; a thread waits for each of them."""
        w, s = self.w, self.s
        theirs = self._number(position, self._other(self.lane), unit)
        w.when(self.lane < s.parts - 1, lambda: w.await_sign(self.room.signs.times(theirs, 8), SIGN))
        w.warp_barrier()
        numbers = [self._number(position, self._other(w.integer(i)), unit) for i in range(s.parts - 1)]
        for found in [w.load_shared_by_all(self.room.sums.times(number, _PLACE) + self.lane * 8, 2) for number in numbers]:
            totals = [total + w.as_real(word) for total, word in zip(totals, found, strict=True)]
        return totals

    def give_squares(self, row: int, total: Real) -> None:
        """Writes the sum of squares that this block has of a row, before a barrier and the first sums that are given."""
        self.w.store_real(self._squares(self.order.member, self.w.integer(row)), total)

    def take_squares(self, row: Int, total: Real) -> Real:
        """The sum of squares of a whole row, behind the first sums that were taken."""
        places = [self._squares(self._other(self.w.integer(i)), row) for i in range(self.s.parts - 1)]
        for found in [self.w.load_shared_by_all(place, 1) for place in places]:
            total = total + self.w.as_real(found[0])
        return total

    def _other(self, i: Int) -> Int:
        """The block that is i + 1 behind this one."""
        return (self.order.member + 1 + i) % self.s.parts

    def _number(self, position: Int, member: Int, unit: Int) -> Int:
        tile = self.order.group * self.s.most + self.order.local(position)
        return (tile * self.s.parts + member) * self.s.units + unit

    def _squares(self, member: Int, row: Int) -> Long:
        s = self.s
        behind = self.room.sums + self.w.integer(s.groups * s.most * s.parts * s.units * _PLACE)
        return behind.times((self.order.group * s.parts + member) * s.m + row, 4)
