"""Numerical proof of a rewrite: the program is run with the old and the new parameters and must give the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.graph.fold import Fold, apply_fold
from qjax.program import Interpreter, Program, flatten

# A long chain of float32 products loses about this many roundings in the largest output.
ROUNDINGS = 64


class NotPreserved(ValueError):
    """A rewrite changed what the program computes."""


def rounding(program: Program) -> float:
    """Returns the relative error that rounding alone may cause: 64 times the spacing at 1 of the coarsest float type in the program.

    Args:
      program: from `trace`.

    Returns:
      The tolerance, 7.6e-6 for a program in float32.

    Example:
      >>> from qjax.program import trace
      >>> rounding(trace(lambda p, x: x @ p, jnp.ones((2, 2)), jnp.ones((1, 2)))) == 64 * 2.0**-23
      True
    """
    dtypes = {aval.dtype for aval in flatten(program, unroll=False).avals if jnp.issubdtype(aval.dtype, jnp.floating)}
    return ROUNDINGS * max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)


def verifier(
    program: Program, params: Sequence[Any], inputs: Sequence[Any], tolerance: float | None = None
) -> Callable[[Sequence[Any]], float]:
    """Runs a program once and returns a function that compares other parameters with it; for many rewrites of one program.

    Args:
      program: from `trace`.
      params: the parameters' array leaves.
      inputs: the array leaves of the other arguments.
      tolerance: largest error accepted; by default what rounding may cause, see `rounding`.

    Returns:
      new_params -> error, as `verify` computes and raises.

    Example:
      >>> from qjax.program import trace
      >>> x, p = jnp.ones((1, 2)), [jnp.ones((2, 3)), jnp.ones((3, 1))]
      >>> compare = verifier(trace(lambda p, x: x @ p[0] @ p[1], p, x), p, [x])
      >>> compare([2 * p[0], p[1] / 2]), compare([p[0] / 4, 4 * p[1]])
      (0.0, 0.0)
    """
    limit = rounding(program) if tolerance is None else tolerance
    run = jax.jit(lambda values: Interpreter({})(program.jaxpr, values)[0])
    before = run([*params, *inputs])
    empty = _says_nothing(before)

    def compare(new_params: Sequence[Any]) -> float:
        if empty:
            raise NotPreserved(empty)
        error = max((_error(a, b) for a, b in zip(before, run([*new_params, *inputs]), strict=True)), default=0.0)
        if not error <= limit:
            raise NotPreserved(f"the results differ by {error:.2g} of their largest element, more than rounding explains ({limit:.2g})")
        return error

    return compare


def verify(
    program: Program, params: Sequence[Any], new_params: Sequence[Any], inputs: Sequence[Any], tolerance: float | None = None
) -> float:
    """Runs a program with two sets of parameters and compares.

    error = max over results of max |f(params) - f(new_params)| / max |f(params)|, in float32 or wider.

    Args:
      program: from `trace`.
      params: the parameters' array leaves.
      new_params: the rewritten ones.
      inputs: the array leaves of the other arguments.
      tolerance: largest error accepted; by default what rounding may cause, see `rounding`.

    Returns:
      The error.

    Raises:
      NotPreserved: the error is larger, an integer result differs, a result is NaN on one side only; or the results say nothing, because
        one has no finite value or all are zero: give other inputs.

    Example:
      >>> from qjax.program import trace
      >>> x, p = jnp.ones((1, 2)), [jnp.ones((2, 3)), jnp.ones((3, 1))]
      >>> program = trace(lambda p, x: x @ p[0] @ p[1], p, x)
      >>> verify(program, p, [2 * p[0], p[1] / 2], [x])
      0.0
    """
    return verifier(program, params, inputs, tolerance)(new_params)


def verify_fold(program: Program, fold: Fold, params: Sequence[Any], inputs: Sequence[Any], seed: int = 0) -> float:
    """Applies a fold with random scales of 1/4, 1 and 4, which no product rounds, and compares.

    Args:
      program: the fold's program.
      fold: from `find_fold`.
      params: the parameters' array leaves.
      inputs: the array leaves of the other arguments.
      seed: of the scales.

    Returns:
      The error, see `verify`.

    Raises:
      NotPreserved: the fold is wrong.

    Example:
      >>> from qjax.graph.fold import find_fold
      >>> from qjax.program import shared_inputs, trace
      >>> x, p = jnp.ones((1, 2)), [jnp.ones((2, 3)), jnp.ones((3, 1))]
      >>> program = trace(lambda p, x: x @ p[0] @ p[1], p, x)
      >>> verify_fold(program, find_fold(program, shared_inputs(program)[1]), p, [x])
      0.0
    """
    return verify(program, params, apply_fold(fold, params, exact_scales(fold, seed)), inputs)


def exact_scales(fold: Fold, seed: int = 0) -> np.ndarray:
    """Random scales of 1/4, 1 and 4 for a fold, of shape `fold.shape`; their square roots are powers of two, too.

    Args:
      fold: from `find_fold`.
      seed: of the choice.

    Returns:
      float64 scales.

    Example:
      >>> from qjax.graph.fold import find_fold
      >>> from qjax.program import shared_inputs, trace
      >>> program = trace(lambda p, x: x @ p[0] @ p[1], [jnp.ones((2, 3)), jnp.ones((3, 1))], jnp.ones((1, 2)))
      >>> sorted({*exact_scales(find_fold(program, shared_inputs(program)[1])).tolist()} | {0.25, 1.0, 4.0})
      [0.25, 1.0, 4.0]
    """
    return 4.0 ** np.random.default_rng(seed).integers(-1, 2, fold.shape)


def _says_nothing(results: Sequence[Any]) -> str:
    """Why results would be alike whatever the parameters are; "" if they would not. Some values that are not finite (a mask) may be."""
    arrays = [x for x in results if x.size and not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
    remedy = "which says nothing about a rewrite: give another batch"
    if any(not bool(jnp.isfinite(x).any()) for x in floats):
        return f"a result has no finite value on this batch, {remedy}"
    if arrays and not any(bool((jnp.isfinite(x) & (x != 0)).any()) for x in floats or arrays):
        return f"the results are all zero on this batch, {remedy}, or parameters that do not make them zero"
    return ""


def _error(before: Any, after: Any) -> float:
    if not jnp.issubdtype(before.dtype, jnp.inexact):
        return 0.0 if bool(jnp.array_equal(before, after)) else float("inf")
    wide = np.promote_types(np.complex64 if jnp.issubdtype(before.dtype, jnp.complexfloating) else np.float32, before.dtype)
    a, b = np.asarray(before.astype(wide)), np.asarray(after.astype(wide))
    alike = (a == b) | (np.isnan(a) & np.isnan(b))
    if alike.all():
        return 0.0
    if not np.isfinite(a[~alike]).all() or not np.isfinite(b[~alike]).all():
        return float("inf")
    return float(np.abs(a[~alike] - b[~alike]).max() / max(np.abs(a[np.isfinite(a)]).max(), np.finfo(np.float32).tiny))
