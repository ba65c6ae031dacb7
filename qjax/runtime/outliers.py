"""The 16-bit part of a mixed product: outlier columns are gathered, multiplied apart, and taken out of the integers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core import Outliers


class Split(NamedTuple):
    """An activation in two parts.

    Attributes:
      inliers: x with zeros in the columns that were taken out.
      picked: (batch..., free..., C), 16 bit, those columns; zero in a place that none fills.
      index: int32 (batch..., C), which columns they are.
    """

    inliers: jax.Array
    picked: jax.Array
    index: jax.Array


def split_outliers(x: jax.Array, outliers: Outliers, n_batch: int, dtype: Any) -> Split:
    """Takes out the columns with any |x| >= threshold, the largest first, at most `capacity` of them.

    Args:
      x: (batch..., free..., K); every element of the `n_batch` batch axes has columns of its own.
      outliers: threshold and capacity; without a capacity all columns may be outliers.
      n_batch: how many batch axes there are.
      dtype: of 16 bits, what the columns are multiplied in.

    Returns:
      Both parts. The shapes do not depend on the data: C = min(capacity, K).

    Example:
      >>> x = jnp.float32([[1.0, 9.0, -7.0], [0.5, 0.0, 0.0]])
      >>> inliers, picked, index = split_outliers(x, Outliers(6.0, capacity=1), 0, jnp.bfloat16)
      >>> inliers.tolist(), picked.tolist(), index.tolist()
      ([[1.0, 0.0, -7.0], [0.5, 0.0, 0.0]], [[9.0], [0.0]], [1])
    """
    k = x.shape[-1]
    free = tuple(range(n_batch, x.ndim - 1))
    peak = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=free, initial=0.0)
    largest, index = lax.top_k(peak, k if outliers.capacity is None else min(outliers.capacity, k))
    taken = largest >= outliers.threshold
    outside = jnp.put_along_axis(jnp.zeros(peak.shape, bool), index, taken, axis=-1, inplace=False)

    def per_row(a: jax.Array) -> jax.Array:
        return a.reshape(*a.shape[:n_batch], *[1] * len(free), a.shape[-1])

    picked = jnp.where(per_row(taken), take_last(x, index, n_batch), jnp.zeros((), x.dtype))
    return Split(jnp.where(per_row(outside), jnp.zeros((), x.dtype), x), picked.astype(dtype), index)


def take_last(a: jax.Array, index: jax.Array, n_batch: int) -> jax.Array:
    """Entries of the last axis: a (batch..., rest..., K), index (batch..., C), result (batch..., rest..., C)."""
    take: Callable[..., Any] = functools.partial(jnp.take, axis=-1, mode="clip")
    for _ in range(n_batch):
        take = jax.vmap(take)
    return take(a, index)


def outlier_product(
    split: Split, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, order: Sequence[int], n_batch: int, x_first: bool
) -> tuple[jax.Array, bool]:
    """The product of the picked columns and the same rows of the weight, decoded where they are gathered.

    Args:
      split: from `split_outliers`.
      codes: int8 (kept..., Kpad), the weight's.
      scale: float32 (kept-like..., G).
      zero_point: int32 or float32 like the scale, or None.
      order: the kept axes, the batch axes first.
      n_batch: how many batch axes there are.
      x_first: whether the activation is the left operand.

    Returns:
      float32 (batch..., free..., rest...), or rest before free; and whether the weight's scales are in it: a single scale a row
      is left to the epilogue, because the codes are exact in 16 bits and decoded weights are not (codes less a floating zero point
    are neither).
    """
    dtype, lead = split.picked.dtype, split.index.shape[:-1]

    def ordered(a: jax.Array) -> jax.Array:
        a = a.transpose(*order, a.ndim - 1)
        return jnp.broadcast_to(a, (*lead, *a.shape[n_batch:]))

    grouped = scale.shape[-1] > 1
    group = split.index // (codes.shape[-1] // scale.shape[-1])

    def of_column(a: jax.Array) -> jax.Array:
        return take_last(ordered(a), group, n_batch) if grouped else ordered(a)

    kind = jnp.int32 if zero_point is None else zero_point.dtype
    rows = take_last(ordered(codes), split.index, n_batch).astype(kind)
    rows = rows if zero_point is None else rows - of_column(zero_point)
    decoded = grouped or kind == jnp.float32
    values = (rows.astype(jnp.float32) * of_column(scale) if decoded else rows).astype(dtype)
    batch = tuple(range(n_batch))
    operands = (split.picked, values) if x_first else (values, split.picked)
    numbers = tuple((a.ndim - 1,) for a in operands), (batch, batch)
    return _dot(*operands, numbers), decoded


def _dot(a: jax.Array, b: jax.Array, numbers: Any) -> jax.Array:
    """The product in 16 bit, added in float32. On CPU the same numbers as float32: XLA has no 16-bit kernel there for every shape."""

    def half(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)

    def single(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), numbers)

    return lax.platform_dependent(a, b, cpu=single, default=half)
