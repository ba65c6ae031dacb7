"""Labels: by which power of which channel's scale every element of a value is multiplied, and how views change that.

A label is a pair of arrays of the value's rank, of size one along every axis they do not depend on: so the label of a (batch, time, 4096)
activation has 4,096 entries. Two elements that must carry the same scale tie their channels: that is how grouped heads come
out with one scale for every query head of a group, with no rule that knows of heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

# Beyond this many entries a label is not worth having: the scale would vary along two wide axes at once.
LABEL_ELEMENTS = 1 << 25


class Label(NamedTuple):
    """What a value is multiplied by: s[channel] ** power, element by element.

    Attributes:
      power: float64, NaN where not yet decided; exact, because every power is a dyadic number.
      channel: int64 of the same shape, meaningless where power is 0 or NaN.
    """

    power: np.ndarray
    channel: np.ndarray


class Conflict(Exception):
    """The labels cannot all hold; the text says why."""


def constant(ndim: int, power: float) -> Label:
    """The label with one power, and no particular channel, everywhere."""
    shape = (1,) * ndim
    return Label(np.full(shape, power), np.zeros(shape, np.int64))


def nonzero(label: Label) -> np.ndarray:
    """Where an element is known to be scaled."""
    return ~np.isnan(label.power) & (label.power != 0)


def same(a: Label, b: Label) -> bool:
    """Whether two compact labels are equal."""
    return (
        a.power.shape == b.power.shape
        and np.array_equal(a.power, b.power, equal_nan=True)
        and np.array_equal(a.channel, b.channel)
    )


class Ties:
    """Which channels share one scale: a partition that only ever grows coarser. Lives for one search."""

    def __init__(self, representative: np.ndarray):
        self.representative = representative  # of every channel, the smallest it is tied to

    def copy(self) -> Ties:
        return Ties(self.representative.copy())

    @property
    def count(self) -> int:
        return len(np.unique(self.representative))

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        """Ties the channels `a[i]` and `b[i]`."""
        root, before = self.representative, self.representative
        while (differ := root[a] != root[b]).any():
            low, high = np.minimum(root[a], root[b])[differ], np.maximum(root[a], root[b])[differ]
            root = root.copy()
            np.minimum.at(root, high, low)
            while (root[root] != root).any():
                root = root[root]
        self.representative = root
        if root is not before and root.size > 1 and not root.any():
            raise Conflict("every channel would need the same scale")

    def merge(self, a: Label, b: Label) -> Label:
        """What is known from either; where both are known they must agree, and their channels are tied."""
        _check_size(a, b)
        (pa, pb), (ca, cb) = np.broadcast_arrays(a.power, b.power), np.broadcast_arrays(a.channel, b.channel)
        both = ~(np.isnan(pa) | np.isnan(pb))
        if (pa[both] != pb[both]).any():
            raise Conflict("its operands would be scaled differently")
        tied = both & (pa != 0)
        self.unify(ca[tied], cb[tied])
        return Label(np.where(np.isnan(pa), pb, pa), np.where(np.isnan(pa), cb, ca))

    def times(self, a: Label, b: Label, sign: int) -> Label:
        """The label of a * b or a / b; unknown where one is. Two scales that meet must be of one channel."""
        _check_size(a, b)
        (pa, pb), (ca, cb) = np.broadcast_arrays(a.power, b.power), np.broadcast_arrays(a.channel, b.channel)
        power = pa + sign * pb
        meet = ~np.isnan(power) & (pa != 0) & (pb != 0)
        self.unify(ca[meet], cb[meet])
        return Label(power, np.where(pa != 0, ca, cb))

    def tie(self, label: Label, axes: Sequence[int]) -> Label:
        """Demands one scale along `axes`, which stay with size one."""
        for axis in axes:
            if label.power.shape[axis] == 1:
                continue
            low, high = (f.reduce(label.power, axis=axis, keepdims=True) for f in (np.fmin, np.fmax))
            if (low[~np.isnan(low)] != high[~np.isnan(low)]).any():
                raise Conflict("it mixes elements that would be scaled differently")
            known = ~np.isnan(label.power)
            chosen = np.take_along_axis(label.channel, known.argmax(axis, keepdims=True), axis)
            tied = nonzero(label)
            self.unify(label.channel[tied], np.broadcast_to(chosen, tied.shape)[tied])
            label = Label(low, chosen)
        return label

    def compact(self, label: Label) -> Label:
        """The same label with size one along every axis it does not depend on, and channels by their representative."""
        power = label.power
        channel = np.where(nonzero(label), self.representative[label.channel], 0)
        for axis in range(power.ndim):
            if power.shape[axis] > 1:
                head = [slice(None)] * power.ndim
                head[axis] = slice(0, 1)
                p, c = power[tuple(head)], channel[tuple(head)]
                if np.array_equal(np.broadcast_to(p, power.shape), power, equal_nan=True) and (c == channel).all():
                    power, channel = p, c
        return Label(power, channel)


class Step(Protocol):
    """A view of a value, read forwards (what its label is after it) and backwards (what its label must have been)."""

    def read(self, label: Label, ties: Ties) -> Label: ...

    def write(self, label: Label, ties: Ties) -> Label: ...


@dataclasses.dataclass(frozen=True)
class Place:
    """Puts each dim of a value at a dim of a joint space of `rank` dims; along a dim placed at None only one scale is allowed.

    Covers transposition, broadcasting, added and removed dims, sums, and the operands of contractions.
    """

    rank: int
    dims: tuple[int | None, ...]
    shape: tuple[int, ...]

    def read(self, label: Label, ties: Ties) -> Label:
        label = ties.tie(label, [i for i, dim in enumerate(self.dims) if dim is None])
        kept = [(dim, i) for i, dim in enumerate(self.dims) if dim is not None]
        sizes = [1] * self.rank
        for dim, i in kept:
            sizes[dim] = label.power.shape[i]
        order = [i for _, i in sorted(kept)] + [i for i, dim in enumerate(self.dims) if dim is None]
        return Label(*(a.transpose(order).reshape(sizes) for a in label))

    def write(self, label: Label, ties: Ties) -> Label:
        wide = {dim: i for i, dim in enumerate(self.dims) if dim is not None and self.shape[i] != 1}
        label = ties.tie(label, [dim for dim in range(self.rank) if dim not in wide])
        order = sorted(wide, key=lambda dim: wide[dim]) + [dim for dim in range(self.rank) if dim not in wide]
        sizes = [1 if dim is None else label.power.shape[dim] for dim in self.dims]
        return Label(*(a.transpose(order).reshape(sizes) for a in label))


@dataclasses.dataclass(frozen=True)
class Reshape:
    """Splits and merges dims, row-major."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def read(self, label: Label, ties: Ties) -> Label:
        return Label(*(_reshape(a, self.before, self.after) for a in label))

    def write(self, label: Label, ties: Ties) -> Label:
        return Label(*(_reshape(a, self.after, self.before) for a in label))


@dataclasses.dataclass(frozen=True)
class Window:
    """Takes a part known when tracing; what lies outside it stays undecided."""

    shape: tuple[int, ...]
    parts: tuple[tuple[int, int | None, int], ...]  # (start, stop, step) for every dim

    def read(self, label: Label, ties: Ties) -> Label:
        index = tuple(slice(None) if n == 1 else slice(*part) for n, part in zip(label.power.shape, self.parts, strict=True))
        return Label(*(a[index] for a in label))

    def write(self, label: Label, ties: Ties) -> Label:
        partial = [part != (0, n, 1) for n, part in zip(self.shape, self.parts, strict=True)]
        sizes = [n if cut else m for n, m, cut in zip(self.shape, label.power.shape, partial, strict=True)]
        out = Label(np.full(sizes, np.nan), np.zeros(sizes, np.int64))
        index = tuple(slice(*part) if cut else slice(None) for part, cut in zip(self.parts, partial, strict=True))
        out.power[index], out.channel[index] = label.power, label.channel
        return out


def runs(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Cuts a reshape into independent ones: the shortest runs of dims on either side with as many elements; no dim is 0.

    >>> list(runs((2, 6, 5), (2, 2, 3, 5)))
    [(slice(0, 1, None), slice(0, 1, None)), (slice(1, 2, None), slice(1, 3, None)), (slice(2, 3, None), slice(3, 4, None))]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        start, left, right = (i, j), 1, 1
        while True:
            if left <= right and i < len(before):
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
            if left == right:
                break
        yield slice(start[0], i), slice(start[1], j)


def _reshape(array: np.ndarray, before: tuple[int, ...], after: tuple[int, ...]) -> np.ndarray:
    """Reshapes a compact array: only the groups of dims that it depends on are written out."""
    if 0 in before:
        raise Conflict("a value is empty")
    full, sizes = list(array.shape), []
    for old, new in runs(before, after):
        if any(n != 1 for n in array.shape[old]):
            full[old] = before[old]
            sizes += after[new]
        else:
            sizes += [1] * (new.stop - new.start)
    if math.prod(full) > LABEL_ELEMENTS:
        raise Conflict("the scale would vary along too many axes at once")
    return np.broadcast_to(array, full).reshape(sizes)


def _check_size(a: Label, b: Label) -> None:
    if math.prod(max(pair) for pair in zip(a.power.shape, b.power.shape, strict=True)) > LABEL_ELEMENTS:
        raise Conflict("the scale would vary along too many axes at once")
