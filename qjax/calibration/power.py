"""The mean square of each column: the diagonal of X^T X without the rest of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.calibration.rows import Rows


class Power(NamedTuple):
    """Of each column; no data is 0.

    Attributes:
      mean_square: float32 (stack, K).
      count: int32 (stack,), the number of rows (fewer than 2^31).
    """

    mean_square: jax.Array
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class ColumnPower:
    """Mean squares of columns, `E[x^2]`, half of GPTQ's diag(H): K numbers in place of K^2.

    Example:
      >>> observer = ColumnPower()
      >>> state = observer.update(observer.init(1, 2), Rows(jnp.array([[[1.0, 2.0], [3.0, 0.0]]])))
      >>> state.mean_square.tolist(), state.count.tolist()
      ([[5.0, 2.0]], [2])
    """

    def init(self, stack: int, columns: int) -> Power:
        return Power(jnp.zeros((stack, columns), jnp.float32), jnp.zeros((stack,), jnp.int32))

    def update(self, state: Power, rows: Rows) -> Power:
        return self.merge(state, _dense(rows.x) if rows.owner is None else _shared(rows, rows.owner))

    def merge(self, a: Power, b: Power) -> Power:
        count = a.count + b.count
        share = (b.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32))[:, None]
        return Power(a.mean_square + (b.mean_square - a.mean_square) * share, count)


def _dense(x: jax.Array) -> Power:
    stack, samples, _ = x.shape
    return Power(jnp.sum(jnp.square(x) / max(samples, 1), axis=1), jnp.full((stack,), samples, jnp.int32))


def _shared(rows: Rows, owner: jax.Array) -> Power:
    """Scatters rows to their experts; those of nobody fall outside and are dropped."""
    experts, x = rows.experts, rows.x[0]
    place = jnp.where(owner < 0, experts, owner)
    count = jnp.zeros((experts,), jnp.int32).at[place].add(1, mode="drop")
    part = jnp.square(x) / jnp.maximum(count, 1).astype(jnp.float32)[owner][:, None]
    return Power(jnp.zeros((experts, x.shape[1]), jnp.float32).at[place].add(part, mode="drop"), count)
