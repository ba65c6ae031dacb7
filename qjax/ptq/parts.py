"""Parts: one layer of a stacked parameter at a time, and the stack put together again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import QTensor, Spec
from qjax.program import Leaf, Site
from qjax.ptq.method import Problem

Part = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a parameter falls into parts: the axes of which each visit of a site sees one element."""

    axes: tuple[int, ...]
    count: tuple[int, ...]

    @property
    def all(self) -> list[Part]:
        return list(itertools.product(*(range(n) for n in self.count)))


def part_axes(site: Site) -> tuple[int, ...]:
    """Axes of the parameter that scans step through or static indices pick."""
    return tuple(sorted({axis for axis, _ in site.view.scans} | {axis for axis, _ in site.view.fixed}))


def part_of(site: Site, steps: Mapping[Any, int]) -> Part:
    """Which part a visit sees, given the turn of each scan by its key."""
    turns = zip(site.view.scans, site.view.steps, strict=True)
    where = {axis: first + stride * steps[key] for (axis, key), (first, stride) in turns} | dict(site.view.fixed)
    return tuple(where[axis] for axis in part_axes(site))


def layout_of(leaf: Leaf) -> Layout:
    axes = part_axes(leaf.sites[0])
    return Layout(axes, tuple(leaf.shape[a] for a in axes))


def take(w: jax.Array, layout: Layout, part: Part) -> jax.Array:
    """Returns one part of a parameter, without the part axes."""
    for axis, index in sorted(zip(layout.axes, part, strict=True), reverse=True):
        w = _index(w, index, axis)
    return w


def put(w: jax.Array, layout: Layout, part: Part, value: jax.Array) -> jax.Array:
    """Returns the parameter with one part replaced."""
    where: list[Any] = [slice(None)] * w.ndim
    for axis, index in zip(layout.axes, part, strict=True):
        where[axis] = index
    return w.at[tuple(where)].set(value)


# The index is an operand, so that all layers share one compilation.
@jax.jit
def _dynamic(w: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(w, index, 0, keepdims=False)


def _index(w: jax.Array, index: int, axis: int) -> jax.Array:
    return _dynamic(w if axis == 0 else jnp.moveaxis(w, axis, 0), jnp.int32(index))


def problem_of(leaf: Leaf, site: Site, spec: Spec, w: jax.Array, removed: Sequence[int] = ()) -> Problem:
    """Describes a parameter, or a part of it without the axes `removed`, to a method."""
    rest = [i for i in range(len(leaf.shape)) if i not in removed]
    ndim = len(rest)
    return Problem(
        w=w,
        spec=spec,
        axes=tuple(rest.index(a) - ndim for a in site.contracted),
        stacked=tuple(rest.index(a) - ndim for a in site.stacked if a not in removed),
        groups=site.groups,
        name=leaf.path,
        shared=tuple(rest.index(a) - ndim for a in site.stacked if a not in removed and a in site.view.stacked),
    )


def join(leaf: Leaf, layout: Layout, parts: Mapping[Part, QTensor]) -> QTensor:
    """Stacks the packed parts of a parameter."""
    if not layout.axes:
        return parts[()]
    site = leaf.sites[0]
    ndim = len(leaf.shape)
    kept = [i for i in range(ndim) if i not in site.contracted]
    first = parts[layout.all[0]]

    def stack(*leaves: jax.Array) -> jax.Array:
        x = jnp.stack(leaves).reshape(*layout.count, *leaves[0].shape)
        return jnp.moveaxis(x, range(len(layout.axes)), [kept.index(a) for a in layout.axes])

    joined = jax.tree.map(stack, *(parts[p] for p in layout.all))
    return dataclasses.replace(joined, axes=tuple(a - ndim for a in site.contracted), sizes=first.sizes)
