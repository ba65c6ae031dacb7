"""Calibration data as the user hands them over: batches, each the arguments of one call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.program import Program
from qjax.program.trace import is_qtensor

_WHY = " (the program is traced with it; shapes are enough for rtn)"


def as_batches(calibration: Any, argument: str = "calibration") -> list[tuple[Any, ...]]:
    """Returns calibration batches as tuples of arguments.

    Args:
      calibration: batches, at least one. A tuple is spread over the function's arguments after `params`; a dict or an array is one.
      argument: what an error calls it.

    Raises:
      TypeError: `calibration` is no list of batches.
      ValueError: it is empty.
    """
    check_batches(calibration, argument)
    batches = [as_arguments(batch) for batch in calibration]
    if not batches:
        raise ValueError(f"`{argument}` is empty: give at least one batch{_WHY if argument == 'calibration' else ''}")
    return batches


def check_batches(calibration: Any, argument: str = "calibration") -> None:
    """Refuses what is one batch, or nothing to iterate over.

    Raises:
      TypeError: naming the argument and what to write.
    """
    if calibration is None or isinstance(calibration, (dict, str, jax.Array, np.ndarray)) or not isinstance(calibration, Iterable):
        raise TypeError(f"`{argument}` must be a list of batches, got {type(calibration).__name__}: write {argument}=[batch]")


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """Returns the arguments that a batch stands for."""
    return jax.tree.map(_firm, batch if isinstance(batch, tuple) else (batch,), is_leaf=is_qtensor)


def _firm(x: Any) -> Any:
    """A weakly typed array would be traced to another program than the others."""
    return jnp.asarray(x, x.dtype) if isinstance(x, jax.Array) and jax.typeof(x).weak_type else x


def counted(calibration: Any) -> tuple[Iterable[Any], int]:
    """Returns the batches and how many there are, without holding them: they are read again for it if they do not know.

    What can be read only once, a generator, is read into a list.

    Raises:
      TypeError: `calibration` is no list of batches.
      ValueError: it is empty.
    """
    check_batches(calibration)
    batches: Iterable[Any] = list(calibration) if isinstance(calibration, Iterator) else calibration
    number = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    if not number:
        raise ValueError("`calibration` is empty: give at least one batch")
    return batches, number


def holds_no_rows(program: Program, inputs: Sequence[Any]) -> bool:
    """Whether a batch says nothing: none of its arrays has a number, or no site gets a row of it.

    Args:
      program: traced with it.
      inputs: its arrays.

    Example:
      >>> import qjax
      >>> fn = lambda p, x, shift: x @ p + shift
      >>> [holds_no_rows(qjax.trace(fn, jnp.ones((4, 2)), x, 0.5), [x, 0.5]) for x in (jnp.ones((1, 4)), jnp.ones((0, 4)))]
      [False, True]
    """
    nothing = bool(inputs) and all(math.prod(np.shape(x)) == 0 for x in inputs)
    return nothing or (bool(program.sites) and all(0 in site.out_shape for site in program.sites))
