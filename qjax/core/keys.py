"""Whether an argument is a key of jax.random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def check_key(argument: str, key: object) -> None:
    """Refuses what is no key of jax.random, a seed above all; traced keys and raw ones (`jax.random.PRNGKey`) are keys.

    Raises:
      TypeError: naming the argument.

    Example:
      >>> check_key("key", 0)
      Traceback (most recent call last):
      TypeError: `key` must be a key of jax.random, such as jax.random.key(0), got int
    """
    raw = isinstance(key, (jax.Array, np.ndarray)) and key.dtype == jnp.uint32 and key.ndim == 1
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    if not (raw or typed):
        what = f"{key.dtype}{list(key.shape)}" if isinstance(key, (jax.Array, np.ndarray)) else type(key).__name__
        raise TypeError(f"`{argument}` must be a key of jax.random, such as jax.random.key(0), got {what}")
