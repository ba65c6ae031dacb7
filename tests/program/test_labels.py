"""The symbolic views against NumPy: the same rearrangements on an array that holds its own positions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.program import labels

SHAPES = [(6, 4), (2, 3, 4), (8,), (3, 1, 5), (4, 6, 2)]


def factorizations(n):
    return [(n,)] + [(a, n // a) for a in range(2, n) if n % a == 0]


@st.composite
def chains(draw):
    """A shape, and steps that fit what came before."""
    shape = draw(st.sampled_from(SHAPES))
    now, steps = list(shape), []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["transpose", "split", "merge", "slice", "index", "squeeze"]))
        if kind == "transpose":
            order = draw(st.permutations(range(len(now))))
            steps.append(("transpose", order))
            now = [now[i] for i in order]
        elif kind == "split":
            i = draw(st.integers(0, len(now) - 1))
            now[i : i + 1] = draw(st.sampled_from(factorizations(now[i])))
            steps.append(("reshape", tuple(now)))
        elif kind == "merge" and len(now) > 1:
            i = draw(st.integers(0, len(now) - 2))
            now[i : i + 2] = [now[i] * now[i + 1]]
            steps.append(("reshape", tuple(now)))
        elif kind in ("slice", "index"):
            i = draw(st.integers(0, len(now) - 1))
            start = draw(st.integers(0, now[i] - 1))
            step = draw(st.integers(1, 2))
            stop = start + 1 if kind == "index" else draw(st.integers(start + 1, now[i]))
            bounds = [(0, n, 1) if j != i else (start, stop, step) for j, n in enumerate(now)]
            steps.append(("slice", bounds))
            now[i] = len(range(start, stop, step))
        elif kind == "squeeze" and 1 in now and len(now) > 1:
            i = now.index(1)
            steps.append(("squeeze", i))
            del now[i]
    return shape, steps


def apply(view, positions, step):
    kind, how = step
    if kind == "transpose":
        return labels.transpose(view, how), positions.transpose(0, *(i + 1 for i in how))
    if kind == "reshape":
        return labels.reshape(view, how), positions.reshape(positions.shape[0], *how)
    if kind == "squeeze":
        return labels.squeeze(view, [how]), positions.squeeze(how + 1)
    cut = positions[(slice(None), *(slice(*bounds) for bounds in how))]
    starts, _, strides = zip(*how, strict=True)
    return labels.restrict(view, cut.shape[1:], starts, strides), cut


def said(view, index):
    """The position along every axis of the parameter that the view claims for an element; None where it makes no claim."""
    where = dict(view.fixed)
    for i, dim in zip(index, view.dims, strict=True):
        for atom, position in zip(dim, np.unravel_index(i, [atom.size for atom in dim]) if dim else (), strict=True):
            where[atom.axis] = where.get(atom.axis, 0) + atom.start + atom.stride * int(position)
    return where


@settings(max_examples=300, deadline=None)
@given(chains())
def test_a_view_knows_where_every_element_comes_from(chain):
    shape, steps = chain
    view, positions = labels.whole(0, shape), np.indices(shape)
    for step in steps:
        view, positions = apply(view, positions, step)
        if view is None:
            return
    assert tuple(labels.size(dim) for dim in view.dims) == positions.shape[1:]
    for index in np.ndindex(*positions.shape[1:]):
        where = said(view, index)
        for axis, size in enumerate(shape):
            if axis not in view.partial and size > 1 and axis in where:
                assert where[axis] == positions[(axis, *index)]
    # What is stacked is gone from the dims, and an axis in pieces is never stacked.
    left = {atom.axis for dim in view.dims for atom in dim}
    assert not view.stacked & (left | view.partial)
    assert {axis for axis, _ in view.fixed} <= view.stacked


def test_scans_say_which_turn_sees_which_layer():
    whole = labels.whole(0, (6, 4, 5))
    view = labels.scan_slice(labels.restrict(whole, (2, 4, 5), (2, 0, 0), (2, 1, 1)), (7,))
    assert view is not None and view.stacked == {0}
    assert view.scans == ((0, (7,)),) and view.steps == ((2, 2),)
    unknown = labels.scan_slice(labels.restrict(whole, (2, 4, 5)), (7,))
    assert unknown is not None and unknown.stacked == {0} and unknown.scans == ()


@pytest.mark.parametrize("last", [False, True])
def test_a_piece_of_an_axis_is_no_layer(last):
    heads = labels.reshape(labels.whole(0, (4, 6)), (4, 3, 2))
    assert heads is not None
    heads = heads if last else labels.transpose(heads, (1, 0, 2))
    view = labels.restrict(heads, (4, 3, 1), (0, 0, 1)) if last else labels.scan_slice(heads, (0,))
    assert view is not None and not view.stacked and view.partial == {1} and not view.scans
    assert math.prod(labels.size(dim) for dim in view.dims) == (12 if last else 8)
