"""Adapters: the product of two thin float matrices that is added to what packed codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Adapter(NamedTuple):
    """A low-rank matrix L R for each independent part of a weight; scales such as LoRA's alpha / r are folded in.

    Attributes:
      left: floating (kept..., r), a row for each kept value.
      right: floating (kept-like..., r, K): stacked axes (layers, experts) full, the others 1, over the flattened contracted values.

    >>> adapter = Adapter(jnp.ones((6, 2)), jnp.ones((1, 2, 9)))
    >>> adapter_matrix(adapter).shape
    (6, 9)
    """

    left: Any
    right: Any


def adapter_matrix(adapter: Adapter) -> jax.Array:
    """L R, float32 (kept..., K): as large as the weight, so for where the weight itself is dequantized.

    >>> adapter_matrix(Adapter(jnp.ones((3, 6, 2)), jnp.ones((3, 1, 2, 9)))).shape
    (3, 6, 9)
    """
    left, right = (a.astype(jnp.float32) for a in adapter)
    own = [i for i, n in enumerate(right.shape[:-2]) if n != 1]  # axes that have adapters of their own
    free = [i for i in range(left.ndim - 1) if i not in own]
    right = right.reshape(*(right.shape[i] for i in own), *right.shape[-2:])
    numbers = (((left.ndim - 1,), (len(own),)), (tuple(own), tuple(range(len(own)))))
    out = lax.dot_general(left, right, numbers, precision=lax.Precision.HIGHEST)
    order = [*own, *free]
    return out.transpose(*(order.index(i) for i in range(left.ndim - 1)), left.ndim - 1)


def flattened(adapter: Adapter | None, kept: Sequence[int], k: int) -> tuple[Any, Any]:
    """Both parts as a `QTensor` keeps them, each with one axis behind the kept ones: (kept..., r) and (kept-like..., K r).

    The contracted values run slower than the rank, so that cutting them cuts the array.

    Raises:
      ValueError: shapes that do not fit.
    """
    if adapter is None:
        return None, None
    left, right = adapter
    rank = left.shape[-1]
    fits = left.shape[:-1] == tuple(kept) and right.shape[-2:] == (rank, k) and len(right.shape) == len(left.shape) + 1
    if not fits or any(n not in (1, m) for n, m in zip(right.shape[:-2], kept, strict=True)):
        raise ValueError(f"`adapter` must be left {(*kept, 'r')} and right (1 or full in place of {tuple(kept)}, r, {k}), "
                         f"got {left.shape} and {right.shape}")  # fmt: skip
    return left, jnp.swapaxes(right, -1, -2).reshape(*right.shape[:-2], k * rank)


def unflattened(left: Any, right: Any) -> Adapter:
    """The inverse of `flattened`."""
    rank = left.shape[-1]
    if not isinstance(right, jax.Array):
        right = jnp.asarray(right)
    return Adapter(left, jnp.swapaxes(right.reshape(*right.shape[:-1], -1, rank), -1, -2))
