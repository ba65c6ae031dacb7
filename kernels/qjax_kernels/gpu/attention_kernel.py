"""The first stage of a chain with attention: every block takes a head and a part of what came before.

Keys and values go from memory into registers, sixteen bytes a thread; the threads of a key add up their products, and every group of
threads keeps a softmax of its own over the keys that it has seen. The groups of a block are put together in shared memory, the parts of a
head by those who read them (`Mixed`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from .attention import Attention
from .direct_rows import LANES, Rows
from .direct_shape import Shape
from .tiles import PIECE
from .warps import Int, Long, Real, Warps

BATCH = 4  # keys of a group of threads that are on their way at once
NOTHING = -3e38  # the largest score of no keys


@dataclasses.dataclass(frozen=True)
class Heads:
    """What the stage is compiled for.

    Attributes:
      attention: the heads.
      m: rows.
      context: tokens that the cache holds.
      layers: of the cache.
      blocks, warps: of the launch, and of a block.
      turned: q and k are rotated.
    """

    attention: Attention
    m: int
    context: int
    layers: int
    blocks: int
    warps: int
    turned: bool

    @property
    def lanes(self) -> int:
        """Threads of a key, eight elements each."""
        return self.attention.width // 8

    @property
    def units(self) -> int:
        """Rows, heads and parts."""
        return self.m * self.attention.heads * self.attention.splits

    @property
    def bytes(self) -> int:
        """Of what the parts give: bfloat16 sums, then the largest score of each and the sum of its weights, float32."""
        return self.units * (2 * self.attention.width + 8)

    @property
    def shared_bytes(self) -> int:
        """Of shared memory: float32 sums of the warps, then their largest scores and sums of weights."""
        return self.warps * (4 * self.attention.width + 8)


class Sources(NamedTuple):
    """Where things begin."""

    qkv: Long
    cache: Long
    layer: Long
    places: Long
    rotation: Long | None = None


class _Unit(NamedTuple):
    """A head of a row, a part of its keys, and where they lie for this thread."""

    number: Int
    split: Int
    start: Int
    end: Int
    granule: int  # keys that the block takes at once
    keys: Long
    values: Long


class Attend:
    """The work of one block."""

    def __init__(self, w: Warps, s: Heads, shared: Int, sources: Sources, parts: Long) -> None:
        """What the parts give begins at `parts`."""
        self.w, self.s, self.shared, self.sources, self.parts = w, s, shared, sources, parts
        self.lane = w.thread & (s.lanes - 1)
        self.group = (w.thread & 31) // s.lanes  # which of the warp's keys

    def begin(self) -> list[Int]:
        """Asks for what the first unit of the block reads. Zeros where it has none."""
        return self._load(self.w.block)

    def finish(self, begun: list[Int]) -> None:
        """All units of the block; `begun` is what `begin` gave."""
        w, s = self.w, self.s
        w.when(w.block < s.units, lambda: self._work(w.block, begun))

        def later(i: Int, carry: list[Any]) -> list[Any]:
            number = (i + 1) * s.blocks + w.block

            def work() -> None:
                w.barrier()  # shared memory has been read
                self._work(number, self._load(number))

            w.when(number < s.units, work)
            return carry

        if s.units > s.blocks:
            w.loop(w.integer(math.ceil(s.units / s.blocks) - 1), [], later)

    def _unit(self, number: Int, place: Int, layer: Int) -> _Unit:
        w, s, a = self.w, self.s, self.s.attention
        row, head, split = number // (a.heads * a.splits), (number // a.splits) % a.heads, number % a.splits
        granule = s.warps * (32 // s.lanes)
        chunk = (place + (a.splits * granule - 1)) // (a.splits * granule) * granule
        start = split * chunk
        token = a.shared * a.width * 2
        keys = self.sources.cache.times(layer * (2 * s.m) + row, s.context * token)
        keys = keys + head // (a.heads // a.shared) * (2 * a.width) + self.lane * 16
        values = keys.times(w.integer(s.m), s.context * token)
        return _Unit(number, split, start, w.minimum(start + chunk, place), granule, keys, values)

    def _numbers(self, number: Int) -> list[Int]:
        """How many tokens came before, and the layer."""
        a, w = self.s.attention, self.w
        place = w.load_shared_by_all(self.sources.places.times(number // (a.heads * a.splits), 4), 1)[0]
        layer = w.load_shared_by_all(self.sources.layer, 1)[0]
        return [_within(w, place, self.s.context), _within(w, layer, self.s.layers - 1)]

    def _load(self, number: Int) -> list[Int]:
        """Numbers, q, k and v of this token, cosines and sines, and the first keys and values."""
        w, s, a = self.w, self.s, self.s.attention

        def own() -> list[Int]:
            found = self._numbers(number)
            row, head = number // (a.heads * a.splits), (number // a.splits) % a.heads
            base = self.sources.qkv.times(row, a.columns * 2) + self.lane * 16
            kind = head // (a.heads // a.shared)
            for place in (head, kind + a.heads, kind + (a.heads + a.shared)):
                found += w.load_shared_by_all(base + place * (2 * a.width), 4)
            if self.sources.rotation is not None:
                near = self.sources.rotation.times(row, 4 * a.width) + (self.lane & (s.lanes // 2 - 1)) * 32
                for half in (0, 2 * a.width):
                    for some in (0, 16):
                        found += w.load_shared_by_all(near + (half + some), 4)
            return found

        found = w.only_where(number < s.units, own, 2 + 12 + (16 if s.turned else 0))
        unit = self._unit(number, found[0], found[1])
        return [*found, *self._keys(unit, unit.start, number < s.units)]

    def _keys(self, unit: _Unit, start: Int, wanted: Any = None) -> list[Int]:
        """Keys and values of a batch; zeros behind the end of the part."""
        w, s, found = self.w, self.s, []
        token = s.attention.shared * s.attention.width * 2
        for number in self._numbers_of(start):
            there = number < unit.end if wanted is None else w.both(wanted, number < unit.end)
            places = unit.keys.times(number, token), unit.values.times(number, token)
            found += w.only_where(there, lambda places=places: w.load(places[0], 4) + w.load(places[1], 4), 8)
        return found

    def _numbers_of(self, start: Int) -> list[Int]:
        """Which keys of a batch this thread takes part in."""
        s, warp = self.s, self.w.thread >> 5
        return [start + (warp + b * s.warps) * (32 // s.lanes) + self.group for b in range(BATCH)]

    def _work(self, number: Int, begun: list[Int]) -> None:
        """A unit: its softmax, and its part of the result."""
        w, s, a = self.w, self.s, self.s.attention
        unit = self._unit(number, begun[0], begun[1])
        q, k, v = (_wide(w, begun[2 + 4 * i : 6 + 4 * i]) for i in range(3))
        if s.turned:
            cos, sin = ([w.as_real(word) for word in begun[14 + 8 * i : 22 + 8 * i]] for i in (0, 1))
            q, k = self._turned(q, cos, sin), self._turned(k, cos, sin)
        # Keys lie in the cache as bfloat16: this one is read as if it did.
        k = [w.rounded(each) for each in k]
        q = [each * (a.width**-0.5 * 1.4426950408889634) for each in q]
        state = self._first(unit, q, k, v)
        after = 14 + (16 if s.turned else 0)
        state = self._batch(unit, unit.start, begun[after:], q, state)
        stride = unit.granule * BATCH
        count = w.where(unit.start < unit.end, (unit.end - unit.start + (stride - 1)) // stride, w.integer(1))

        def more(i: Int, carry: list[Any]) -> list[Any]:
            start = unit.start + (i + 1) * stride
            return self._batch(unit, start, self._keys(unit, start), q, carry)

        state = w.loop(count - 1, state, more)
        self._write(unit, self._groups(state))

    def _turned(self, x: list[Real], cos: list[Real], sin: list[Real]) -> list[Real]:
        """Halves of a head rotated against each other; the other half is with another thread."""
        w, s = self.w, self.s
        first = self.lane < s.lanes // 2
        out = []
        for own, c, n in zip(x, cos, sin, strict=True):
            other = w.neighbour(own, s.lanes // 2)
            out.append(w.fma(w.where(first, other * -1.0, other), n, own * c))
        return out

    def _first(self, unit: _Unit, q: list[Real], k: list[Real], v: list[Real]) -> list[Real]:
        """Largest score, sum of weights and eight sums: of this token in one group of the first part, else of nothing."""
        w = self.w
        score = self._score(q, k)
        chosen = w.both(w.both(unit.split == 0, w.thread < 32), self.group == 0)
        zero = w.real(0.0)
        return [w.where(chosen, score, w.real(NOTHING)), w.where(chosen, w.real(1.0), zero), *(w.where(chosen, each, zero) for each in v)]

    def _score(self, q: list[Real], k: list[Real]) -> Real:
        w = self.w
        total = q[0] * k[0]
        for a, b in zip(q[1:], k[1:], strict=True):
            total = w.fma(a, b, total)
        distance = self.s.lanes // 2
        while distance:
            total = total + w.neighbour(total, distance)
            distance //= 2
        return total

    def _batch(self, unit: _Unit, start: Int, words: list[Int], q: list[Real], state: list[Real]) -> list[Real]:
        """The state with a batch of keys and values in it."""
        w = self.w
        for b, number in enumerate(self._numbers_of(start)):
            key, value = (_wide(w, words[8 * b + 4 * i : 8 * b + 4 * i + 4]) for i in (0, 1))
            there = number < unit.end
            score = w.where(there, self._score(q, key), w.real(NOTHING))
            top = w.larger(state[0], score)
            old, new = w.power(state[0] + top * -1.0), w.where(there, w.power(score + top * -1.0), w.real(0.0))
            state = [top, w.fma(state[1], old, new), *(w.fma(new, each, total * old) for each, total in zip(value, state[2:], strict=True))]
        return state

    def _groups(self, state: list[Real]) -> list[Real]:
        """The groups of a warp put together."""
        w, distance = self.w, self.s.lanes
        while distance < 32:
            other = [w.neighbour(each, distance) for each in state]
            top = w.larger(state[0], other[0])
            mine, theirs = w.power(state[0] + top * -1.0), w.power(other[0] + top * -1.0)
            state = [top, *(w.fma(b, theirs, a * mine) for a, b in zip(state[1:], other[1:], strict=True))]
            distance *= 2
        return state

    def _write(self, unit: _Unit, state: list[Real]) -> None:
        """The warps put together, as bfloat16, and what the part weighs."""
        w, s, width = self.w, self.s, self.s.attention.width
        warp, tops = w.thread >> 5, self.shared + s.warps * 4 * width

        def mine() -> None:
            at = self.shared + warp * (4 * width) + self.lane * 32
            w.store_shared(at, *state[2:6])
            w.store_shared(at + 16, *state[6:10])
            w.when(self.lane == 0, lambda: w.store_shared(tops + warp * 8, state[0], state[1]))

        w.when((w.thread & 31) < s.lanes, mine)
        w.barrier()

        def together(column: Int) -> None:
            pairs = [[w.as_real(word) for word in w.load_shared(tops + other * 8, 2)] for other in range(s.warps)]
            top = pairs[0][0]
            for pair in pairs[1:]:
                top = w.larger(top, pair[0])
            weight, total = w.real(0.0), w.real(0.0)
            for other, pair in enumerate(pairs):
                factor = w.power(pair[0] + top * -1.0)
                weight = w.fma(pair[1], factor, weight)
                total = w.fma(w.as_real(w.load_shared(self.shared + column * 4 + other * 4 * width, 1)[0]), factor, total)
            w.store_bfloat16(self.parts.times(unit.number, 2 * width) + column * 2, total * w.inverse(w.larger(weight, w.real(1e-30))))

            def weighs() -> None:
                at = self.parts.times(unit.number, 8) + s.units * 2 * width
                w.store_real(at, top)
                w.store_real(at + 4, weight)

            w.when(column == 0, weighs)

        for first in range(0, width, 32 * s.warps):
            column = w.thread + first
            w.when(column < width, functools.partial(together, column))


class Mixed(Rows):
    """Rows of x that are the result of attention: the parts of a head are put together by everybody who reads it."""

    def __init__(self, w: Warps, s: Shape, first: Int, x: Long, heads: Heads) -> None:
        """What the parts gave begins at `x`."""
        super().__init__(w, s, first, x)
        self.heads = heads

    def load(self, places: list[tuple[Int, Int]]) -> list[list[Int]]:
        """A thread's elements of pieces and rows, two in a word: all of one head."""
        w, a, found = self.w, self.heads.attention, []
        for piece, row in places:
            inside = w.minimum(self.first + piece, self.s.pieces - 1)
            element = inside * PIECE + self.element
            number = (row * a.heads + element // a.width) * a.splits
            weights = self.x.times(number, 8) + self.heads.units * 2 * a.width
            sums = self.x.times(number, 2 * a.width) + (element % a.width) * 2
            pairs = [w.load_shared_by_all(weights + 8 * i, 2) for i in range(a.splits)]
            tops = [w.as_real(pair[0]) for pair in pairs]
            top = tops[0]
            for each in tops[1:]:
                top = w.larger(top, each)
            factors = [w.power(each + top * -1.0) * w.as_real(pair[1]) for each, pair in zip(tops, pairs, strict=True)]
            whole = factors[0]
            for factor in factors[1:]:
                whole = whole + factor
            scale, totals = w.inverse(whole), [w.real(0.0)] * (PIECE // LANES)
            for i, factor in enumerate(factors):
                parts = _wide(w, self.words(sums + 2 * a.width * i))
                totals = [w.fma(part, factor * scale, total) for part, total in zip(parts, totals, strict=True)]
            found.append([w.packed(*totals[i : i + 2]) for i in range(0, len(totals), 2)])
        return found


def _within(w: Warps, number: Int, most: int) -> Int:
    """A whole number with a sign, from 0 to the largest."""
    return w.where(number < 1 << 31, w.minimum(number, most), w.integer(0))


def _wide(w: Warps, words: list[Int]) -> list[Real]:
    """The float32 of two bfloat16 a word."""
    return [w.as_real(bits) for word in words for bits in (word << 16, word & 0xFFFF0000)]
