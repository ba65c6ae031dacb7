"""On-line rotations: the input of a product is rotated, and its weight is stored rotated, so that the rotations cancel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import OnlineRotation, QTensor
from qjax.program import Packed, Site


def rotate_axes(x: jax.Array, axes: Sequence[int], rotation: OnlineRotation, back: bool = False) -> jax.Array:
    """Rotates an array along some of its axes, flattened in the order given.

    Args:
      x: floating.
      axes: not negative.
      rotation: by what.
      back: undoes it.

    Returns:
      An array of the shape and dtype of `x`; computed in float32.

    Example:
      >>> x = jnp.arange(6.0).reshape(2, 3)
      >>> there = rotate_axes(x, (1, 0), OnlineRotation())
      >>> rotate_axes(there, (1, 0), OnlineRotation(), back=True).round().astype(int).tolist()
      [[0, 1, 2], [3, 4, 5]]
    """
    rest = [i for i in range(x.ndim) if i not in axes]
    order = [*rest, *axes]
    moved = x.transpose(order)
    flat = moved.reshape(*moved.shape[: len(rest)], -1)
    flat = rotation.undo(flat) if back else rotation.apply(flat)
    return flat.reshape(moved.shape).transpose([order.index(i) for i in range(x.ndim)])


def input_axes(site: Site, q: QTensor) -> tuple[int, ...] | None:
    """The axes of a site's activation in the order in which its weight flattens them; None if they are not all that is contracted."""
    pair = dict(site.pairs)
    weight = [a + q.ndim for a in q.axes]
    return tuple(pair[a] for a in weight) if sorted(weight) == sorted(pair) else None


def rotated_operands(site: Site, operands: Sequence[Any], weight: Packed) -> list[Any] | None:
    """The operands of a float product in the rotated basis: x R and R^T w. None where the weight has to be rotated back in front of it.

    Rotating x costs a transform for each of its rows, rotating the weight back one for each of the weight's.
    """
    q = weight.q
    axes = None if q.input_scale is not None else input_axes(site, q)
    if q.rotation is None or axes is None:
        return None
    w = Packed(dataclasses.replace(q, rotation=None), weight.pending).value()
    x = rotate_axes(jnp.asarray(operands[1 - site.operand]), axes, q.rotation)
    return [w if i == site.operand else x if i == 1 - site.operand else v for i, v in enumerate(operands)]
