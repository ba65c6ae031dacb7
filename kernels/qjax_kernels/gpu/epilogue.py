"""What a product does with its sums before they are rounded: y = f(sum + b)."""

from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["relu", "silu", "gelu"]


def activated(y: jax.Array, activation: Activation | None) -> jax.Array:
    """f(y): max(y, 0), y / (1 + exp(-y)), or y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))) / 2; y where there is none.

    Args:
      y: float32.
      activation: "relu", "silu", "gelu" (by tanh) or None.

    Returns:
      float32, the shape of y.

    Raises:
      ValueError: another name.

    Example:
      >>> activated(jnp.float32([-2.0, 3.0]), "relu").tolist()
      [0.0, 3.0]
    """
    if activation is None:
        return y
    if activation == "relu":
        return jnp.maximum(y, 0.0)
    if activation == "silu":
        return y / (1.0 + jnp.exp(-y))
    if activation == "gelu":
        return 0.5 * y * (1.0 + jnp.tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
    raise ValueError(f"`activation` must be 'relu', 'silu', 'gelu' or None, got {activation!r}")


def added_up(parts: jax.Array, bias: jax.Array | None, activation: Activation | None, dtype) -> jax.Array:
    """f(sum_p parts + b) of a product whose K was split: the epilogue belongs behind the sum.

    Args:
      parts: (P, M, N) float32.
      bias: (N,) or None.
      activation: as `activated` takes it.
      dtype: of the result.

    Returns:
      (M, N).
    """
    y = parts.sum(0)
    return activated(y if bias is None else y + bias.astype(jnp.float32), activation).astype(dtype)
