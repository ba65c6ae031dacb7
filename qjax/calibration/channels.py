"""Statistics of each input channel, for the methods that scale channels."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.calibration.rows import Rows


class Channels(NamedTuple):
    """Of each column; NaN or an infinity in the data shows in its column and stays; no data is 0.

    Attributes:
      absmax: float32 (stack, K), `max |x|`.
      mean_abs: float32 (stack, K), the mean of `|x|`.
      mean: float32 (stack, K).
      count: int32 (stack,), the number of rows (fewer than 2^31).
    """

    absmax: jax.Array
    mean_abs: jax.Array
    mean: jax.Array
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class ChannelStats:
    """See `channel_stats`."""

    def init(self, stack: int, columns: int) -> Channels:
        zeros = jnp.zeros((stack, columns), jnp.float32)
        return Channels(zeros, zeros, zeros, jnp.zeros((stack,), jnp.int32))

    def update(self, state: Channels, rows: Rows) -> Channels:
        return self.merge(state, _shared(rows, rows.owner) if rows.owner is not None else _dense(rows.x))

    def merge(self, a: Channels, b: Channels) -> Channels:
        count = a.count + b.count
        share = (b.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32))[:, None]

        def mean(x: jax.Array, y: jax.Array) -> jax.Array:
            return x + (y - x) * share

        return Channels(jnp.maximum(a.absmax, b.absmax), mean(a.mean_abs, b.mean_abs), mean(a.mean, b.mean), count)


def channel_stats() -> ChannelStats:
    """The largest magnitude, the mean magnitude and the mean of each column.

    Means are kept, not sums: `m <- m + (mean(x) - m) * n / (N + n)`, which neither overflows nor drifts. Another cut of
    the data changes means in their last bits.

    Returns:
      An observer; its state is `Channels`.

    Example:
      >>> observer = channel_stats()
      >>> state = observer.update(observer.init(1, 2), Rows(jnp.array([[[1.0, -2.0], [3.0, 1.0]]])))
      >>> state.absmax.tolist(), state.mean_abs.tolist(), state.mean.tolist(), state.count.tolist()
      ([[3.0, 2.0]], [[2.0, 1.5]], [[2.0, -0.5]], [2])

    Source: AWQ (arXiv 2306.00978), the mean of `|x|`; SmoothQuant (arXiv 2211.10438), the absmax.
    """
    return ChannelStats()


def _dense(x: jax.Array) -> Channels:
    stack, samples, _ = x.shape
    part = x / max(samples, 1)  # before the sum, which could overflow
    count = jnp.full((stack,), samples, jnp.int32)
    return Channels(jnp.max(jnp.abs(x), axis=1, initial=0.0), jnp.sum(jnp.abs(part), axis=1), jnp.sum(part, axis=1), count)


def _shared(rows: Rows, owner: jax.Array) -> Channels:
    """Scatters rows to their experts; those of nobody fall outside and are dropped."""
    experts, x = rows.experts, rows.x[0]
    place = jnp.where(owner < 0, experts, owner)
    count = jnp.zeros((experts,), jnp.int32).at[place].add(1, mode="drop")
    part = x / jnp.maximum(count, 1).astype(jnp.float32)[owner][:, None]
    zeros = jnp.zeros((experts, x.shape[1]), jnp.float32)
    absmax, mean_abs = zeros.at[place].max(jnp.abs(x), mode="drop"), zeros.at[place].add(jnp.abs(part), mode="drop")
    return Channels(absmax, mean_abs, zeros.at[place].add(part, mode="drop"), count)
