"""The range whose rounded distribution loses the least information."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration.histogram import Bins, Histogram, absmax_of, counts, cover_or_show, widths
from qjax.core import FloatSpec, IntSpec, divide

# What an empty bin is given, so that the divergence is finite.
_SMOOTH = 1e-4
# How many candidates are judged at once: enough to amortize a step of the loop, few enough to bound the memory.
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Entropy(Histogram):
    """See `entropy`."""

    bins: int = 2048
    quantized_bins: int = 128

    def __post_init__(self):
        super().__post_init__()
        for argument in ("bins", "quantized_bins"):
            value = getattr(self, argument)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{argument}` must be an int, got {value!r}")
            if value < 2 or value % 2:
                raise ValueError(f"`{argument}` must be even and at least 2, got {value}")
        if not self.quantized_bins <= self.bins <= 16384:
            raise ValueError(f"`bins` must lie between `quantized_bins` ({self.quantized_bins}) and 16384, got {self.bins}")
        if self.per_side < 4 * self.bins:
            raise ValueError(f"`per_side` must be at least 4 * bins = {4 * self.bins}, got {self.per_side}; `entropy` chooses it")

    def range(self, state: Bins, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
        i = _best_candidates(state, self.bins, self.quantized_bins)
        width = divide(absmax_of(state.seen), self.bins / 2)
        lo, hi = i * width, (i + 1) * width
        return cover_or_show(state, -(hi if spec.symmetric else lo), hi, spec)


def entropy(bins: int = 2048, quantized_bins: int = 128) -> Entropy:
    """The range whose rounded distribution has the least Kullback-Leibler divergence from the data's.

    The histogram is put on `bins` bins of width `d = 2 absmax / bins` over `-absmax .. absmax`. For each `i` from
    `quantized_bins / 2` to `bins / 2` the candidate is `-i d .. (i + 1) d`:

    - p: its bins, with what lies outside added to the first and the last;
    - q: its bins (without what lies outside) summed in `quantized_bins` runs of equal length, each sum shared evenly
      over the run, rounded down, where p is not empty anywhere in the run;
    - in both an empty bin gets 1e-4, taken evenly from the others; `KL = sum p log(p / q)` of both normalized.

    The first least one wins and is cut to the data's own range. The spec only says whether the sides are equal:
    `quantized_bins` stands for its levels. It clips well for 8 bits with heavy tails; with few data it is jumpy.

    Args:
      bins: even, from `quantized_bins` to 16384. Time grows with its square (1e6 log's for 2048).
      quantized_bins: even, at least 2.

    Returns:
      An observer; its state is `Bins` of at least 8 * bins bins a side (256 KiB for 2048).

    Raises:
      TypeError, ValueError: naming the argument.

    Example:
      >>> from qjax.calibration.rows import Rows
      >>> from qjax.core import int8
      >>> observer = entropy(256, 32)
      >>> x = jnp.concatenate([jnp.sin(jnp.arange(999.0)), jnp.array([8.0])])
      >>> state = observer.update(observer.init(1, 1), Rows(x.reshape(1, 1000, 1)))
      >>> observer.range(state, int8())[1].item()
      1.0625

    Source: Migacz, 8-bit inference with TensorRT (GTC 2017), as onnxruntime's `get_entropy_threshold` has it, which is
    followed to the letter: it leaves the last `size mod quantized_bins` bins of q empty, so the result of `-x` is not
    exactly that of `x`. There the data of all batches must come at once or the bins drift; here bins of 2^e are resampled
    to its grid, a count that straddles an edge going to the nearer bin. A symmetric range is `(i + 1) d` on both sides.
    """
    return Entropy(1 << max(8 * bins - 1, 63).bit_length() if isinstance(bins, int) else 8192, bins, quantized_bins)


# Compiled also for callers outside `jit`, who would otherwise compile the loop again at every call.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _best_candidates(state: Bins, bins: int, quantized_bins: int) -> jax.Array:
    """The `i` of each entry, float32 (stack,)."""
    absmax = absmax_of(state.seen)
    ratio = divide(widths(state), jnp.where(absmax > 0, absmax, 1.0)) * (bins // 2)

    # One entry at a time, so that a stack of experts needs the memory of one.
    def best(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        negative, positive = (_resample(side, part[1], bins // 2) for side in part[0])
        return _least_divergence(jnp.concatenate([negative[::-1], positive]), quantized_bins)

    return lax.map(best, (counts(state), ratio)).astype(jnp.float32)


def _resample(side: jax.Array, ratio: jax.Array, size: int) -> jax.Array:
    """Puts the counts of bins of `ratio` < 1 on `size` bins of 1; a bin across an edge is shared in whole counts."""
    start = jnp.arange(side.shape[0], dtype=jnp.float32) * ratio
    first = jnp.floor(start)
    inside = jnp.clip(divide(first + 1 - start, jnp.maximum(ratio, jnp.finfo(jnp.float32).tiny)), 0.0, 1.0)
    here = jnp.round(inside * side)
    first = jnp.minimum(first, size - 1).astype(jnp.int32)
    return jnp.zeros((size,), jnp.float32).at[first].add(here).at[jnp.minimum(first + 1, size - 1)].add(side - here)


def _least_divergence(hist: jax.Array, quantized_bins: int) -> jax.Array:
    """The first `i` with the least divergence, int32, of a histogram of whole counts."""
    bins = hist.shape[0]
    place = jnp.arange(bins, dtype=jnp.int32)
    # Each from its own end: a difference of large sums would lose the tail.
    below, above = (sums - hist for sums in (lax.cumsum(hist, axis=0), lax.cumsum(hist, axis=0, reverse=True)))

    def divergence(i: jax.Array) -> jax.Array:
        start, last = bins // 2 - i, jnp.minimum(bins // 2 + i, bins - 1)
        inside = (place >= start) & (place <= last)
        inner = jnp.where(inside, hist, 0.0)
        p = inner + jnp.where(place == start, below, 0.0) + jnp.where(place == last, above, 0.0)
        run = jnp.where(inside, (place - start) // ((last - start + 1) // quantized_bins), quantized_bins)
        sums = jnp.zeros((quantized_bins,), jnp.float32)
        total = sums.at[jnp.minimum(run, quantized_bins - 1)].add(inner)
        filled = sums.at[run].add((p > 0).astype(jnp.float32), mode="drop")
        share = jnp.floor(divide(total, jnp.maximum(filled, 1.0)))
        q = jnp.where(inside & (run < quantized_bins), share[jnp.minimum(run, quantized_bins - 1)], 0.0)
        return _kl(p, q, inside)

    least, most = quantized_bins // 2, bins // 2
    count = -(-(most - least + 1) // _BATCH) * _BATCH  # the last one again, so that all batches are full
    candidates = jnp.minimum(least + jnp.arange(count, dtype=jnp.int32), most)
    return candidates[jnp.argmin(lax.map(divergence, candidates, batch_size=_BATCH))]


def _kl(p: jax.Array, q: jax.Array, inside: jax.Array) -> jax.Array:
    """The divergence of two smoothed distributions on the bins inside; infinite if q is empty."""
    p, q = (_smooth(v, inside) for v in (p, q))
    terms = jnp.where(inside, p * (jnp.log(p) - jnp.log(q)), 0.0)
    return jnp.where(jnp.any(jnp.isnan(q)), jnp.inf, jnp.sum(terms))


def _smooth(v: jax.Array, inside: jax.Array) -> jax.Array:
    """Normalized, without empty bins inside; ones outside; NaN if all are empty."""
    empty = inside & (v <= 0)
    taken = _SMOOTH * jnp.sum(empty, dtype=jnp.float32) / jnp.sum(inside & ~empty, dtype=jnp.float32)
    v = jnp.where(empty, _SMOOTH, v - taken)
    return jnp.where(inside, v / jnp.sum(jnp.where(inside, v, 0.0)), 1.0)
