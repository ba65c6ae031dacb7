"""A sample of the rows that a site reads, for the searches that try a change on real activations."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration.rows import Rows

_NONE = jnp.iinfo(jnp.int32).max  # the index of a row that is not there


class Sample(NamedTuple):
    """Some of the rows.

    Attributes:
      x: float32 (stack, size, K), zero where there is no row.
      index: int32 (stack, size), the number of each in the data it was seen with; 2^31 - 1 where there is none.
      count: int32 (stack,), how many rows there were.
    """

    x: jax.Array
    index: jax.Array
    count: jax.Array

    @property
    def held(self) -> jax.Array:
        """Which of the rows are there: bool (stack, size)."""
        return self.index != _NONE


@dataclasses.dataclass(frozen=True)
class SampleRows:
    """See `sample_rows`."""

    size: int

    def init(self, stack: int, columns: int) -> Sample:
        x, index = jnp.zeros((stack, self.size, columns), jnp.float32), jnp.full((stack, self.size), _NONE, jnp.int32)
        return Sample(x, index, jnp.zeros((stack,), jnp.int32))

    def update(self, state: Sample, rows: Rows) -> Sample:
        samples = rows.x.shape[1]
        if rows.owner is None:
            index = state.count[:, None] + jnp.arange(samples, dtype=jnp.int32)[None]
            fresh = self._pick(rows.x, index)
            return self._join(state, fresh, jnp.full(state.count.shape, samples, jnp.int32))
        x, owner = rows.x[0], rows.owner

        # One expert at a time: all of them at once would hold `experts` copies of the rows.
        def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            expert, count = part
            mine = owner == expert
            index = jnp.where(mine, count + jnp.cumsum(mine, dtype=jnp.int32) - 1, _NONE)
            return *_least(x, index, self.size), jnp.sum(mine, dtype=jnp.int32)

        x, index, more = lax.map(one, (jnp.arange(rows.experts, dtype=jnp.int32), state.count))
        return self._join(state, (x, index), more)

    def merge(self, a: Sample, b: Sample) -> Sample:
        return self._join(a, (b.x, b.index), b.count)

    def _pick(self, x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(lambda x, i: _least(x, i, self.size))(x, index)

    def _join(self, state: Sample, rows: tuple[jax.Array, jax.Array], more: jax.Array) -> Sample:
        x, index = self._pick(jnp.concatenate([state.x, rows[0]], 1), jnp.concatenate([state.index, rows[1]], 1))
        return Sample(x, index, state.count + more)


def sample_rows(size: int = 512) -> SampleRows:
    """Keeps the rows whose number in the data has the smallest hash: a sample without a random key, in fixed memory.

    It does not depend on how the data is cut into calls. States that were begun apart and merged keep rows of both.

    Args:
      size: how many rows of each part.

    Returns:
      An observer; its state is `Sample`.

    Raises:
      ValueError: `size` is less than 1.

    Example:
      >>> observer = sample_rows(2)
      >>> state = observer.update(observer.init(1, 1), Rows(jnp.arange(6.0).reshape(1, 6, 1)))
      >>> state.x[0, :, 0].tolist(), state.index.tolist(), state.count.tolist()
      ([0.0, 3.0], [[0, 3]], [6])

    Source: bottom-k sampling by hashed rank (Cohen and Kaplan 2007).
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}")
    return SampleRows(size)


def _least(x: jax.Array, index: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The `size` rows whose index has the smallest hash, by rising index; padded with none: x (n, K), index (n,)."""
    short = max(size - index.shape[0], 0)
    x, index = jnp.pad(x, ((0, short), (0, 0))), jnp.pad(index, (0, short), constant_values=_NONE)
    rank = jnp.where(index == _NONE, jnp.uint32(0), ~_hash(index))
    chosen = lax.top_k(rank, size)[1]
    chosen = chosen[jnp.argsort(index[chosen])]
    index = index[chosen]
    return jnp.where((index == _NONE)[:, None], 0, x[chosen]), index


def _hash(index: jax.Array) -> jax.Array:
    """Mixes the bits of an index: a bijection of 32 bits."""
    h = index.astype(jnp.uint32)
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)
