"""Products with the axes that are kept merged into one, so that a gradient of them is one plain matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from qjax.program import compat


def bind_merged(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Applies an equation as `compat.bind` does; of a `dot_general` the kept axes of each operand that stand together become one axis.

    The product is the same, sum for sum. What differs is its gradient: that of the weight of x (B, T, K) @ w (K, N) sums over two axes,
    B and T, for which XLA on CPUs first writes out a transposed operand, number by number; over one axis, B T, it is a matrix product
    that reads its operand as it lies.

    Args:
      eqn: an equation of a jaxpr.
      values: its operands.

    Returns:
      Its results.
    """
    if eqn.primitive is not lax.dot_general_p or eqn.params.get("out_sharding") is not None:
        return compat.bind(eqn, values)
    (contract, batch), (x, y) = eqn.params["dimension_numbers"], values
    kept = [[d for d in range(v.ndim) if d not in c and d not in b] for v, c, b in zip((x, y), contract, batch, strict=True)]
    shape = [x.shape[d] for d in (*batch[0], *kept[0])] + [y.shape[d] for d in kept[1]]
    merged = [_merge(*operand) for operand in zip((x, y), kept, contract, batch, strict=True)]
    if all(new is old for (new, _, _), old in zip(merged, (x, y), strict=True)):
        return compat.bind(eqn, values)
    (x, *numbers_x), (y, *numbers_y) = merged
    numbers = tuple(zip(numbers_x, numbers_y, strict=True))
    with eqn.ctx.manager:
        return [lax.dot_general_p.bind(x, y, **(eqn.params | {"dimension_numbers": numbers})).reshape(shape)]


Axes = tuple[int, ...]


def _merge(x: jax.Array, kept: Sequence[int], contract: Axes, batch: Axes) -> tuple[jax.Array, Axes, Axes]:
    """An operand with its kept axes as one, and where its other axes are then; as it was, where they do not stand together."""
    if len(kept) < 2 or list(kept) != list(range(kept[0], kept[-1] + 1)):
        return x, contract, batch
    first, gone = kept[0], len(kept) - 1

    def moved(axes: Axes) -> Axes:
        return tuple(a if a < first else a - gone for a in axes)

    size = x.size if gone + 1 == x.ndim else -1
    return x.reshape(*x.shape[:first], size, *x.shape[first + gone + 1 :]), moved(contract), moved(batch)
