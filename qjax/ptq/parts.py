"""Parts: one layer of a stacked parameter at a time, and the stack put together again."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import CastSpec, LearnedSpec, PerBlock, PerTensor, QTensor, Spec, assemble, check_blocks, logical_blocks, tensor_scale
from qjax.core.layout import stacked_positions
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


def axes_order(problem: Problem) -> tuple[list[int], list[int], list[int]]:
    """The stacked, the kept and the contracted axes of a problem's weight, not negative."""
    ndim = problem.w.ndim
    stacked = sorted(a + ndim for a in problem.stacked)
    contracted = [a + ndim for a in problem.axes]
    return stacked, [i for i in range(ndim) if i not in stacked and i not in contracted], contracted


def matrices(problem: Problem) -> jax.Array:
    """Lays a weight out as matrices.

    Args:
      problem: the weight.

    Returns:
      (stack, N, K) float32: the stacked axes and the groups of a convolution, the kept axes, the contracted ones.
    """
    stacked, kept, contracted = axes_order(problem)
    w = problem.w.transpose(*stacked, *kept, *contracted).astype(jnp.float32)
    stack = math.prod(problem.w.shape[a] for a in stacked) * problem.groups
    return w.reshape(stack, -1, math.prod(problem.w.shape[a] for a in contracted))


def check_not_cast(problem: Problem, method: str) -> None:
    """Refuses a cast, for a method that chooses codes or the grids that they are rounded to.

    Args:
      problem: the weight.
      method: what the error calls the method.

    Raises:
      ValueError: naming the weight and the remedy.
    """
    if isinstance(problem.spec, CastSpec):
        raise ValueError(f"`method` {method} has nothing to choose for the cast {problem.spec} of {problem.name!r}; leave `method` out")


def check_matrix_blocks(problem: Problem, method: str) -> None:
    """Refuses blocks that the matrices of a weight cannot be cut into, for a method that works on `matrices(problem)`.

    Args:
      problem: the weight; its spec has blocks.
      method: what the error calls the method.

    Raises:
      ValueError: naming the weight and the remedy.
    """
    spec, name, shape = problem.spec, problem.name, problem.w.shape
    _, rows, columns = axes_order(problem)
    check_blocks((math.prod(shape[a] for a in rows) // problem.groups, math.prod(shape[a] for a in columns)), spec, name)
    granularity = getattr(spec, "granularity", None)
    if isinstance(granularity, PerBlock) and (len(rows) > 1 or problem.groups > 1):
        raise ValueError(
            f"`block` granularity with {method} needs a weight with one kept axis, {name!r} has {len(rows)} "
            f"(and {problem.groups} groups); use group_size= instead"
        )
    if isinstance(granularity, PerTensor) and problem.groups > 1:
        raise ValueError(f"{method} of the grouped convolution {name!r} needs a scale per channel or group, not per tensor")


def for_each_matrix(problem: Problem, statistic: jax.Array) -> jax.Array:
    """Repeats a statistic for every matrix of `matrices(problem)`.

    Args:
      problem: the weight.
      statistic: (parts, ...), one for each part that is not shared and for each group of a convolution; or (1, ...) for all.

    Returns:
      (stack, ...).
    """
    stacked = sorted(problem.stacked)
    sizes = [problem.w.shape[a] for a in stacked]
    own = [1 if a in problem.shared else n for a, n in zip(stacked, sizes, strict=True)]
    rest = statistic.shape[1:]
    if statistic.shape[0] != 1:
        statistic = jnp.broadcast_to(statistic.reshape(*own, problem.groups, *rest), (*sizes, problem.groups, *rest))
    return jnp.broadcast_to(statistic.reshape(-1, *rest), (math.prod(sizes) * problem.groups, *rest))


def packed(
    problem: Problem,
    codes: jax.Array,
    scale: jax.Array | None,
    zero_point: jax.Array | None,
    perm: jax.Array | None = None,
    levels: jax.Array | None = None,
) -> QTensor:
    """Puts what was found for `matrices(problem)` back where the weight's axes were.

    Args:
      problem: the weight.
      codes: int (stack, N, K) or (stack, N, Kpad).
      scale: (stack, N, G); 1 or N / block in place of N where rows share it; None for a table without scales.
      zero_point: like `scale`, or None.
      perm: (stack, K), or None.
      levels: (stack, N or 1, 2^bits), or None.

    Returns:
      The packed weight.
    """
    stacked, kept, contracted = axes_order(problem)
    shape = problem.w.shape
    lead, rest = [shape[a] for a in stacked], [shape[a] for a in kept]
    order = np.argsort([*stacked, *kept])
    groups = problem.groups

    def place(x: jax.Array | None, rows: bool) -> jax.Array | None:
        if x is None:
            return None
        n = x.shape[1] if rows else 1
        full = rows and n * groups == math.prod(rest)
        # A block spec has fewer rows of scales than the one kept axis has positions.
        sizes = rest if full else [1] * (len(rest) - 1) + [n * groups] if rest else []
        x = x.reshape(*lead, *sizes, x.shape[-1])
        return x.transpose(*order, x.ndim - 1)

    return assemble(
        place(codes, rows=True),
        place(scale, rows=True),
        place(zero_point, rows=True),
        problem.spec,
        problem.axes,
        [shape[a] for a in contracted],
        problem.w.dtype,
        None if perm is None else place(perm[:, None, :], rows=False),
        stacked=problem.stacked,
        nested_scale=_tensor_scale(problem),
        levels=place(levels, rows=True),
        name=problem.name,
    )


def _tensor_scale(problem: Problem) -> jax.Array | None:
    """What the scales of blocks are over, or None: a matter of the weight alone, so every method finds the same."""
    if isinstance(problem.spec, CastSpec | LearnedSpec):
        return None
    blocked = logical_blocks(problem.w, problem.spec, problem.axes, problem.stacked)[0]
    found = tensor_scale(blocked, problem.spec, stacked_positions(problem.axes, problem.stacked, problem.w.ndim))
    return found[0][..., 0] if found else None
