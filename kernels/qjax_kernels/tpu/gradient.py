"""Products that are differentiated with respect to their rows alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def to_rows_alone(run: Callable[..., jax.Array], gradient: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Gives a product a gradient to its first argument; all others are constants.

    Args:
      run: y = run(x, *constants).
      gradient: dx = gradient(t, *constants), of the gradient t of y.

    Returns:
      The product, of the same arguments.

    Example:
      >>> twice = to_rows_alone(lambda x, c: x * c, lambda t, c: t * c)
      >>> jax.grad(lambda x: twice(x, jnp.int8(2)))(3.0).item()
      2.0
    """

    @jax.custom_vjp
    def product(x: jax.Array, *constants: jax.Array) -> jax.Array:
        return run(x, *constants)

    def forward(x: jax.Array, *constants: jax.Array):
        return run(x, *constants), constants

    def backward(constants, t: jax.Array):
        return gradient(t, *constants), *map(_nothing, constants)

    product.defvjp(forward, backward)
    return product


def _nothing(a: jax.Array) -> jax.Array | np.ndarray:
    return np.zeros(a.shape, jax.dtypes.float0) if jnp.issubdtype(a.dtype, jnp.integer) else jnp.zeros_like(a)
