"""Products of two activations on integers: int8 x int8 -> int32, the scales in the epilogue; or on FP8: f8 x f8 -> float32.

    z_ij = s_x s_y (sum_k x_k y_k - z_x sum_k y_k - z_y sum_k x_k + K z_x z_y)

on codes x and y with scales s and zero points z, each scale that of the row i or j (per token) or of the whole operand. The sums are
taken modulo 2^32, so they are exact if the product of what the codes stand for fits 32 bits, which 33,000 contracted values
of any size always do. Stock XLA, as all of `integer` is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core import OnlineRotation, Operand, QProduct, encode_activation
from qjax.program import Product, compat
from qjax.runtime.rotation import rotate_axes


def shared_axes(per_token: bool, product: Product, side: int) -> tuple[int, ...]:
    """Returns the axes of an operand that share a scale: per token those that are contracted, else all of them."""
    return product.contracted[side] if per_token else tuple(range(len(product.shapes[side])))


def product_rule(product: Product, eqn: Any, operands: list[Any], state: QProduct) -> tuple[list[Any], QProduct]:
    """Runs a named product on integers or FP8.

    Args:
      product: which one.
      eqn: its equation.
      operands: the two activations, floating.
      state: how they are rounded; static scales are scalars here.

    Returns:
      The result, in the dtype that the equation gives, and `state` as it was. Backward, the gradient of the float product
      reaches both operands (straight-through).
    """

    @jax.custom_vjp
    def run(x: jax.Array, y: jax.Array, how: QProduct) -> jax.Array:
        return dot(product, eqn, x, y, how).astype(product.out_dtype)

    def forward(x: jax.Array, y: jax.Array, how: QProduct) -> tuple[jax.Array, Any]:
        return run(x, y, how), (x, y)

    def backward(saved: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        dx, dy = jax.vjp(lambda x, y: compat.bind(eqn, [x, y])[0], *saved)[1](t)
        return dx, dy, None

    run.defvjp(forward, backward)
    return [run(operands[0], operands[1], state)], state


def dot(product: Product, eqn: Any, x: jax.Array, y: jax.Array, how: QProduct) -> jax.Array:
    """Returns the float32 product of what the codes of both operands stand for."""
    if how.rotation is not None:
        x, y = rotated_pair(product, x, y, how.rotation)
    sides = [_Side(product, side, value, operand) for side, (value, operand) in enumerate(zip((x, y), how.operands, strict=True))]
    a, b = sides
    floats = how.lhs.is_float  # then both are; by precision, for XLA's default adds fewer bits of FP8 products up on a GPU
    total = lax.dot_general(
        a.codes, b.codes, (product.contracted, product.batch), out_sharding=eqn.params["out_sharding"],
        precision=lax.Precision.HIGHEST if floats else None, preferred_element_type=jnp.float32 if floats else jnp.int32,
    )  # fmt: skip
    if a.zero_point is not None:
        total = total - a.zero_point * b.sums
    if b.zero_point is not None:
        total = total - a.sums * b.zero_point
    if a.zero_point is not None and b.zero_point is not None:
        total = total + math.prod(x.shape[i] for i in product.contracted[0]) * (a.zero_point * b.zero_point)
    return total.astype(jnp.float32) * a.scale * b.scale


def rotated_pair(product: Product, x: jax.Array, y: jax.Array, rotation: OnlineRotation) -> tuple[jax.Array, jax.Array]:
    """Rotates both operands of a product along the axes that it contracts: float32."""
    wide = x.astype(jnp.float32), y.astype(jnp.float32)
    left, right = (rotate_axes(v, axes, rotation) for v, axes in zip(wide, product.contracted, strict=True))
    return left, right


class _Side:
    """One rounded operand; all but its codes have the rank of the result."""

    def __init__(self, product: Product, side: int, value: jax.Array, operand: Operand):
        self.product, self.side = product, side
        axes = shared_axes(operand.act.per_token, product, side)
        static = [None if a is None else a.reshape([1] * value.ndim) for a in (operand.scale, operand.zero_point)]
        self.codes, scale, zero_point = encode_activation(value, operand.act, axes, *static)
        self.scale = self.placed(scale)
        self.zero_point = None if zero_point is None else self.placed(zero_point)

    @property
    def sums(self) -> jax.Array:
        """The sum of the codes along the contracted axes, int32."""
        return self.placed(jnp.sum(self.codes, axis=self.product.contracted[self.side], dtype=jnp.int32, keepdims=True))

    def placed(self, a: jax.Array) -> jax.Array:
        """Moves axes of the operand to where the result has them: (batch..., free of the left..., free of the right...)."""
        contracted, batch = self.product.contracted[self.side], self.product.batch[self.side]
        free = [i for i in range(a.ndim) if i not in contracted and i not in batch]
        a = jnp.squeeze(a.transpose(*batch, *free, *contracted), tuple(range(a.ndim - len(contracted), a.ndim)))
        return a.reshape(_around(a.shape, len(batch), len(self.product.out_shape), left=self.side == 0))


def _around(shape: Sequence[int], n_batch: int, ndim: int, left: bool) -> tuple[int, ...]:
    ones = (1,) * (ndim - len(shape))
    return (*shape, *ones) if left else (*shape[:n_batch], *ones, *shape[n_batch:])
