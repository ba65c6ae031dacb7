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


def like(run: Callable[..., jax.Array], plain: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Gives a product the derivatives of another that is the same but for rounding, to its rows and bias.

    Args:
      run: y = run(x, bias, *constants); the bias may be None.
      plain: of the same arguments, in jax.

    Returns:
      The product, of the same arguments.

    Example:
      >>> rounded = like(lambda x, b, c: jnp.round(x * c + b), lambda x, b, c: x * c + b)
      >>> jax.grad(lambda x, b: rounded(x, b, jnp.int8(2)), (0, 1))(3.1, 0.2)
      (Array(2., dtype=float32, weak_type=True), Array(1., dtype=float32, weak_type=True))
    """

    @jax.custom_vjp
    def product(x: jax.Array, bias: jax.Array | None, *constants: jax.Array) -> jax.Array:
        return run(x, bias, *constants)

    def forward(x: jax.Array, bias: jax.Array | None, *constants: jax.Array):
        return run(x, bias, *constants), (x, bias, constants)

    def backward(saved, t: jax.Array):
        x, bias, constants = saved
        _, back = jax.vjp(lambda x, bias: plain(x, bias, *constants), x, bias)
        return *back(t), *map(_nothing, constants)

    product.defvjp(forward, backward)
    return product


def _nothing(a: jax.Array) -> jax.Array | np.ndarray:
    return np.zeros(a.shape, jax.dtypes.float0) if jnp.issubdtype(a.dtype, jnp.integer) else jnp.zeros_like(a)
