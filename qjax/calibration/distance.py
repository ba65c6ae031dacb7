"""How far two histograms disagree, and what share of one lies outside a range. On the host, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.histogram import Bins, widen

# Its loop would be compiled anew at every call outside `jit`.
_widen = jax.jit(widen)
# Magnitudes up to this many bins stand alone; beyond it every octave has half as many cells.
_ALONE = 16


def total_variation(a: Bins, b: Bins) -> np.ndarray:
    """Returns the share of the values of one data set that would have to lie elsewhere to make it the other.

    `1/2 sum_j |p_j - q_j|`, from 0 (equal) to 1 (nothing in common), over cells of a sign and a magnitude: single bins near zero, beyond
    16 bins eighths of an octave. The cells grow with the magnitude, so the measure has no unit, and a few large values do not hide
    a shift of the others. Bins of different widths are put on the wider ones, which is exact.

    Args:
      a: (stack,) entries.
      b: as many; the number of bins may differ.

    Returns:
      float64 (stack,); NaN where one of them holds no value.

    Example:
      >>> from qjax.calibration.histogram import histogram
      >>> from qjax.calibration.rows import Rows
      >>> a, b = (histogram().update(histogram().init(1, 4), Rows(jnp.array([[x]]))) for x in ([1.0, 2, 3, -4], [1.0, 2, 6, 9]))
      >>> total_variation(a, b).tolist()
      [0.5]

    Source: the definition, e.g. Levin and Peres, Markov Chains and Mixing Times (2017), prop. 4.2.
    """
    exponent = jnp.maximum(a.exponent, b.exponent)
    per_side = max(a.low.shape[-1], b.low.shape[-1])
    p, q = (_shares(_cells(_counts(_widen(state, exponent)), per_side)) for state in (a, b))
    return 0.5 * np.abs(p - q).sum((1, 2))


def outside(state: Bins, lo: np.ndarray | jax.Array, hi: np.ndarray | jax.Array) -> np.ndarray:
    """Returns the share of the values beyond a range, to one bin: a bin that a limit cuts counts as inside.

    Args:
      state: (stack,) entries.
      lo: (stack,), at most 0.
      hi: (stack,), at least 0.

    Returns:
      float64 (stack,), 0 where there is no value.

    Example:
      >>> from qjax.calibration.histogram import histogram
      >>> from qjax.calibration.rows import Rows
      >>> state = histogram().update(histogram().init(1, 4), Rows(jnp.array([[[1.0, 2.0, 3.0, -4.0]]])))
      >>> outside(state, np.array([-4.0]), np.array([2.5])).tolist()
      [0.25]
    """
    counts = _counts((state.low, state.high))
    edges = np.arange(counts.shape[2], dtype=np.float64)[None] * np.exp2(np.asarray(state.exponent, np.float64))[:, None]
    beyond = np.zeros(len(counts))
    # A range that reaches the data's own end leaves nothing beyond it, wherever the end lies in its bin.
    ends = ((-np.asarray(lo), -np.asarray(state.seen.lo)), (np.asarray(hi), np.asarray(state.seen.hi)))
    for side, (end, reached) in enumerate(ends):
        beyond += np.where(end < reached, (counts[:, side] * (edges >= end[:, None])).sum(1), 0.0)
    return beyond / np.maximum(counts.sum((1, 2)), 1)


def _counts(words: tuple[jax.Array, jax.Array]) -> np.ndarray:
    """Exact below 2^53: (stack, 2, N)."""
    low, high = (np.asarray(word, np.float64) for word in words)
    return high * 2.0**32 + low


def _cells(counts: np.ndarray, per_side: int) -> np.ndarray:
    octaves = 2 ** np.arange(_ALONE.bit_length() - 1, per_side.bit_length() - 1)
    starts = np.concatenate([np.arange(_ALONE), (octaves[:, None] * (1 + np.arange(_ALONE // 2) / (_ALONE // 2))).astype(int).ravel()])
    padded = np.pad(counts, ((0, 0), (0, 0), (0, per_side - counts.shape[2])))
    return np.add.reduceat(padded, starts, axis=2)


def _shares(cells: np.ndarray) -> np.ndarray:
    total = cells.sum((1, 2), keepdims=True)
    return np.divide(cells, total, out=np.full_like(cells, np.nan), where=total > 0)
