"""The order of four-bit codes in memory: a thread's word holds what the thread gives to the tensor cores.

Of 32 codes of a row, four threads hold eight each, one 32-bit word. Tensor cores want of thread t the neighbours k = 8 j + 2 t and
8 j + 2 t + 1 for j = 0 to 3; in the order of k they would have to be sent between threads. So they lie as the words want them: code
8 j + 2 t + h stands at place 8 t + 4 h + j, which is done once, when a weight is laid out.
"""

import jax

from .operands import check_arrays

BLOCK = 32  # codes that change places among themselves


def by_threads(codes: jax.Array) -> jax.Array:
    """Columns (..., K) from the order of k to that of threads.

    Args:
      codes: (..., K), K a multiple of 32; or rows of x that meet such codes.

    Returns:
      (..., K): place 8 t + 4 h + j of every 32 columns has column 8 j + 2 t + h, with t and j below 4 and h below 2.

    Raises:
      TypeError: codes that are no array.
      ValueError: K is no multiple of 32.

    Example:
      >>> import jax.numpy as jnp
      >>> by_threads(jnp.arange(32))[:8].tolist()
      [0, 8, 16, 24, 1, 9, 17, 25]
    """
    check_arrays(codes=codes)
    if not codes.shape or codes.shape[-1] % BLOCK:
        raise ValueError(f"`codes` are {codes.dtype} {codes.shape}; the last axis must be a multiple of {BLOCK}: pad the weight")
    *lead, k = codes.shape
    blocks = codes.reshape(*lead, k // BLOCK, 4, 4, 2)
    return blocks.transpose(*range(len(lead) + 1), -2 % blocks.ndim, -1 % blocks.ndim, -3 % blocks.ndim).reshape(*lead, k)


def in_order(codes: jax.Array) -> jax.Array:
    """Columns (..., K) from the order of threads to that of k: the inverse of `by_threads`.

    Args:
      codes: (..., K), K a multiple of 32.

    Returns:
      (..., K).

    Example:
      >>> import jax.numpy as jnp
      >>> in_order(by_threads(jnp.arange(64))).tolist() == list(range(64))
      True
    """
    *lead, k = codes.shape
    blocks = codes.reshape(*lead, k // BLOCK, 4, 2, 4)
    return blocks.transpose(*range(len(lead) + 1), -1 % blocks.ndim, -3 % blocks.ndim, -2 % blocks.ndim).reshape(*lead, k)
