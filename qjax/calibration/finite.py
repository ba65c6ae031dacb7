"""Whether all of the data were finite: for the errors that say which batch was not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qjax.calibration.rows import Rows


@dataclasses.dataclass(frozen=True)
class AllFinite:
    """Remembers, of each part, whether every value was finite: the state is float32 (stack,), 0 if so and NaN if not.

    Example:
      >>> observer = AllFinite()
      >>> observer.update(observer.init(2, 1), Rows(jnp.array([[[1.0]], [[jnp.inf]]]))).tolist()
      [0.0, nan]
    """

    def init(self, stack: int, columns: int) -> jax.Array:
        return jnp.zeros((stack,), jnp.float32)

    def update(self, state: jax.Array, rows: Rows) -> jax.Array:
        finite = jnp.isfinite(rows.x).all(axis=2)
        if rows.owner is not None:
            mine = rows.owner[None] == jnp.arange(rows.experts, dtype=rows.owner.dtype)[:, None]
            finite = finite | ~mine
        return jnp.where(finite.all(axis=1), state, jnp.float32(jnp.nan))

    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return a + b
