"""Orthogonal transforms that spread a value over a whole axis, and are fast: Hadamard where the size allows, Hartley for what is left."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_MASK = (1 << 64) - 1
_LARGEST = 512  # Paley's matrices are multiplied out: a Hartley matrix of fewer rows is better than a larger one


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
    if not _has_core(size):
        return None
    if size == 1:
        return np.ones((1, 1))
    if _is_prime(size - 1):
        skew = np.block([[np.zeros((1, 1)), np.ones((1, size - 1))], [-np.ones((size - 1, 1)), _residues(size - 1)]])
        return skew + np.eye(size)
    p = size // 2 - 1
    symmetric = np.block([[np.zeros((1, 1)), np.ones((1, p))], [np.ones((p, 1)), _residues(p)]])
    return np.kron(symmetric, [[1, 1], [1, -1]]) + np.kron(np.eye(p + 1), [[1, -1], [-1, -1]])


def _has_core(size: int) -> bool:
    p = size // 2 - 1
    return size == 1 or (size > 0 and size % 4 == 0 and (_is_prime(size - 1) or (p % 4 == 1 and _is_prime(p))))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


def _residues(p: int) -> np.ndarray:
    """Jacobsthal's matrix: for each i, j whether i - j is a square modulo p (1), is none (-1), or is zero."""
    character = np.full(p, -1.0)
    character[[i * i % p for i in range(1, p)]], character[0] = 1, 0
    i = np.arange(p)
    return character[(i[:, None] - i[None, :]) % p]


@dataclasses.dataclass(frozen=True)
class Factors:
    """The sizes of which a transform is the Kronecker product, the slowest index first.

    Attributes:
      doublings: k of the Sylvester matrix of size 2^k.
      core: size of a Hadamard matrix of Paley's, 1 without one.
      rest: size of a Hartley matrix, 1 where the whole is a Hadamard matrix.
    """

    doublings: int
    core: int
    rest: int

    @property
    def kind(self) -> str:
        """"hadamard", or "hadamard x hartley" where a factor is left for which no Hadamard matrix is known."""
        return "hadamard" if self.rest == 1 else "hadamard x hartley" if self.doublings or self.core > 1 else "hartley"


@functools.cache
def transform_factors(size: int) -> Factors:
    """Splits a size for `hadamard_transform`: the least is left to Hartley, and Paley's matrix, which is dense, is the smallest.

    >>> transform_factors(4096), transform_factors(14336), transform_factors(11008)
    (Factors(doublings=12, core=1, rest=1), Factors(doublings=9, core=28, rest=1), Factors(doublings=8, core=1, rest=43))
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}")
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    best = Factors(twos, 1, odd)
    for part in (d for d in range(odd, 1, -1) if odd % d == 0):
        cores = [(k, part << k) for k in range(2, twos + 1) if part << k <= _LARGEST and _has_core(part << k)]
        if cores and odd // part < best.rest:
            best = Factors(twos - cores[0][0], cores[0][1], odd // part)
    return best


def hadamard_transform(x: jax.Array, axis: int = -1, inverse: bool = False) -> jax.Array:
    """Multiplies an axis by an orthogonal matrix that is the same for every array of this size: y = x H / sqrt(n), in O(n log n).

    For n = 2^k c m:  H = S_(2^k) (x) P_c (x) C_m,  Sylvester's and Paley's Hadamard matrices and Hartley's
    C[i, j] = cos(2 pi i j / m) + sin(2 pi i j / m),  which exists for every m. The first takes k sums and differences of halves, the others
    are dense products of c and m terms: see `transform_factors`. A value that is alone on its axis becomes n values of at most
    sqrt(2 / n) of its size.

    Args:
      x: floating, any shape; computed in float32.
      axis: which axis.
      inverse: multiplies by the transposed matrix, which undoes it.

    Returns:
      An array of the shape and dtype of `x`.

    Example:
      >>> x = jnp.float32([[8.0, 0.0, 0.0, 0.0]])
      >>> hadamard_transform(x).tolist()
      [[4.0, 4.0, 4.0, 4.0]]
      >>> y = jax.random.normal(jax.random.key(0), (2, 42))
      >>> bool(jnp.allclose(hadamard_transform(hadamard_transform(y), inverse=True), y, atol=1e-6))
      True

    Source: Hadamard as in QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), section 4; for sizes without a Hadamard matrix QuIP#
    (Tseng et al. 2024, arXiv 2402.04396), section 3, takes a randomized Fourier transform, whose real form is Hartley's.
    """
    n, dtype = x.shape[axis], x.dtype
    if n == 1:
        return x
    factors = transform_factors(n)
    y = jnp.moveaxis(x, axis, -1).astype(jnp.float32)
    lead = y.shape[:-1]
    y = y.reshape(-1, n)
    if factors.rest > 1:
        y = _times(y, _hartley(factors.rest), 1)  # symmetric
    if factors.core > 1:
        y = _times(y, _paley(factors.core).T if inverse else _paley(factors.core), factors.rest)
    y = _sylvester(y, factors.doublings, factors.core * factors.rest) * np.float32(1 / math.sqrt(n))
    return jnp.moveaxis(y.reshape(*lead, n), -1, axis).astype(dtype)


def _sylvester(y: jax.Array, doublings: int, step: int) -> jax.Array:
    """Sums and differences along the slowest factor of the last axis; additions alone, so the bits do not depend on what surrounds them."""
    rows, n = y.shape
    for level in range(doublings):
        half = step << level
        y = y.reshape(rows, n // (2 * half), 2, half)
        a, b = y[:, :, 0], y[:, :, 1]
        y = jnp.stack([a + b, a - b], axis=2).reshape(rows, n)
    return y


def _times(y: jax.Array, matrix: np.ndarray, step: int) -> jax.Array:
    """Multiplies the factor whose neighbours lie `step` apart on the last axis."""
    rows, n = y.shape
    size = matrix.shape[0]
    parts = y.reshape(rows, n // (size * step), size, step)
    flat = jnp.moveaxis(parts, 2, -1).reshape(-1, size)
    made = jnp.dot(flat, matrix.astype(np.float32), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(made.reshape(rows, n // (size * step), step, size), -1, 2).reshape(rows, n)


@functools.cache
def _paley(size: int) -> np.ndarray:
    matrix = _core(size)
    if matrix is None:
        raise ValueError(f"`size` {size} has no Hadamard matrix of Paley's")
    return matrix


@functools.cache
def _hartley(size: int) -> np.ndarray:
    i = np.arange(size)
    angle = 2 * np.pi * (i[:, None] * i[None, :] % size) / size
    return np.cos(angle) + np.sin(angle)


def random_signs(size: int, seed: int) -> np.ndarray:
    """Signs 1 and -1 that are the same in every version of everything, so that a file need not hold them.

    The highest bit of SplitMix64 at its i-th step, for i = 1 ... size.

    Args:
      size: how many.
      seed: any whole number.

    Returns:
      float32 (size,).

    Example:
      >>> random_signs(6, seed=0).tolist()
      [-1.0, 1.0, 1.0, -1.0, 1.0, 1.0]

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", as in `java.util.SplittableRandom`.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed & _MASK) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.where(z >> np.uint64(63), -1.0, 1.0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class OnlineRotation:
    """A rotation that a product applies to its input at run time: x -> x D H / sqrt(n).

    H as in `hadamard_transform`, D random signs, so that no input is one that H itself gathers in one place. It stands in no array:
    size and seed say all.

    Attributes:
      seed: of `random_signs`.

    Example:
      >>> rotation = OnlineRotation()
      >>> x = jnp.float32([[1.0, 2.0, 3.0, 100.0]])
      >>> rotation.apply(x).tolist(), rotation.undo(rotation.apply(x)).tolist()
      ([[-48.0, 50.0, 49.0, -53.0]], [[1.0, 2.0, 3.0, 100.0]])
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise ValueError(f"`seed` must be a whole number that is not negative, got {self.seed!r}")

    def apply(self, x: jax.Array) -> jax.Array:
        """Rotates the last axis; in float32, then back to the dtype of `x`."""
        return hadamard_transform(x.astype(jnp.float32) * self._signs(x)).astype(x.dtype)

    def signed(self, x: jax.Array) -> jax.Array:
        """x D, for those who multiply by H themselves; exact in any dtype."""
        return x * self._signs(x).astype(x.dtype)

    def undo(self, x: jax.Array) -> jax.Array:
        """Rotates the last axis back."""
        # What comes before may be a product: clipping to all there is keeps it from being fused with the first sum, unrounded.
        x32, most = x.astype(jnp.float32), float(np.finfo(np.float32).max)
        back = hadamard_transform(jnp.clip(x32, -most, most), inverse=True)
        return (back * self._signs(x)).astype(x.dtype)

    def _signs(self, x: jax.Array) -> np.ndarray:
        return random_signs(x.shape[-1], self.seed).reshape([1] * (x.ndim - 1) + [-1])

    def __str__(self) -> str:
        return "rotation" if self.seed == 0 else f"rotation(seed={self.seed})"
