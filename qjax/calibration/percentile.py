"""The range that holds a given share of the values."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration.histogram import Bins, Histogram, add, as_float, cover_or_show, widths
from qjax.core import FloatSpec, IntSpec


@dataclasses.dataclass(frozen=True)
class Percentile(Histogram):
    """See `percentile`."""

    p: float = 99.999

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.p, bool) or not isinstance(self.p, int | float):
            raise TypeError(f"`p` must be a number, e.g. 99.999, got {self.p!r}")
        if not 50 <= self.p <= 100:
            raise ValueError(f"`p` must be a percentage from 50 to 100, e.g. 99.9 for all but a thousandth, got {self.p!r}")

    def range(self, state: Bins, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
        return _range(state, self.p, spec)


def percentile(p: float = 99.999) -> Percentile:
    """The smallest range, to one bin of the histogram, outside of which at most `100 - p` percent of the values lie.

    Symmetric: `t` is the least multiple of the bin width with `#{|x| >= t} <= (1 - p/100) n`. Asymmetric: each side by
    itself with half of that. Never beyond the data's own range, so `p = 100` is `minmax`.

    Args:
      p: percent, from 50 to 100.

    Returns:
      An observer; its state is `Bins` of 8192 bins a side, so the range is at most 1/4096 of the absmax too large.

    Raises:
      TypeError, ValueError: naming `p`.

    Example:
      >>> from qjax.calibration.rows import Rows
      >>> from qjax.core import int8
      >>> observer = percentile(99)
      >>> x = jnp.concatenate([jnp.arange(99.0), jnp.array([1000.0])])
      >>> state = observer.update(observer.init(1, 1), Rows(x.reshape(1, 100, 1)))
      >>> observer.range(state, int8())[1].item()
      98.125

    Source: onnxruntime's `HistogramCollector.compute_percentile`, which takes the lower edge of the bin that holds the
    percentile where this takes the upper one, and whose 2048 bins span the magnitudes (symmetric) or both sides.
    """
    return Percentile(p=p)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _range(state: Bins, p: float, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
    low, high = _tails(state.low, state.high)
    negative, positive = ((low[:, i], high[:, i]) for i in (0, 1))
    both = add(negative, positive)
    outside = as_float(*both)[:, 0] * ((100.0 - p) / 100.0)
    if spec.symmetric:
        hi = _edge(both if spec.signed else positive, outside)
        lo = hi
    else:
        lo, hi = _edge(negative, outside * 0.5), _edge(positive, outside * 0.5)
    return cover_or_show(state, -lo * widths(state), hi * widths(state), spec)


def _edge(tails: tuple[jax.Array, jax.Array], outside: jax.Array) -> jax.Array:
    """How many bins from zero must be kept so that no more than `outside` values are beyond them, float32 (stack,)."""
    return jnp.sum(as_float(*tails) > outside[:, None], axis=1, dtype=jnp.float32)


def _tails(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of values in a bin and all bins beyond it, exact."""
    sums = lax.cumsum(low, axis=2, reverse=True)
    carried = sums < low  # the sum passed 2^32 here
    return sums, lax.cumsum(high + carried.astype(jnp.uint32), axis=2, reverse=True)
