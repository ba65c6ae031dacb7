"""The damped Hessian's Cholesky factor, in the form in which GPTQ sweeps over columns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_EPS = float(np.finfo(np.float32).eps)


class Factor(NamedTuple):
    """`H + damping * mean(diag H) * I = R R^T` with R upper triangular, in the form the sweep over columns uses.

    Attributes:
      coupling: float32 (K, K), strictly lower: `coupling[j, i] = R[i, j] / R[j, j]`, what an error of 1 in column i
        adds to the target of column j.
      pivot: float32 (K,), R's diagonal; NaN where every attempt failed.
      damping: float32, the share of the mean diagonal that was added; NaN when every attempt failed.
      retries: int32, attempts that failed before.
    """

    coupling: jax.Array
    pivot: jax.Array
    damping: jax.Array
    retries: jax.Array


def factorize(hessian: jax.Array, mean: jax.Array, damping: float, increment: float, max_retries: int) -> Factor:
    """Cholesky factor of the damped Hessian, with more damping until it exists.

    Attempt t adds `(damping + (2^t - 1) * increment) * mean` to the diagonal. It fails when a squared pivot is not
    finite, below half of what was added (no positive semi-definite matrix has such a pivot: the number is rounding
    noise), or below `sqrt(K) * eps * mean`.

    Args:
      hessian: float32 (K, K), symmetric, with a positive diagonal, in the order in which columns are quantized.
      mean: float32 scalar, the mean of the diagonal.
      damping: share of `mean` that the first attempt adds.
      increment: share that the first retry adds to it.
      max_retries: attempts after the first.

    Returns:
      A `Factor`.

    >>> factor = factorize(jnp.float32([[1.0, 1.0], [1.0, 1.0]]), jnp.float32(1.0), 0.0, 0.01, 5)
    >>> factor.retries.item(), round(factor.damping.item(), 4)
    (1, 0.01)

    Source: GPTQ's authors take Cholesky, inverse and Cholesky of the inverse (U, with H^-1 = U^T U). R is U^-1, and the
    Cholesky factor of H with rows and columns reversed: one factorization in place of three steps, no inverse. The
    recursion with R is the same algorithm: see "The Geometry of LLM Quantization" (arXiv 2507.18553).
    """
    k = hessian.shape[-1]
    floor = np.float32(np.sqrt(k) * _EPS)
    reversed_hessian = lax.rev(hessian, (0, 1))

    def share(attempt):
        return damping + (jnp.exp2(attempt.astype(jnp.float32)) - 1.0) * increment

    def attempt_once(state):
        attempt, *_ = state
        added = share(attempt) * mean
        damped = jnp.where(jnp.eye(k, dtype=bool), reversed_hessian + added, reversed_hessian)
        # Transposing changes nothing (it is symmetric) but spares LAPACK's column-major layout copies on both sides.
        upper = lax.linalg.cholesky(damped.T, symmetrize_input=False).T
        pivot = jnp.diagonal(upper)
        least = jnp.min(jnp.where(jnp.isfinite(pivot), pivot, -1.0))
        good = least >= jnp.sqrt(jnp.maximum(0.5 * added, floor * mean))  # False where `mean` is NaN
        return attempt + 1, good, upper

    def goes_on(state):
        attempt, good, _ = state
        return ~good & (attempt <= max_retries)

    start = (jnp.int32(0), jnp.bool_(False), jnp.zeros_like(hessian))
    attempts, good, upper = lax.while_loop(goes_on, attempt_once, start)
    transposed = lax.rev(upper, (0, 1))
    pivot = jnp.diagonal(transposed)
    coupling = jnp.where(jnp.tri(k, k=-1, dtype=bool), transposed / pivot[:, None], 0.0)
    nan = jnp.float32(jnp.nan)
    return Factor(coupling, jnp.where(good, pivot, nan), jnp.where(good, share(attempts - 1), nan), attempts - 1)
