"""Counts outlier columns: those that a mixed product takes out of the integers."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.calibration.channels import channel_stats
from qjax.calibration.rows import Rows


class OutlierCounts(NamedTuple):
    """How many outlier columns the calls of a site had; int32 (stack,) each, but for `peak`.

    Attributes:
      most: the largest number of outlier columns of one call.
      calls: how many calls there were; one that brings no row to a part does not count for it.
      over: calls with more outlier columns than the capacity.
      peak: float32 (stack,), the largest |x|; not finite if the data were not.
    """

    most: jax.Array
    calls: jax.Array
    over: jax.Array
    peak: jax.Array


@dataclasses.dataclass(frozen=True)
class OutlierColumns:
    """See `outlier_columns`."""

    threshold: float
    capacity: int | None = None

    def init(self, stack: int, columns: int) -> OutlierCounts:
        del columns
        none = jnp.zeros((stack,), jnp.int32)
        return OutlierCounts(none, none, none, jnp.zeros((stack,), jnp.float32))

    def update(self, state: OutlierCounts, rows: Rows) -> OutlierCounts:
        channels = channel_stats()
        seen = channels.update(channels.init(state.calls.shape[0], rows.x.shape[-1]), rows)
        count = jnp.sum(seen.absmax >= self.threshold, axis=-1, dtype=jnp.int32)
        over = jnp.zeros_like(count) if self.capacity is None else (count > self.capacity).astype(jnp.int32)
        peak = jnp.max(seen.absmax, axis=-1, initial=0.0)
        return self.merge(state, OutlierCounts(count, (seen.count > 0).astype(jnp.int32), over, peak))

    def merge(self, a: OutlierCounts, b: OutlierCounts) -> OutlierCounts:
        return OutlierCounts(jnp.maximum(a.most, b.most), a.calls + b.calls, a.over + b.over, jnp.maximum(a.peak, b.peak))


def outlier_columns(threshold: float, capacity: int | None = None) -> OutlierColumns:
    """Counts, call by call, the columns with any |x| >= threshold, and the calls with more of them than a capacity.

    A call is what one execution of a site reads: another cut of the data into batches gives other counts.

    Args:
      threshold: from which on a value is an outlier.
      capacity: how many columns a product takes; None counts no call as over.

    Returns:
      An observer; its state is `OutlierCounts`.

    Example:
      >>> observer = outlier_columns(6.0, capacity=1)
      >>> x = jnp.array([[[1.0, 7.0, 0.0], [-6.0, 2.0, 5.0]]])
      >>> state = observer.update(observer.update(observer.init(1, 3), Rows(x)), Rows(x / 2))
      >>> state.most.tolist(), state.calls.tolist(), state.over.tolist()
      ([2], [2], [1])

    Source: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), section 3.2, which takes all such columns, however many.
    """
    return OutlierColumns(threshold, capacity)
