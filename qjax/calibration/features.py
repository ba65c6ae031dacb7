"""Statistics of each input channel that tell a constant one, and the moments of all values."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.calibration.rows import Rows


class Features(NamedTuple):
    """NaN or an infinity in the data shows and stays; no data is 0.

    Attributes:
      lo: float32 (stack, K), the least value of each column.
      hi: float32 (stack, K), the largest.
      mean: float32 (stack,), of all values.
      variance: float32 (stack,), of all values.
      count: int32 (stack,), the number of rows (fewer than 2^31).
    """

    lo: jax.Array
    hi: jax.Array
    mean: jax.Array
    variance: jax.Array
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class FeatureStats:
    """See `feature_stats`."""

    def init(self, stack: int, columns: int) -> Features:
        ends, one = jnp.zeros((stack, columns), jnp.float32), jnp.zeros((stack,), jnp.float32)
        return Features(ends, ends, one, one, jnp.zeros((stack,), jnp.int32))

    def update(self, state: Features, rows: Rows) -> Features:
        return self.merge(state, _shared(rows, rows.owner) if rows.owner is not None else _dense(rows.x))

    def merge(self, a: Features, b: Features) -> Features:
        count = a.count + b.count
        share = b.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
        apart = b.mean - a.mean
        variance = a.variance + (b.variance - a.variance) * share + jnp.square(apart) * share * (1 - share)
        none_a, none_b = (a.count == 0)[:, None], (b.count == 0)[:, None]
        lo = jnp.where(none_a, b.lo, jnp.where(none_b, a.lo, jnp.minimum(a.lo, b.lo)))
        hi = jnp.where(none_a, b.hi, jnp.where(none_b, a.hi, jnp.maximum(a.hi, b.hi)))
        return Features(lo, hi, a.mean + apart * share, variance, count)


def feature_stats() -> FeatureStats:
    """The least and the largest value of each column, and the mean and the variance of all values together.

    A column with `lo == hi` was constant. Means and variances of parts are joined as they are, not as sums:
    `m = m_a + d s`, `v = v_a + (v_b - v_a) s + d^2 s (1 - s)` with `d = m_b - m_a`, `s = n_b / (n_a + n_b)`. Another cut of the data
    changes them in their last bits, and no bit of `lo` and `hi`.

    Returns:
      An observer; its state is `Features`.

    Example:
      >>> observer = feature_stats()
      >>> state = observer.update(observer.init(1, 2), Rows(jnp.array([[[1.0, 5.0], [3.0, 5.0]]])))
      >>> state.lo.tolist(), state.hi.tolist(), state.mean.tolist(), state.variance.tolist()
      ([[1.0, 5.0]], [[3.0, 5.0]], [3.5], [2.75])

    Source: Chan, Golub and LeVeque, Algorithms for computing the sample variance (1983), eq. 2.1.
    """
    return FeatureStats()


def _dense(x: jax.Array) -> Features:
    stack, samples, k = x.shape
    mean = jnp.sum(x / max(samples * k, 1), axis=(1, 2))  # each before the sum, which could overflow
    variance = jnp.sum(jnp.square(x - mean[:, None, None]) / max(samples * k, 1), axis=(1, 2))
    lo, hi = (f(x, axis=1) if samples else jnp.zeros((stack, k), x.dtype) for f in (jnp.min, jnp.max))
    return Features(lo, hi, mean, variance, jnp.full((stack,), samples, jnp.int32))


def _shared(rows: Rows, owner: jax.Array) -> Features:
    """Scatters rows to their experts; those of nobody fall outside and are dropped."""
    experts, x = rows.experts, rows.x[0]
    place = jnp.where(owner < 0, experts, owner)
    count = jnp.zeros((experts,), jnp.int32).at[place].add(1, mode="drop")
    values = jnp.maximum(count * x.shape[1], 1).astype(jnp.float32)
    none = jnp.zeros((experts,), jnp.float32)
    mean = none.at[place].add(jnp.sum(x / values[owner][:, None], axis=1), mode="drop")
    apart = jnp.square(x - mean[owner][:, None])
    variance = none.at[place].add(jnp.sum(apart / values[owner][:, None], axis=1), mode="drop")
    lo = jnp.full((experts, x.shape[1]), jnp.inf).at[place].min(x, mode="drop")
    hi = jnp.full((experts, x.shape[1]), -jnp.inf).at[place].max(x, mode="drop")
    seen = (count > 0)[:, None]
    return Features(jnp.where(seen, lo, 0.0), jnp.where(seen, hi, 0.0), mean, variance, count)
