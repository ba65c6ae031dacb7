"""Orthogonal matrices that spread a value over all its channels: Hadamard where the size allows, any orthogonal one otherwise."""

from __future__ import annotations

import math

import jax
import numpy as np

from qjax.core import hadamard


def random_orthogonal(size: int, key: jax.Array, keeps_ones: bool = False) -> tuple[np.ndarray, str]:
    """A random orthogonal matrix, a Hadamard one with random signs where there is one of this size.

    R = D H / sqrt(n), D random signs;  if it must keep the vector of ones (R 1 = 1):  R = H D H^T / n, D_0 = 1, whose first column of H
    is the vector of ones. For other sizes the Q factor of a normal matrix; its first basis vector is turned to the ones if they are kept.

    Args:
      size: n.
      key: a key of `jax.random`; the same key gives the same matrix.
      keeps_ones: whether R 1 = 1 is needed, for values whose mean over the channels is taken.

    Returns:
      (float64 (n, n), "hadamard" or "orthogonal").

    Example:
      >>> r, kind = random_orthogonal(6, jax.random.key(0), keeps_ones=True)
      >>> kind, bool(np.allclose(r @ r.T, np.eye(6))), bool(np.allclose(r.sum(1), 1))
      ('orthogonal', True, True)

    Source: QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), section 3; SpinQuant (Liu et al. 2024, arXiv 2405.16406), section 3.2. Both
    turn programs with a mean over the channels into others without it; here R keeps the vector of ones, and the program stays.
    """
    h = hadamard(size)
    if h is not None:
        signs = np.asarray(jax.random.rademacher(key, (size,)), np.float64)
        if not keeps_ones:
            return signs[:, None] * h / math.sqrt(size), "hadamard"
        signs[0] = 1
        return (h * signs) @ h.T / size, "hadamard"
    free = size - 1 if keeps_ones else size
    q, r = np.linalg.qr(np.asarray(jax.random.normal(key, (free, free)), np.float64))
    q = q * np.sign(np.diag(r))  # without this it would not be uniform
    if not keeps_ones:
        return q, "orthogonal"
    # A reflection that swaps the first basis vector and the vector of ones.
    v = np.eye(size)[0] - np.full(size, 1 / math.sqrt(size))
    swap = np.eye(size) - 2 * np.outer(v, v) / (v @ v)
    inner = np.eye(size)
    inner[1:, 1:] = q
    return swap @ inner @ swap, "orthogonal"
