"""Labels: which axes of a parameter each axis of a view of it is made of.

A parameter of shape (512, 8, 64) that was transposed and reshaped is still the same numbers. A `View` says, for every axis of
the transformed array, which pieces of which axes of the parameter it runs over, so a matmul on the view tells
which axes of the *parameter* it contracts. The algebra is symbolic: no array is touched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple


class Atom(NamedTuple):
    """A run of `size` positions, `stride` apart from `start` on, along one axis of the parameter; `start` is None if unknown."""

    axis: int
    stride: int
    size: int
    start: int | None = 0


Dim = tuple[Atom, ...]  # row-major: the last atom runs fastest; () is an axis of size one


@dataclasses.dataclass(frozen=True)
class View:
    """What an intermediate value is in terms of one parameter.

    Attributes:
      leaf: the flat index of the parameter.
      dims: for each axis of the value the atoms it runs over.
      stacked: axes of the parameter that a `scan` or an index has taken one element of.
      scans: (axis, key of the `scan` equation) for each scan that sliced it, outermost first.
      steps: for each of `scans` the position of its first turn and how far a turn moves on.
      fixed: (axis, position) for each static index, as in `w[3]`.
      partial: axes of which it has lost a piece, as in `w.reshape(k, n, 2)[..., 0]`; they are never stacked.
    """

    leaf: int
    dims: tuple[Dim, ...]
    stacked: frozenset[int] = frozenset()
    scans: tuple[tuple[int, tuple[int, ...]], ...] = ()
    steps: tuple[tuple[int, int], ...] = ()
    fixed: tuple[tuple[int, int], ...] = ()
    partial: frozenset[int] = frozenset()


def whole(leaf: int, shape: Sequence[int]) -> View:
    """Returns the view that is the parameter itself."""
    return View(leaf, tuple((Atom(axis, 1, n),) for axis, n in enumerate(shape)))


def size(dim: Dim) -> int:
    """Returns how many positions an axis of a view has."""
    return math.prod(atom.size for atom in dim)


def axes_of(dims: Sequence[Dim]) -> set[int]:
    """Returns the parameter's axes that the given dims run over."""
    return {atom.axis for dim in dims for atom in dim}


def transpose(view: View, permutation: Sequence[int]) -> View:
    """Reorders the axes of a view."""
    return dataclasses.replace(view, dims=tuple(view.dims[i] for i in permutation))


def squeeze(view: View, dimensions: Sequence[int]) -> View:
    """Removes axes of size one."""
    gone = {d % len(view.dims) for d in dimensions}
    return dataclasses.replace(view, dims=tuple(dim for i, dim in enumerate(view.dims) if i not in gone))


def broadcast_in_dim(view: View, shape: Sequence[int], broadcast_dimensions: Sequence[int]) -> View | None:
    """Adds axes of size one; a real broadcast copies the parameter and is no view."""
    dims: list[Dim] = [()] * len(shape)
    for dim, target in zip(view.dims, broadcast_dimensions, strict=True):
        dims[target] = dim
    if any(size(dim) != n for dim, n in zip(dims, shape, strict=True)):
        return None
    return dataclasses.replace(view, dims=tuple(dims))


def reshape(view: View, new_sizes: Sequence[int]) -> View | None:
    """Splits and merges axes; None if a new axis would cut an atom unevenly."""
    if tuple(size(dim) for dim in view.dims) == tuple(new_sizes):
        return view
    atoms = [atom for dim in view.dims for atom in dim if atom.size != 1][::-1]
    dims: list[Dim] = []
    for target in new_sizes:
        dim: list[Atom] = []
        while target != 1:
            atom = atoms.pop()
            if target % atom.size == 0:
                target //= atom.size
                dim.append(atom)
            elif atom.size % target == 0:
                rest = atom.size // target
                dim.append(Atom(atom.axis, atom.stride * rest, target, atom.start))
                atoms.append(Atom(atom.axis, atom.stride, rest))
                target = 1
            else:
                return None
        dims.append(_merged(dim))
    return dataclasses.replace(view, dims=tuple(dims))


def _merged(atoms: Sequence[Atom]) -> Dim:
    out: list[Atom] = []
    for atom in atoms:
        if out and out[-1].axis == atom.axis and out[-1].stride == atom.stride * atom.size:
            outer = out.pop()
            start = None if outer.start is None or atom.start is None else outer.start + atom.start
            atom = Atom(atom.axis, atom.stride, outer.size * atom.size, start)
        out.append(atom)
    return tuple(out)


def _alone(view: View, atom: Atom) -> bool:
    """Whether an atom is all that the view has of its axis: one position of it is one of independent parts."""
    return atom.axis not in view.partial and sum(a.axis == atom.axis for dim in view.dims for a in dim) == 1


def restrict(
    view: View, sizes: Sequence[int], starts: Sequence[int] | None = None, strides: Sequence[int] | None = None
) -> View | None:
    """Takes a part of some axes. One element of a whole axis counts as stacked, at a known position if `starts` is given."""
    dims: list[Dim] = []
    stacked, fixed, partial = set(view.stacked), list(view.fixed), set(view.partial)
    for i, (dim, n) in enumerate(zip(view.dims, sizes, strict=True)):
        if n == size(dim):
            dims.append(dim)
            continue
        if len(dim) != 1:
            return None
        atom = dim[0]
        start = None if starts is None or atom.start is None else atom.start + atom.stride * starts[i]
        if n > 1:
            dims.append((Atom(atom.axis, atom.stride * (strides[i] if strides else 1), n, start),))
            continue
        dims.append(())
        if not _alone(view, atom):
            partial.add(atom.axis)
            continue
        stacked.add(atom.axis)
        if start is not None:
            fixed.append((atom.axis, start))
    return dataclasses.replace(
        view, dims=tuple(dims), stacked=frozenset(stacked), fixed=tuple(fixed), partial=frozenset(partial)
    )


def scan_slice(view: View, key: tuple[int, ...]) -> View | None:
    """What the body of a `scan` sees of a view it is scanned over."""
    if len(view.dims[0]) != 1:
        return None
    atom, rest = view.dims[0][0], view.dims[1:]
    if not _alone(view, atom):
        return dataclasses.replace(view, dims=rest, partial=view.partial | {atom.axis})
    stacked = view.stacked | {atom.axis}
    if atom.start is None:
        return dataclasses.replace(view, dims=rest, stacked=stacked)
    scans, steps = (*view.scans, (atom.axis, key)), (*view.steps, (atom.start, atom.stride))
    return dataclasses.replace(view, dims=rest, stacked=stacked, scans=scans, steps=steps)
