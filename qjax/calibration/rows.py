"""What a site reads, as rows of a matrix whose columns line up with its weight's flattened contracted axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core import QTensor, divide
from qjax.program import Leaf, Packed, Site
from qjax.program.labels import Dim


class Rows(NamedTuple):
    """Activations of one call of a site.

    Attributes:
      x: (stack, samples, K): `stack` runs over the weight's independent parts within the call (a batch of experts, the groups
        of a convolution), 1 if there are none; K over its contracted axes as the parameter flattens them.
      owner: int32 (samples,), for experts that share one list of rows: which expert reads a row; None otherwise.
      experts: how many there are, with `owner`.
      reference: of the shape of `x`, what the float program gives the same site, row for row; None where nobody asked for it
        (`qjax.ptq.method.ComparesWithFloat`) or it is not known (a site in a loop that stays whole).
    """

    x: jax.Array
    owner: jax.Array | None = None
    experts: int = 0
    reference: jax.Array | None = None


def stack_size(site: Site, leaf: Leaf) -> int:
    """Returns how many independent parts of the weight one call of the site sees: `Rows.x.shape[0]` or `Rows.experts`."""
    sliced = {a for a in site.stacked if a in site.view.stacked}
    return site.groups * math.prod(leaf.shape[a] for a in site.stacked if a not in sliced)


def columns(site: Site, leaf: Leaf) -> int:
    """Returns K, the number of contracted values."""
    return math.prod(leaf.shape[a] for a in site.contracted)


def why_no_rows(site: Site, leaf: Leaf) -> str:
    """Says why a site's input cannot be laid out as rows; "" if it can."""
    if site.op == "gather":
        return "it is looked up, and a lookup has no activations to calibrate on"
    if site.condition:
        return "it stands in the condition of a loop, which hands nothing out"
    if site.sharded:
        return "it stands inside a shard_map, whose activations are split over devices; calibrate the function without it"
    if site.op == "conv_general_dilated":
        return ""
    if any(atom.axis not in site.stacked for w, _ in site.batch for atom in site.view.dims[w]):
        return "a part of a kept axis runs along with a batch axis of its activations (heads stored flat)"
    dims = [site.view.dims[w] for w, _ in site.pairs]
    seen = math.prod(atom.size for dim in dims for atom in dim)
    return "" if seen == columns(site, leaf) else "it is contracted over a part of its axis only"


def site_rows(site: Site, eqn: Any, operands: Sequence[Any]) -> Rows:
    """Lays the activation of a site out as rows.

    Args:
      site: the site.
      eqn: its equation.
      operands: the equation's operands; the one at `site.operand` is not read, unless it is packed and its integer product divides
        or rotates its input: then the rows are those of what comes of it, which is what is rounded.

    Returns:
      `Rows`, float32.
    """
    rows, weight = _rows(site, eqn, operands), operands[site.operand]
    if not isinstance(weight, Packed) or weight.q.act is None:
        return rows
    rows = _divided(site, rows, weight.q)
    return rows if weight.q.rotation is None else rows._replace(x=weight.q.rotation.apply(rows.x))


def _divided(site: Site, rows: Rows, q: QTensor) -> Rows:
    if q.input_scale is None:
        return rows
    kept = [i for i in range(q.ndim) if i - q.ndim not in q.axes]
    batch = [kept.index(d) for d, _ in _in_leaf_order(site.batch, site)]
    order = [*batch, *(i for i in range(len(kept)) if i not in batch)]
    s = q.input_scale.transpose(*order, len(kept)).reshape(-1, 1, q.input_scale.shape[-1])
    if rows.owner is not None and s.shape[0] > 1:
        s = s[jnp.maximum(rows.owner, 0), 0][None]
    return rows._replace(x=divide(rows.x, s))


def _rows(site: Site, eqn: Any, operands: Sequence[Any]) -> Rows:
    x = operands[1 - site.operand].astype(jnp.float32)
    if site.op == "conv_general_dilated":
        return Rows(_patches(site, eqn, x))
    batch = [d for _, d in _in_leaf_order(site.batch, site)]
    contracted = [d for _, d in site.pairs]
    free = [d for d in range(x.ndim) if d not in batch and d not in contracted]
    x = x.transpose(*batch, *free, *contracted)
    lead = math.prod(x.shape[: len(batch)]), math.prod(x.shape[len(batch) : len(batch) + len(free)])
    k = math.prod(x.shape[len(batch) + len(free) :])
    x = _order_columns(x.reshape(*lead, k), [site.view.dims[w] for w, _ in site.pairs])
    if site.op != "ragged_dot_general":
        return Rows(x)
    sizes = operands[2]
    owner = jnp.repeat(jnp.arange(sizes.shape[0], dtype=jnp.int32), sizes, total_repeat_length=x.shape[1])
    beyond = jnp.arange(x.shape[1]) >= sizes.sum()  # rows past the last group belong to nobody
    return Rows(x, jnp.where(beyond, -1, owner), sizes.shape[0])


def _in_leaf_order(pairs: Sequence[tuple[int, int]], site: Site) -> list[tuple[int, int]]:
    def place(pair: tuple[int, int]) -> tuple[int, int]:
        atoms = site.view.dims[pair[0]]
        return (atoms[0].axis, -atoms[0].stride) if atoms else (-1, 0)

    return sorted(pairs, key=place)


def _order_columns(x: jax.Array, dims: Sequence[Dim]) -> jax.Array:
    """Permutes the last axis from the order in which the operand runs over the parameter to the parameter's own."""
    atoms = [atom for dim in dims for atom in dim]
    order = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].stride))
    if order == list(range(len(atoms))):
        return x
    lead = x.shape[:-1]
    split = x.reshape(*lead, *(atom.size for atom in atoms))
    return split.transpose(*range(len(lead)), *(len(lead) + i for i in order)).reshape(x.shape)


def _patches(site: Site, eqn: Any, x: jax.Array) -> jax.Array:
    """The windows a convolution slides over: (groups, samples, K)."""
    params = eqn.params
    dims, filter_shape = params["dimension_numbers"], eqn.invars[1].aval.shape
    spatial = dims.rhs_spec[2:]
    window = [filter_shape[i] for i in spatial]
    ndim = x.ndim
    patches = lax.conv_general_dilated_patches(
        x,
        window,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(dims.lhs_spec, tuple(range(ndim)), tuple(range(ndim))),
        precision=lax.Precision.HIGHEST,
    )  # (batch, channels * window, spatial...)
    batch, groups = patches.shape[0], site.groups
    patches = patches.reshape(batch, groups, -1, math.prod(patches.shape[2:]))
    patches = patches.transpose(1, 0, 3, 2).reshape(groups, -1, patches.shape[2])
    # The patches' columns run over (input channel, window); the weight's dims in the same order are these.
    return _order_columns(patches, [site.view.dims[i] for i in (dims.rhs_spec[1], *spatial)])
