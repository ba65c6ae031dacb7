"""LoftQ: codes and a low-rank part that are found in turns, for adapters to begin at."""

from __future__ import annotations

from qjax.core.specs import as_count
from qjax.ptq.low_rank import AdapterDtype, LowRank, low_rank
from qjax.ptq.method import Method


def loftq(rank: int = 16, iterations: int = 5, then: Method | None = None, dtype: AdapterDtype = "float32") -> LowRank:
    """LoftQ: rounds and corrects in turns, so that adapters begin as near to the float weight as they can.

        q_t = round(w - L_(t-1) R_(t-1));  L_t, R_t = the best rank-r part of w - dequantize(q_t)   with L_0 R_0 = 0

    `qjax.qlora(...).init` begins at L and R where a packed weight has them, at B A = 0 where it has not.

    Args:
      rank: r, that of `qjax.lora`.
      iterations: how many times. 1 is `qjax.low_rank(rank, kind="svd")`.
      then: how the weight is rounded; None: to nearest.
      dtype: what L and R are stored in.

    Returns:
      A method for `qjax.Rule`, a `low_rank` of kind "svd"; what that refuses, this does.

    Raises:
      ValueError: naming the argument.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> def error(method):
      ...     policy = qjax.Policy([qjax.Rule("*", weight=qjax.nf4(), method=method)])
      ...     return qjax.quantize(lambda p, x: x @ p["w"], params, policy, calibration=[jnp.ones((1, 64))]).report.rows[0].error
      >>> error(loftq(8)) < error(loftq(8, iterations=1)) < error(None)
      True

    Source: LoftQ, Li et al., arXiv 2310.08659, algorithm 1. It keeps the last turn; here each matrix keeps the nearest
    of its turns.
    """
    iterations = as_count("iterations", iterations, 1)
    found = low_rank(as_count("rank", rank, 1), then, "svd", dtype)
    return LowRank(found.rank, found.then, found.measure, found.dtype, iterations)
