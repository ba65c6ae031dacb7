"""Whether one model is really better than another on the same text, or only by the luck of that text."""

from dataclasses import dataclass
from typing import Any

import numpy as np

_CHUNK = 1 << 22  # numbers of one block of resampling


@dataclass(frozen=True)
class PairedInterval:
    """Difference of two means on the same tokens, with its interval.

    Attributes:
      difference: mean(b) - mean(a); below zero b is the better, for losses.
      low: lower end of the interval.
      high: upper end.
      confidence: of the interval.
    """

    difference: float
    low: float
    high: float
    confidence: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the two differ for certain at this confidence."""
        return self.low > 0.0 or self.high < 0.0


def paired_bootstrap(
    per_token_a: Any, per_token_b: Any, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedInterval:
    """Percentile bootstrap of mean(b) - mean(a) over the same tokens.

    Rows (windows) are drawn, not single tokens: the losses of a window belong together, and drawing tokens would make
    the interval too narrow. A one-dimensional input is drawn token by token.

    Args:
      per_token_a: (N, T) or (N,) numbers, for example `token_losses` of one model.
      per_token_b: the same tokens under the other model.
      confidence: of the interval, above 0 and below 1.
      resamples: draws.
      seed: of the draws; the same seed gives the same interval.

    Returns:
      The difference of the means and its interval. For losses exp(difference) is the ratio of the perplexities.

    Raises:
      ValueError: other shapes than described, fewer than two rows, numbers that are not finite.

    Example:
      >>> a = np.arange(40.0).reshape(10, 4)
      >>> paired_bootstrap(a, a - 1.0)
      PairedInterval(difference=-1.0, low=-1.0, high=-1.0, confidence=0.95)

    Source: Efron and Tibshirani 1993, chapter 13; Koehn 2004 for the pairing.
    """
    a, b = np.asarray(per_token_a, np.float64), np.asarray(per_token_b, np.float64)
    _check(a, b, confidence, resamples)
    differences = (b - a).reshape(len(a), -1).mean(axis=1)
    rng = np.random.default_rng(seed)
    rows, means = len(differences), []
    block = max(1, _CHUNK // rows)
    for start in range(0, resamples, block):
        drawn = rng.integers(0, rows, size=(min(block, resamples - start), rows))
        means.append(differences[drawn].mean(axis=1))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return PairedInterval(float(differences.mean()), float(low), float(high), confidence)


def _check(a: np.ndarray, b: np.ndarray, confidence: float, resamples: int) -> None:
    if a.shape != b.shape or a.ndim not in (1, 2):
        raise ValueError(f"`per_token_b` must be like `per_token_a`, (N, T) or (N,), not {b.shape} and {a.shape}")
    if len(a) < 2 or not a.size:
        raise ValueError(f"`per_token_a` has {len(a)} rows: an interval needs at least two, give more text")
    for name, values in (("per_token_a", a), ("per_token_b", b)):
        if not np.isfinite(values).all():
            raise ValueError(f"`{name}` holds values that are not finite: find what broke the model first")
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise ValueError(f"`confidence` {confidence} must lie in (0, 1) and `resamples` {resamples} be at least 1")
