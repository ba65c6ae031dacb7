"""The range whose rounded distribution loses the least information."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration.histogram import Bins, Histogram, absmax_of, counts, cover_or_show, widths
from qjax.core import IntSpec, divide

# What an empty bin is given, so that the divergence is finite.
_SMOOTH = 1e-4
# How many candidates are judged at once: enough to amortize a step of the loop, few enough to bound the memory.
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Entropy(Histogram):
    """See `entropy`."""

    bins: int = 2048
    quantized_bins: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for argument in ("bins", "quantized_bins"):
            value = getattr(self, argument)
            if argument == "quantized_bins" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{argument}` must be an int, got {value!r}")
            if value < 2 or value % 2:
                raise ValueError(f"`{argument}` must be even and at least 2, got {value}")
        if not (self.quantized_bins or 2) <= self.bins <= 16384:
            raise ValueError(f"`bins` must lie between `quantized_bins` ({self.quantized_bins or 2}) and 16384, got {self.bins}")
        if self.per_side < 4 * self.bins:
            raise ValueError(f"`per_side` must be at least 4 * bins = {4 * self.bins}, got {self.per_side}; `entropy` chooses it")

    def check_spec(self, spec: IntSpec) -> None:
        """Refuses a spec with more codes than there are bins.

        Raises:
          ValueError: naming `bins`.
        """
        least, grows = self._runs(spec)
        most = 2 * least if grows else least
        if self.bins < most:
            why = ", which may all lie on one side" if most > 2**spec.bits else ""
            raise ValueError(f"`bins` of entropy must be at least {most} for {spec}, a bin for each of its codes{why}, got {self.bins}: "
                             f"write qjax.entropy(bins={most}) or more, or set `quantized_bins`")  # fmt: skip

    def _runs(self, spec: IntSpec) -> tuple[int, bool]:
        """How many runs of bins there are at least, and whether there are up to twice as many where the data are on one side."""
        if self.quantized_bins is not None:
            return self.quantized_bins, False
        if spec.symmetric:  # without a sign all codes are on the side above zero
            return 2 ** (spec.bits if spec.signed else spec.bits + 1), False
        return 2**spec.bits, True

    def range(self, state: Bins, spec: IntSpec) -> tuple[jax.Array, jax.Array]:
        self.check_spec(spec)
        i = _best_candidates(state, self.bins, *self._runs(spec), self.quantized_bins is None)
        width = divide(absmax_of(state.seen), self.bins / 2)
        lo, hi = i * width, (i + 1) * width
        return cover_or_show(state, -(hi if spec.symmetric else lo), hi, spec)


def entropy(bins: int = 2048, quantized_bins: int | None = None) -> Entropy:
    """The range whose rounded distribution has the least Kullback-Leibler divergence from the data's.

    The histogram is put on `bins` bins of width `d = 2 absmax / bins` over `-absmax .. absmax`. For each `i` from
    `quantized_bins / 2` to `bins / 2` the candidate is `-i d .. (i + 1) d`:

    - p: its bins, with what lies outside added to the first and the last;
    - q: its bins (without what lies outside) summed in `quantized_bins` runs, as equally long as can be, each sum shared evenly
      over the run, rounded down, where p is not empty anywhere in the run;
    - in both an empty bin gets 1e-4, taken evenly from the others; `KL = sum p log(p / q)` of both normalized.

    The first least one wins and is cut to the data's own range. It clips well for 8 bits with heavy tails; with few data
    it is jumpy.

    Args:
      bins: even, from `quantized_bins` to 16384. Time grows with its square (1e6 log's for 2048).
      quantized_bins: runs over both sides. None takes one for each code of the spec: `2^bits`. The range of an asymmetric one is
        cut to the data's, so its codes lie closer than that: of data on one side, as behind a ReLU, a candidate has twice the
        runs, and `2^(bits + 1) i d / (min(i d, -lo) + min(i d, hi))` of data from lo to hi. `bins` must be at least `2^bits`, or
        twice that for an asymmetric spec. A number, even and at least 2, follows onnxruntime instead, see below.

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

    Source: Migacz, 8-bit inference with TensorRT (GTC 2017), who has 128 runs for the magnitudes of int8. onnxruntime's
    `get_entropy_threshold` has 128 for both sides, half as fine, of `size // 128` bins each, and leaves the last
    `size mod 128` bins of q empty: that favours sizes which leave few (and the result of `-x` is not exactly that of `x`).
    `entropy(quantized_bins=128)` follows it to the letter. There the data of all batches must come at once or the bins
    drift; here bins of 2^e are resampled to its grid, a count that straddles an edge going to the nearer bin. A
    symmetric range is `(i + 1) d` on both sides.
    """
    return Entropy(1 << max(8 * bins - 1, 63).bit_length() if isinstance(bins, int) else 8192, bins, quantized_bins)


# Compiled also for callers outside `jit`, who would otherwise compile the loop again at every call.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _best_candidates(state: Bins, bins: int, quantized_bins: int, grows: bool, even: bool) -> jax.Array:
    """The `i` of each entry, float32 (stack,)."""
    absmax = absmax_of(state.seen)
    reach = jnp.where(absmax > 0, absmax, 1.0)
    ratio = divide(widths(state), reach) * (bins // 2)
    ends = jnp.stack([divide(jnp.maximum(end, 0.0), reach) * (bins // 2) for end in (-state.seen.lo, state.seen.hi)], axis=1)

    # One entry at a time, so that a stack of experts needs the memory of one.
    def best(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        negative, positive = (_resample(side, part[1], bins // 2) for side in part[0])
        return _least_divergence(jnp.concatenate([negative[::-1], positive]), quantized_bins, even, part[2] if grows else None)

    return lax.map(best, (counts(state), ratio, ends)).astype(jnp.float32)


def _resample(side: jax.Array, ratio: jax.Array, size: int) -> jax.Array:
    """Puts the counts of bins of `ratio` < 1 on `size` bins of 1; a bin across an edge is shared in whole counts."""
    start = jnp.arange(side.shape[0], dtype=jnp.float32) * ratio
    first = jnp.floor(start)
    inside = jnp.clip(divide(first + 1 - start, jnp.maximum(ratio, jnp.finfo(jnp.float32).tiny)), 0.0, 1.0)
    here = jnp.round(inside * side)
    first = jnp.minimum(first, size - 1).astype(jnp.int32)
    return jnp.zeros((size,), jnp.float32).at[first].add(here).at[jnp.minimum(first + 1, size - 1)].add(side - here)


def _least_divergence(hist: jax.Array, quantized_bins: int, even: bool, ends: jax.Array | None = None) -> jax.Array:
    """The first `i` with the least divergence, int32, of a histogram of whole counts.

    `even`: no bin is left out of the runs. `ends`: how many bins the data reach down and up, to which candidates are cut.
    """
    bins = hist.shape[0]
    place = jnp.arange(bins, dtype=jnp.int32)
    most_runs = quantized_bins if ends is None else 2 * quantized_bins
    # Each from its own end: a difference of large sums would lose the tail.
    below, above = (sums - hist for sums in (lax.cumsum(hist, axis=0), lax.cumsum(hist, axis=0, reverse=True)))

    def divergence(i: jax.Array) -> jax.Array:
        start, last = bins // 2 - i, jnp.minimum(bins // 2 + i, bins - 1)
        inside = (place >= start) & (place <= last)
        inner = jnp.where(inside, hist, 0.0)
        p = inner + jnp.where(place == start, below, 0.0) + jnp.where(place == last, above, 0.0)
        size = last - start + 1
        runs = quantized_bins if ends is None else _cut_runs(i, quantized_bins, ends)
        run = (place - start) * runs // size if even else (place - start) // (size // runs)
        run = jnp.where(inside, run, most_runs)
        sums = jnp.zeros((most_runs,), jnp.float32)
        total = sums.at[jnp.minimum(run, runs - 1)].add(inner)
        filled = sums.at[run].add((p > 0).astype(jnp.float32), mode="drop")
        share = jnp.floor(divide(total, jnp.maximum(filled, 1.0)))
        q = jnp.where(inside & (run < runs), share[jnp.minimum(run, runs - 1)], 0.0)
        return jnp.where(2 * i >= runs, _kl(p, q, inside), jnp.inf)

    least, most = quantized_bins // 2, bins // 2
    count = -(-(most - least + 1) // _BATCH) * _BATCH  # the last one again, so that all batches are full
    candidates = jnp.minimum(least + jnp.arange(count, dtype=jnp.int32), most)
    return candidates[jnp.argmin(lax.map(divergence, candidates, batch_size=_BATCH))]


def _cut_runs(i: jax.Array, quantized_bins: int, ends: jax.Array) -> jax.Array:
    """The runs of a candidate, int32, whose codes are spread over what is left of its two sides when it is cut to the data's."""
    cut = jnp.maximum(jnp.sum(jnp.minimum(ends, i.astype(jnp.float32))), i.astype(jnp.float32))
    runs = jnp.round(divide((2 * quantized_bins * i).astype(jnp.float32), cut)).astype(jnp.int32)
    return jnp.clip(runs, quantized_bins, 2 * quantized_bins)


def check_levels(observer: Any, spec: IntSpec) -> None:
    """Refuses a spec that an observer cannot find a range for, before there are data; most find one for any.

    Raises:
      ValueError: naming the observer's argument.
    """
    check = getattr(observer, "check_spec", None)
    if check is not None:
        check(spec)


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
