"""Orthogonal matrices that spread a value over all its channels: Hadamard where the size allows, any orthogonal one otherwise."""

from __future__ import annotations

import math

import jax
import numpy as np


def hadamard(size: int) -> np.ndarray | None:
    """A Hadamard matrix: entries 1 and -1, H H^T = size I, and its first column is all ones.

    Args:
      size: number of rows and columns.

    Returns:
      float64 (size, size), or None if none of the constructions gives one of this size: 2^k, and 2^k times p + 1 for a prime p that is
      3 modulo 4, or times 2 (p + 1) for one that is 1 modulo 4 (so 12, 20, 24, 28, 36, 40, 44, 48, ... and their doubles).

    Example:
      >>> h = hadamard(12)
      >>> bool((h @ h.T == 12 * np.eye(12)).all() and (h[:, 0] == 1).all()), hadamard(6)
      (True, None)

    Source: Sylvester 1867; Paley 1933, "On orthogonal matrices", both of his constructions.
    """
    doublings = 0
    while size % 2 == 0 and (h := _core(size)) is None:
        size, doublings = size // 2, doublings + 1
    h = _core(size) if size else None
    if h is None:
        return None
    for _ in range(doublings):
        h = np.block([[h, h], [h, -h]])
    return h * h[:, :1]


def _core(size: int) -> np.ndarray | None:
    if size == 1:
        return np.ones((1, 1))
    if size % 4:
        return None
    if _is_prime(size - 1):
        skew = np.block([[np.zeros((1, 1)), np.ones((1, size - 1))], [-np.ones((size - 1, 1)), _residues(size - 1)]])
        return skew + np.eye(size)
    p = size // 2 - 1
    if p % 4 != 1 or not _is_prime(p):
        return None
    symmetric = np.block([[np.zeros((1, 1)), np.ones((1, p))], [np.ones((p, 1)), _residues(p)]])
    return np.kron(symmetric, [[1, 1], [1, -1]]) + np.kron(np.eye(p + 1), [[1, -1], [-1, -1]])


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


def _residues(p: int) -> np.ndarray:
    """Jacobsthal's matrix: for each i, j whether i - j is a square modulo p (1), is none (-1), or is zero."""
    character = np.full(p, -1.0)
    character[[i * i % p for i in range(1, p)]], character[0] = 1, 0
    i = np.arange(p)
    return character[(i[:, None] - i[None, :]) % p]


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
