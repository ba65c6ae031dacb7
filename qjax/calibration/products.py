"""Observes the operands of products of two activations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration.observers import Observer
from qjax.calibration.rows import Rows
from qjax.core import OnlineRotation
from qjax.program import Product

Pair = tuple[Any, Any]


def why_not_observed(product: Product) -> str:
    """Says why the operands of a product cannot be observed; "" if they can."""
    return "it stands in the condition of a loop, which hands nothing out" if product.condition else product.refusal


def operand_rows(product: Product, operands: Sequence[jax.Array]) -> tuple[Rows, Rows]:
    """Lays both operands of a product out as rows of their contracted values.

    Args:
      product: which one.
      operands: of its equation.

    Returns:
      `Rows` of each, float32 (1, samples, K).
    """

    def one(side: int) -> Rows:
        contracted, x = product.contracted[side], operands[side].astype(jnp.float32)
        free = [i for i in range(x.ndim) if i not in contracted]
        columns = math.prod(x.shape[i] for i in contracted)
        return Rows(x.transpose(*free, *contracted).reshape(1, math.prod(x.shape[i] for i in free), columns))

    return one(0), one(1)


@dataclasses.dataclass(frozen=True)
class OperandObservers:
    """An observer for each operand of a product, or None where there is nothing to know; the state is a pair of theirs.

    Attributes:
      lhs: of the left operand.
      rhs: of the right one.
      rotation: by which both are rotated before they are seen, or None.
    """

    lhs: Observer[Any] | None
    rhs: Observer[Any] | None
    rotation: OnlineRotation | None = None

    @property
    def pair(self) -> tuple[Observer[Any] | None, Observer[Any] | None]:
        """Both."""
        return self.lhs, self.rhs

    def init(self, product: Product) -> Pair:
        """Returns the state before any data, with a leading axis for each loop over layers around the product."""
        sizes = [math.prod(shape[i] for i in dims) for shape, dims in zip(product.shapes, product.contracted, strict=True)]
        states = tuple(None if o is None else o.init(1, n) for o, n in zip(self.pair, sizes, strict=True))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*product.turns, *x.shape)), states)

    def update(self, state: Pair, rows: tuple[Rows, Rows]) -> Pair:
        """Returns the state after one more call."""
        if self.rotation is not None:
            rows = rows[0]._replace(x=self.rotation.apply(rows[0].x)), rows[1]._replace(x=self.rotation.apply(rows[1].x))
        return tuple(None if o is None else o.update(s, r) for o, s, r in zip(self.pair, state, rows, strict=True))  # pyright: ignore
