"""`QProduct`: how the two operands of a product of activations are rounded, and their static ranges."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from qjax.core.activations import ActSpec
from qjax.core.hadamard import OnlineRotation

PRODUCT_ARRAYS = ("lhs_scale", "lhs_zero_point", "rhs_scale", "rhs_zero_point")


class Operand(NamedTuple):
    """One operand of a `QProduct`: its spec, and scale and zero point where they are known beforehand."""

    act: ActSpec
    scale: jax.Array | None
    zero_point: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QProduct:
    """A product of two activations that multiplies integers or FP8. A pytree of its static scales; one dynamic on both sides has none.

    Attributes:
      lhs_scale: of the left operand, float32, one for each turn of the loops over layers around the product (scalar outside
        of loops); None where ranges are found in every call.
      lhs_zero_point: int32, the shape of the scale, or None.
      rhs_scale: of the right operand.
      rhs_zero_point: of the right operand.
      lhs: what the left operand becomes.
      rhs: what the right operand becomes.
      rotation: by what both operands are rotated along the contracted axes before they are rounded, or None. The product is what it
        was: (x R) (y R)^T = x y^T.

    Example:
      >>> import qjax
      >>> int8 = qjax.dynamic(qjax.int8())
      >>> QProduct(None, None, None, None, int8, int8)
      QProduct(dynamic(int8(per="token")) x dynamic(int8(per="token")), 0 bytes)
    """

    lhs_scale: jax.Array | None
    lhs_zero_point: jax.Array | None
    rhs_scale: jax.Array | None
    rhs_zero_point: jax.Array | None
    lhs: ActSpec = dataclasses.field(metadata={"static": True})
    rhs: ActSpec = dataclasses.field(metadata={"static": True})
    rotation: OnlineRotation | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """The left operand and the right one."""
        return Operand(self.lhs, self.lhs_scale, self.lhs_zero_point), Operand(self.rhs, self.rhs_scale, self.rhs_zero_point)

    @property
    def nbytes(self) -> int:
        """Bytes of the scales and zero points."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        rotated = "" if self.rotation is None else f", both by {self.rotation}"
        return f"QProduct({self.lhs} x {self.rhs}, {self.nbytes} bytes{rotated})"


def describe_pair(pair: tuple[Any, Any]) -> str:
    """How reports write the specs of two operands.

    >>> describe_pair(("a", "b"))
    'a x b'
    """
    return f"{pair[0]} x {pair[1]}"
