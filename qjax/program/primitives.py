"""What a `View` becomes under each primitive that only rearranges, and which primitives are sites."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from qjax.program import labels
from qjax.program.labels import View

# Shape-preserving and elementwise: they commute with every view.
ELEMENTWISE_VIEWS = frozenset(
    {"convert_element_type", "copy", "copy_p", "name", "pvary", "pbroadcast", "reduce_precision", "stop_gradient"}
)
# A constraint on where a parameter lives says nothing about its numbers, but its sharding is written for one rank.
PLACEMENTS = frozenset({"sharding_constraint"})
PARTIAL_VIEWS = frozenset({"slice", "dynamic_slice", "split"})
VIEWS = ELEMENTWISE_VIEWS | PLACEMENTS | PARTIAL_VIEWS | {"transpose", "reshape", "squeeze", "broadcast_in_dim"}
# Hands every operand on as it is.
BARRIER = "optimization_barrier"
SITES = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "gather"})


def views_after(eqn: Any, view: View) -> list[View] | None:
    """Returns the views that a view primitive makes of its first operand, one a result, or None if it copies or mixes."""
    outs = [_view_after(eqn, view)] if eqn.primitive.name != "split" else _pieces(eqn, view)
    return None if any(out is None for out in outs) else [out for out in outs if out is not None]


def split_starts(eqn: Any) -> list[tuple[int, ...]]:
    """Returns where each result of a `split` begins in its operand."""
    axis, ndim = eqn.params["axis"], len(eqn.invars[0].aval.shape)
    ends = itertools.accumulate(eqn.params["sizes"], initial=0)
    return [tuple(at if i == axis else 0 for i in range(ndim)) for at in ends][:-1]


def _pieces(eqn: Any, view: View) -> list[View | None]:
    return [labels.restrict(view, out.aval.shape, start) for out, start in zip(eqn.outvars, split_starts(eqn), strict=True)]


def _view_after(eqn: Any, view: View) -> View | None:
    name, params = eqn.primitive.name, eqn.params
    if name in ELEMENTWISE_VIEWS or name in PLACEMENTS:
        return view
    if name == "transpose":
        return labels.transpose(view, params["permutation"])
    if name == "reshape":
        return None if params.get("dimensions") is not None else labels.reshape(view, params["new_sizes"])
    if name == "squeeze":
        return labels.squeeze(view, params["dimensions"])
    if name == "broadcast_in_dim":
        return labels.broadcast_in_dim(view, params["shape"], params["broadcast_dimensions"])
    if name == "slice":
        return labels.restrict(view, eqn.outvars[0].aval.shape, params["start_indices"], params["strides"])
    if name == "dynamic_slice":
        return labels.restrict(view, eqn.outvars[0].aval.shape)
    return None


class Contraction(NamedTuple):
    """How an equation uses the operand that holds a weight: which of its dims do what.

    Attributes:
      contracted: dims that are summed over; for a gather the features of a row.
      stacked: dims of which every product sees one element.
      pairs: (dim of the weight, dim of the activation) contracted with each other.
      batch: (dim of the weight, dim of the activation) that run along together.
    """

    contracted: tuple[int, ...]
    stacked: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    batch: tuple[tuple[int, int], ...] = ()


def contraction(eqn: Any, operand: int) -> Contraction | None:
    """Returns how the equation uses the operand that holds a weight, or None if it cannot be a site."""
    name, params = eqn.primitive.name, eqn.params
    ndim = len(eqn.invars[operand].aval.shape)
    if name == "dot_general":
        return _dot(params["dimension_numbers"], operand)
    if name == "conv_general_dilated" and operand == 1 and params["batch_group_count"] == 1:
        out = params["dimension_numbers"].rhs_spec[0]
        return Contraction(tuple(i for i in range(ndim) if i != out))
    if name == "ragged_dot_general" and operand == 1:
        dims = params["ragged_dot_dimension_numbers"]
        found = _dot(dims.dot_dimension_numbers, operand)
        return found._replace(stacked=(*found.stacked, *dims.rhs_group_dimensions))
    if name == "gather" and operand == 0:
        return _gather(eqn, ndim)
    return None


def _dot(dimension_numbers: Any, operand: int) -> Contraction:
    contract, batch = dimension_numbers
    return Contraction(
        contracted=tuple(contract[operand]),
        stacked=tuple(batch[operand]),
        pairs=tuple(zip(contract[operand], contract[1 - operand], strict=True)),
        batch=tuple(zip(batch[operand], batch[1 - operand], strict=True)),
    )


def _gather(eqn: Any, ndim: int) -> Contraction | None:
    """A gather is a site when it looks whole rows up along one axis (an embedding)."""
    dims, slice_sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    rows = tuple(dims.start_index_map)
    features = tuple(i for i in range(ndim) if i not in rows)
    whole_rows = (
        len(rows) == 1
        and tuple(dims.collapsed_slice_dims) == rows
        and not dims.operand_batching_dims
        and all(slice_sizes[i] == shape[i] for i in features)
    )
    return Contraction(features) if whole_rows and len(features) == 1 else None
