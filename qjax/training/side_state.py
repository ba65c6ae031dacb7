"""Where learned ranges of activations live: an array a parameter, and what each of its sites sees of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.program import Leaf, Site


def watched(leaf: Leaf) -> list[Site]:
    """The sites of a parameter that meet activations."""
    return [site for site in leaf.sites if site.op != "gather"]


def own_axes(leaf: Leaf) -> tuple[int, ...]:
    """The axes of a parameter that every one of its sites sees one element of at a time: each element has a range of its own."""
    stepped = [{axis for axis, _ in (*site.view.scans, *site.view.fixed)} & set(site.stacked) for site in watched(leaf)]
    return tuple(sorted(set.intersection(*stepped))) if stepped else ()


def range_shape(leaf: Leaf) -> tuple[int, ...]:
    """The shape of a parameter's activation ranges: (kept-like..., 1), as `QTensor.act_scale` has it."""
    own, contracted = own_axes(leaf), leaf.sites[0].contracted
    kept = [i for i in range(len(leaf.shape)) if i not in contracted]
    return (*(leaf.shape[i] if i in own else 1 for i in kept), 1)


def _where(leaf: Leaf, site: Site, turns: Sequence[int]) -> list[np.ndarray]:
    """Which positions of each kept axis a site sees."""
    own = own_axes(leaf)
    kept = [i for i in range(len(leaf.shape)) if i not in leaf.sites[0].contracted]
    where = {axis: np.arange(1) for axis in kept} | {axis: np.arange(leaf.shape[axis]) for axis in own}
    for (axis, _), (first, stride), n in zip(site.view.scans, site.view.steps, turns, strict=True):
        if axis in own:
            where[axis] = np.arange(first, first + stride * n, stride)
    for axis, position in site.view.fixed:
        if axis in own:
            where[axis] = np.arange(position, position + 1)
    return [where[axis] for axis in kept]


def of_site(ranges: jax.Array, leaf: Leaf, site: Site, turns: Sequence[int]) -> jax.Array:
    """A site's part of ranges.

    Args:
      ranges: `range_shape(leaf)`.
      leaf: the parameter.
      site: one of its sites.
      turns: how many turns each of `site.scans` takes.

    Returns:
      (turns...), in the order of `site.scans`; a scan over an axis without ranges of its own repeats them.
    """
    kept = [i for i in range(len(leaf.shape)) if i not in leaf.sites[0].contracted]
    own = own_axes(leaf)
    part = ranges[..., 0][np.ix_(*_where(leaf, site, turns))] if kept else ranges[..., 0]
    stepped = [axis for axis, _ in site.view.scans if axis in own]
    part = part.transpose([kept.index(a) for a in stepped] + [i for i, a in enumerate(kept) if a not in stepped])
    part = part.reshape(part.shape[: len(stepped)])
    part = part.reshape([n if axis in own else 1 for (axis, _), n in zip(site.view.scans, turns, strict=True)])
    return jnp.broadcast_to(part, tuple(turns))


def of_leaf(parts: Sequence[jax.Array], leaf: Leaf, sites: Sequence[Site], turns: Sequence[Sequence[int]], least: bool) -> jax.Array:
    """The inverse of `of_site` for all sites of a parameter: the largest, or `least`, of what meets in one place; 0 where nothing did.

    Args:
      parts: (turns...) of each site.
      leaf: the parameter.
      sites: its sites.
      turns: of each site's scans.
      least: whether the smallest counts.

    Returns:
      `range_shape(leaf)`.
    """
    kept = [i for i in range(len(leaf.shape)) if i not in leaf.sites[0].contracted]
    own = own_axes(leaf)
    shape = range_shape(leaf)[:-1]
    whole = jnp.full(shape, jnp.inf if least else -jnp.inf, jnp.float32)
    for part, site, n in zip(parts, sites, turns, strict=True):
        others = tuple(i for i, (axis, _) in enumerate(site.view.scans) if axis not in own)
        part = jnp.min(part, axis=others) if least else jnp.max(part, axis=others)
        stepped = [axis for axis, _ in site.view.scans if axis in own]
        part = part.transpose(np.argsort(stepped)) if stepped else part
        where = _where(leaf, site, n)
        part = part.reshape([len(w) for w in where])
        at = whole.at[np.ix_(*where)] if kept else whole.at[()]
        whole = at.min(part) if least else at.max(part)
    return jnp.where(jnp.isfinite(whole), whole, 0.0)[..., None]


def whole_ranges(ranges: jax.Array | None, leaf: Leaf) -> jax.Array | None:
    """Ranges with all stacked axes full, as `QTensor` has them."""
    if ranges is None:
        return None
    stacked = {axis for site in leaf.sites for axis in site.stacked}
    kept = [i for i in range(len(leaf.shape)) if i not in leaf.sites[0].contracted]
    return jnp.broadcast_to(ranges, (*(leaf.shape[i] if i in stacked else 1 for i in kept), 1))


def keys_for(key: jax.Array, turns: Sequence[int]) -> jax.Array:
    """A random key for every turn of the scans around a site: (turns...)."""
    return jax.random.split(key, math.prod(turns)).reshape(tuple(turns)) if turns else key
