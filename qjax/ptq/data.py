"""What is refused of calibration data, in the same words by every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qjax.calibration import holds_no_rows
from qjax.program import Key, Program, Site

Batches = Sequence[tuple[Program, Sequence[Any]]]


def check_numbers(batches: Batches, what: str) -> None:
    """Refuses shapes and empty batches in place of data; `what` needs it.

    Raises:
      ValueError: naming it.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for _, inputs in batches for x in inputs):
        raise ValueError(f"`calibration` holds shapes, but {what} needs data: give batches of numbers")
    for number, (program, inputs) in enumerate(batches):
        if holds_no_rows(program, inputs):
            raise ValueError(f"`calibration` batch {number} holds no rows, but {what} needs data: leave the batch out")


def check_same_sites(batches: Batches) -> None:
    """Refuses batches whose programs have other sites than the first one's: their statistics would not fit together.

    Raises:
      ValueError: naming the batch and both shapes.
    """
    first = _sites(batches[0][0])
    for number, (program, _) in enumerate(batches):
        if program is not batches[0][0] and _sites(program) != first:
            raise other_program(batches, number)


def other_program(batches: Batches, number: int) -> ValueError:
    """The error for a batch that traces to a program with other sites than the first."""
    here, there = (", ".join(str(tuple(x.shape)) for x in batches[i][1]) for i in (number, 0))
    return ValueError(
        f"`calibration` batch {number} of shapes {here} traces to a program with other sites than batch 0 of shapes {there}; "
        "give batches of one shape, or cut or pad that one"
    )


def not_finite(site: Site, number: int) -> ValueError:
    """The error for a batch that gives a site NaN or infinity."""
    return ValueError(f"`calibration` batch {number} gives the input of {site.path!r} ({site.op}) NaN or infinity; look at that batch")


def _sites(program: Program) -> list[tuple[Key, int, str, Any]]:
    return [(site.key, site.leaf, site.op, site.view) for site in program.sites]


def unseen_note(seen: Any, what: str, came: str = "calibration data but zeros reached it") -> str:
    """Names the parts of a parameter that no data reached; "" if there is none.

    Args:
      seen: an array of bool, an entry for each part (layer, expert).
      what: what becomes of such a part.
      came: what did not come.

    Returns:
      A remark for the report.

    >>> unseen_note(np.array([True, False]), "rounded")
    'no calibration data but zeros reached it in parts 1: rounded'
    """
    return f"no {came}{_which(seen)}: {what}" if not np.all(seen) else ""


def with_unseen(lo: np.ndarray, hi: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Gives parts of which nothing but zero was seen the widest range of the others.

    Args:
      lo: the lower end for each part, 0 where nothing came.
      hi: the upper ends.
      what: what no data reached.

    Returns:
      The ends, and a remark for the report. Where no part has a range they stay 0.

    >>> with_unseen(np.array([-1.0, 0.0]), np.array([2.0, 0.0]), "its activations")[2]
    ('no calibration data but zeros reached its activations in parts 1: they have the widest range of the others',)
    """
    seen = (lo != 0) | (hi != 0)
    if seen.all():
        return lo, hi, ()
    then = "they have the widest range of the others" if seen.any() else "they have the scale 1"
    remark = f"no calibration data but zeros reached {what}{_which(seen)}: {then}"
    return np.where(seen, lo, lo.min()), np.where(seen, hi, hi.max()), (remark,)


def _which(seen: Any) -> str:
    """Names the parts that are not seen, unless that is all of them."""
    empty = np.argwhere(~seen)
    return f" in parts {', '.join(_index(i, seen.shape) for i in empty)}" if 0 < len(empty) < seen.size else ""


def _index(position: np.ndarray, shape: tuple[int, ...]) -> str:
    real = [int(i) for i, n in zip(position, shape, strict=True) if n > 1]
    return str(real[0]) if len(real) == 1 else f"({', '.join(map(str, real))})"
