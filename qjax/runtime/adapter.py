"""The low-rank part of a weight at run time: y = x W^T + (x R^T) L^T, two thin products in place of one with L R.

Where the product divides its input by s, L R stands for a part of s w: R / s, which is thin, is what meets x then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core import Adapter, QTensor, divide
from qjax.program import Site, materialize
from qjax.program.labels import axes_of


def why_not(site: Site) -> str:
    """Says why a site cannot multiply by the two parts of an adapter; "" if it can, or only looks rows up."""
    if site.op == "conv_general_dilated":
        return "a convolution"
    if site.op == "dot_general" and axes_of([site.view.dims[w] for w, _ in site.pairs]) != set(site.contracted):
        return "it is contracted over a part of its axes"
    return ""


def adapter_product(site: Site, eqn: Any, operands: Sequence[Any]) -> jax.Array | None:
    """(x R^T) L^T of a site whose packed weight has an adapter, on the float activations.

    Args:
      site: the site.
      eqn: its equation.
      operands: those of the equation, the weight packed.

    Returns:
      float32, the shape of the equation's result; None where `why_not` says so, or the weight comes in another form.
    """
    q, x = operands[site.operand].q, materialize(operands[1 - site.operand])
    if site.op == "dot_general":
        return _dot(eqn, x, q, site.operand)
    if site.op == "ragged_dot_general":
        return _ragged(eqn, x, q, jnp.asarray(operands[2]))
    return None


def _dot(eqn: Any, x: jax.Array, q: QTensor, operand: int) -> jax.Array | None:
    contract, batch = eqn.params["dimension_numbers"]
    flat, adapter = [a + q.ndim for a in q.axes], q.adapter
    if sorted(flat) != sorted(contract[operand]) or adapter is None:
        return None
    kept = [i for i in range(q.ndim) if i not in flat]
    places = [kept.index(b) for b in batch[operand]]
    rest = [i for i in range(len(kept)) if i not in places]
    right = _right(q, adapter)
    own = [i for i, n in enumerate(right.shape[:-2]) if n != 1]
    if set(own) - set(places):  # experts that all see the same rows: each has a right part of its own
        return _many(eqn, x, right, adapter.left, operand)
    pair = dict(zip(contract[operand], contract[1 - operand], strict=True))
    free = [i for i in range(x.ndim) if i not in batch[1 - operand] and i not in contract[1 - operand]]
    lead = [x.shape[i] for i in batch[1 - operand]]
    x = x.transpose(*batch[1 - operand], *free, *(pair[a] for a in flat)).reshape(*lead, *(x.shape[i] for i in free), -1)
    right = right.transpose(*places, *rest, len(kept), len(kept) + 1)
    right = jnp.broadcast_to(right.reshape(*right.shape[: len(lead)], *right.shape[-2:]), (*lead, *right.shape[-2:]))
    left = adapter.left.transpose(*places, *rest, len(kept))
    each = tuple(range(len(lead)))
    thin = _product(x, right, (((x.ndim - 1,), (len(lead) + 1,)), (each, each)))  # (batch..., free..., r)
    numbers = ((thin.ndim - 1,), (left.ndim - 1,)), (each, each)
    if operand == 1:
        return _product(thin, left, numbers)
    return _product(left, thin, (numbers[0][::-1], numbers[1]))


def _many(eqn: Any, x: jax.Array, right: jax.Array, left: jax.Array, operand: int) -> jax.Array | None:
    """A stacked weight whose parts all meet the same x: no batch."""
    contract, batch = eqn.params["dimension_numbers"]
    if batch[operand] or len(contract[operand]) != 1:
        return None
    own = [i for i, n in enumerate(right.shape[:-2]) if n != 1]
    right = jnp.squeeze(right, tuple(i for i, n in enumerate(right.shape[:-2]) if n == 1))
    free = [i for i in range(x.ndim) if i not in contract[1 - operand]]
    thin = _product(x, right, (((contract[1 - operand][0],), (right.ndim - 1,)), ((), ())))  # (free..., own..., r)
    thin = thin.transpose(*range(len(free), len(free) + len(own)), *range(len(free)), thin.ndim - 1)  # (own..., free..., r)
    rest = [i for i in range(left.ndim - 1) if i not in own]
    left = left.transpose(*own, *rest, left.ndim - 1)
    each = tuple(range(len(own)))
    out = _product(thin, left, (((thin.ndim - 1,), (left.ndim - 1,)), (each, each)))  # (own..., free..., rest...)
    kept = [*own, *rest]
    order = [kept.index(i) + (len(free) if kept.index(i) >= len(own) else 0) for i in range(len(kept))]
    frees = list(range(len(own), len(own) + len(free)))
    return out.transpose(*frees, *order) if operand == 1 else out.transpose(*order, *frees)


def _ragged(eqn: Any, x: jax.Array, q: QTensor, sizes: jax.Array) -> jax.Array | None:
    """Experts that share a list of rows: x (rows, K), weight (experts, K, N) in some order."""
    dims, adapter = eqn.params["ragged_dot_dimension_numbers"], q.adapter
    contract, batch = dims.dot_dimension_numbers
    plain = tuple(contract[0]) == (1,) and not batch[0] and tuple(dims.lhs_ragged_dimensions) == (0,) and x.ndim == 2
    if not plain or adapter is None or q.ndim != 3 or tuple(dims.rhs_group_dimensions) != (0,):
        return None
    if tuple(a + 3 for a in q.axes) != tuple(contract[1]):
        return None
    right = _right(q, adapter)[:, 0]
    right = jnp.broadcast_to(right, (q.shape[0], *right.shape[-2:]))
    right, left = (a.astype(jnp.float32).swapaxes(1, 2) for a in (right, adapter.left))  # (experts, K, r), (experts, r, N)
    thin = lax.ragged_dot(x.astype(jnp.float32), right, sizes)
    return lax.ragged_dot(thin, left, sizes)


def _right(q: QTensor, adapter: Adapter) -> jax.Array:
    """R / s (kept-like..., r, K), or R as it is."""
    if q.input_scale is None:
        return adapter.right
    return divide(adapter.right.astype(jnp.float32), q.input_scale[..., None, :])


def _product(a: jax.Array, b: jax.Array, numbers: Any) -> jax.Array:
    return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), numbers, precision=lax.Precision.HIGHEST)
