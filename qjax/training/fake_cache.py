"""A cache whose past tokens are rounded where it is read, as those of the packed cache will be, and trained through the rounding."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import CacheSpec, QCache, hadamard_transform, init_cache
from qjax.core.cache import past_tokens
from qjax.program import InputLeaf
from qjax.training.straight_through import straight_through


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["past", "window", "length"], meta_fields=["spec", "axis", "capacity"]
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FakeCache(QCache):
    """A cache that keeps all tokens in float, and is read as the `QCache` of the same tokens is. Built by `fake_cache`.

    Invariants:
      past: None.
      window: (..., capacity, channels), all tokens, time last but one.
      length: int32 (...), how many there are; below 0 as long as nothing was written: then that is not known, and nothing is rounded.
      spec, axis, capacity: as of a `QCache`.
    """

    def append(self, new: jax.Array, position: Any) -> FakeCache:
        """Writes tokens, as `append_cache`."""
        new = jnp.moveaxis(new, self.axis, -2).astype(self.dtype)
        count = new.shape[-2]
        start = jnp.clip(jnp.asarray(position, jnp.int32), 0, self.capacity - count)
        window = jax.lax.dynamic_update_slice_in_dim(self.window, new, start, axis=self.ndim - 2)
        return dataclasses.replace(self, window=window, length=jnp.broadcast_to(start + count, self.length.shape))

    def read(self) -> jax.Array:
        """What the packed cache would be read as, with the gradient of the float tokens where rounding clips nothing."""
        length = self.length[..., None, None]
        times = jnp.arange(self.capacity, dtype=jnp.int32)[:, None]
        x = jnp.where(times < past_tokens(length, self.spec), self._rounded(), self.window)
        x = jnp.where((times < length) | (length < 0), x, jnp.zeros((), x.dtype))
        return jnp.moveaxis(x, -2, self.axis)

    def tokens(self) -> jax.Array:
        """The float tokens, in the logical order of axes."""
        return jnp.moveaxis(self.window, -2, self.axis)

    def _rounded(self) -> jax.Array:
        """All tokens rounded, groups of them together."""
        spec, x = self.spec, self.window
        groups = -(-self.capacity // spec.tokens)
        more = groups * spec.tokens - self.capacity
        blocks = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]) if more else x
        blocks = blocks.reshape(*x.shape[:-2], groups, spec.tokens, x.shape[-1])
        blocks = hadamard_transform(blocks.astype(jnp.float32)) if spec.rotate else blocks
        blocks = straight_through(blocks, spec.stored, (-1 if spec.per == "token" else -2,), (), "cache")
        blocks = hadamard_transform(blocks, inverse=True).astype(x.dtype) if spec.rotate else blocks
        return blocks.reshape(*x.shape[:-2], -1, x.shape[-1])[..., : self.capacity, :]


def fake_cache(x: jax.Array, leaf: InputLeaf, spec: CacheSpec) -> FakeCache:
    """The cache of a float array among a program's inputs.

    Args:
      x: the float cache.
      leaf: the input, which is a cache.
      spec: what it becomes.

    Returns:
      A `FakeCache`.

    Raises:
      ValueError: it cannot be packed so, see `init_cache`.
    """
    axis = leaf.axis if leaf.axis is not None else 0  # a cache has one
    jax.eval_shape(lambda: init_cache(leaf.shape, leaf.dtype, spec, axis, name=leaf.path))
    window = jnp.moveaxis(jnp.asarray(x), axis, -2)
    none: Any = None
    return FakeCache(none, window, jnp.full(window.shape[:-2], -1, jnp.int32), spec, axis, leaf.shape[axis])
