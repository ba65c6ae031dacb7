"""Divisions, sums and means that have the same bits however they are compiled."""

import jax
import jax.numpy as jnp
import numpy as np


def divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """`x / y`, correctly rounded whatever surrounds it.

    XLA rewrites the division by a constant *or by a broadcast array* to a multiplication by the reciprocal, which is
    off by one bit in a quarter of all cases, and `x / (a / b)` to `(x * b) / a`, where it happens to see them. It sees
    neither when every element of the divisor depends on `x`.

    Args:
      x: float32.
      y: float32, broadcasts to the shape of `x`.

    Returns:
      float32, the shape of `x`.

    >>> jnp.sum(divide(jnp.arange(1000.0), 7.5) == np.arange(1000, dtype=np.float32) / np.float32(7.5)).item()
    1000
    """
    return x / jnp.where(jnp.isnan(x), x, y)


def tree_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, halves added to halves: the same bits in every program, and an error that grows with log(n).

    Args:
      x: float32 (..., n).

    Returns:
      float32 (..., 1).

    >>> tree_sum(jnp.float32([[1.0, 2.0, 3.0]])).tolist()
    [[6.0]]
    """
    while x.shape[-1] > 1:
        n = x.shape[-1]
        half = 1 << ((n - 1).bit_length() - 1)
        rest = jnp.pad(x[..., half:], [(0, 0)] * (x.ndim - 1) + [(0, 2 * half - n)])
        x = x[..., :half] + rest
    return x


def tree_mean(x: jax.Array) -> jax.Array:
    """`tree_sum(x) / n`, float32 (..., 1).

    >>> tree_mean(jnp.float32([[1.0, 2.0, 6.0]])).tolist()
    [[3.0]]
    """
    return divide(tree_sum(x), x.shape[-1])


def mean_magnitude(x: jax.Array, of_large: bool = False, real: jax.Array | np.ndarray | None = None) -> jax.Array:
    """mean(|x|) over the last axis, or the mean of those |x| that exceed .7 mean(|x|), float32 (..., 1).

    Only over `real` values, if that is given: a mask that broadcasts against x, with a last axis as long; the others are zeros.

    >>> mean_magnitude(jnp.float32([[-1.0, 2.0, 6.0]])).tolist(), mean_magnitude(jnp.float32([[-1.0, 2.0, 6.0]]), True).tolist()
    ([[3.0]], [[6.0]])
    >>> mean_magnitude(jnp.float32([[2.0, 4.0, 0.0]]), real=np.array([True, True, False])).tolist()
    [[3.0]]
    """
    size = jnp.abs(x.astype(jnp.float32))
    # The sum of many numbers near the largest float32 would overflow.
    shrink = jnp.where(jnp.max(size, axis=-1, keepdims=True) > 2.0**64, 2.0**-40, 1.0)
    size = size * shrink
    mean = tree_mean(size) if real is None else divide(tree_sum(size), jnp.sum(real, axis=-1, keepdims=True).astype(jnp.float32))
    if not of_large:
        return divide(mean, shrink)
    large = size > 0.7 * mean
    count = jnp.sum(large, axis=-1, keepdims=True).astype(jnp.float32)
    return divide(divide(tree_sum(jnp.where(large, size, 0.0)), jnp.maximum(count, 1.0)), shrink)
