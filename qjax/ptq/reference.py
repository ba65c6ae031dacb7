"""The float parameters that a quantized model rounds: those that were given, rescaled as `quantize` rescaled them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import QTensor
from qjax.graph import Fold, apply_fold
from qjax.program import Program
from qjax.ptq.quantize import Result, relative_error

SAME = 1e-2  # relative difference of two errors of one weight that other hardware may explain
REMEDY = (
    "give the float parameters that `qjax.quantize` was given (those that `qjax.rewrite` made, if they came from it). "
    "A result that was loaded does not know how inputs were rescaled: use it before it is saved"
)


def float_reference(
    program: Program, params: Sequence[Any], packed: Sequence[Any], result: Result, changed: Collection[str] = ()
) -> list[Any]:
    """Returns the float parameters of which `result` holds the rounded ones.

    w' = w * s[channel] ** power for every fold of `result.folds`.

    Args:
      program: traced with `params`.
      params: the parameters' array leaves, as `qjax.quantize` was given them.
      packed: the array leaves of `result.params`.
      result: from `qjax.quantize`.
      changed: paths of float leaves that were changed since.

    Returns:
      The leaves.

    Raises:
      ValueError: a leaf of `params` is not what was quantized: the weight's error is not the one in the report, or a leaf that stayed
        float differs. Names the leaf.

    Example:
      >>> import qjax
      >>> from qjax.program import trace
      >>> fn, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.eye(8)}, jnp.ones((2, 8))
      >>> result = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=qjax.int8())]), calibration=[x])
      >>> program = trace(fn, params, x)
      >>> float_reference(program, [params["w"]], [result.params["w"]], result)[0] is params["w"]
      True
    """
    where = {leaf.path: leaf.index for leaf in program.leaves}
    leaves = list(params)
    for fold, s in result.folds:
        for scaling in fold.scalings:
            if scaling.path not in where:
                raise ValueError(f"`params` has no leaf {scaling.path!r}, which was rescaled; {REMEDY}")
        leaves = apply_fold(_placed(fold, where), leaves, s)
    errors = {row.path: row.error for row in result.report.rows if row.what == "parameter"}
    for leaf, w, now in zip(program.leaves, leaves, packed, strict=True):
        if (w.shape, w.dtype) != (now.shape, now.dtype):
            raise ValueError(f"`params` leaf {leaf.path!r} is {w.dtype}{w.shape}, that of `result` {now.dtype}{now.shape}; {REMEDY}")
        if isinstance(now, QTensor):
            _check_weight(leaf.path, w, now, errors.get(leaf.path))
        elif now is not w and leaf.path not in changed and not _same(w, now):
            raise ValueError(f"`params` leaf {leaf.path!r} differs from that of `result`, where it is float; {REMEDY}")
    return leaves


def _placed(fold: Fold, where: dict[str, int]) -> Fold:
    """The fold for a function with other parameters beside these: a module's other variables, say."""
    return dataclasses.replace(fold, scalings=tuple(dataclasses.replace(s, leaf=where[s.path]) for s in fold.scalings))


def _check_weight(path: str, w: Any, q: QTensor, recorded: float | None) -> None:
    error = float(relative_error(jnp.asarray(w), q))
    right = error <= 1 if recorded is None else math.isclose(error, recorded, rel_tol=SAME, abs_tol=1e-9)
    if not right:
        was = "" if recorded is None else f", not {recorded:.3g} as when it was quantized"
        raise ValueError(f"`params` leaf {path!r} is not what `result` rounds: the error of its weights is {error:.3g}{was}; {REMEDY}")


def _same(a: Any, b: Any) -> bool:
    if jnp.issubdtype(a.dtype, jax.dtypes.extended):
        return True
    x, y = jnp.asarray(a), jnp.asarray(b)
    return bool(jnp.all((x == y) | ((x != x) & (y != y))))
