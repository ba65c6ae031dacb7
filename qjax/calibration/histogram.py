"""A streaming histogram that is the same to the bit however the data are cut into calls."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration.ranges import Range, cover, extremes, join, no_range
from qjax.calibration.rows import Rows
from qjax.core import FloatSpec, IntSpec

# The smallest width is float32's smallest normal number: what is smaller counts as zero, as XLA has it on most hardware.
_LEAST_EXPONENT = -126


class Bins(NamedTuple):
    """Counts of finite values by side and magnitude, in bins of width `w = 2^exponent` that start at zero.

    Bin `j` holds `j * w <= |x| < (j + 1) * w`; side 0 the values below zero, side 1 the others. A count is
    `high * 2^32 + low`, exact below 2^64.

    Attributes:
      low: uint32 (stack, 2, N).
      high: uint32 (stack, 2, N).
      exponent: int32 (stack,), -126 before any value that is not zero.
      seen: `Range`, exact, also of values that are not finite.
    """

    low: jax.Array
    high: jax.Array
    exponent: jax.Array
    seen: Range


@dataclasses.dataclass(frozen=True)
class Histogram:
    """See `histogram`. The observers that choose a range from the distribution inherit from this one."""

    per_side: int = 8192

    def __post_init__(self):
        if isinstance(self.per_side, bool) or not isinstance(self.per_side, int):
            raise TypeError(f"`per_side` must be an int, e.g. 8192, got {self.per_side!r}")
        if not 64 <= self.per_side <= 2**20 or self.per_side.bit_count() != 1:
            raise ValueError(f"`per_side` must be a power of two from 64 to 1048576, e.g. 8192, got {self.per_side!r}")

    def init(self, stack: int, columns: int) -> Bins:
        if stack * 2 * self.per_side >= 2**31:
            raise ValueError(f"`per_side` of {self.per_side} is too many for a stack of {stack}: fewer than 2^31 bins in all")
        counts = jnp.zeros((stack, 2, self.per_side), jnp.uint32)
        return Bins(counts, counts, jnp.full((stack,), _LEAST_EXPONENT, jnp.int32), no_range(stack))

    def update(self, state: Bins, rows: Rows) -> Bins:
        return _update(state, rows.x, rows.owner)

    def merge(self, a: Bins, b: Bins) -> Bins:
        return _merge(a, b)


def histogram(per_side: int = 8192) -> Histogram:
    """Counts values in bins of width `w = 2^e >= 2^-126`, aligned at zero, with `absmax < per_side * w <= 2 * absmax`.

    When a value does not fit, `w` doubles and neighbouring bins are added, which is exact: the counts are those of one
    pass with the final width, so they depend neither on the order of the data nor on how they are cut into calls.

    Values that are not finite are in no bin, but in `seen`. Subnormal values may count as zero. One call may hold fewer
    than 2^32 values.

    Args:
      per_side: bins below zero, and as many above; a power of two from 64 to 1048576. A state takes 16 bytes each.

    Returns:
      An observer; its state is `Bins`.

    Raises:
      TypeError, ValueError: naming `per_side`; from `init` if stack and bins are too many together.

    Example:
      >>> observer = histogram(64)
      >>> state = observer.update(observer.init(1, 3), Rows(jnp.array([[[-1.0, 0.0, 63.5]]])))
      >>> widths(state).item(), counts(state)[0, :, :2].tolist(), state.seen.hi.item()
      (1.0, [[0.0, 1.0], [1.0, 0.0]], 63.5)
      >>> state = observer.update(state, Rows(jnp.array([[[64.0, 0.0, 0.0]]])))
      >>> widths(state).item(), counts(state)[0, :, :2].tolist()
      (2.0, [[1.0, 0.0], [3.0, 0.0]])

    Source: the histograms of onnxruntime and TensorRT, which stretch or extend bins as data come, so that their results
    depend on the batches.
    """
    return Histogram(per_side)


def widths(state: Bins) -> jax.Array:
    """Returns the width of the bins, float32 (stack,), a power of two.

    Example:
      >>> widths(histogram(64).init(1, 1)).item() == 2.0**-126
      True
    """
    return _power(state.exponent)


def counts(state: Bins) -> jax.Array:
    """Returns the counts as float32 (stack, 2, N), exact below 2^24.

    Example:
      >>> counts(histogram(64).init(3, 1)).shape
      (3, 2, 64)
    """
    return as_float(state.low, state.high)


def as_float(low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns `high * 2^32 + low` as float32; it never falls when the count rises.

    Example:
      >>> as_float(jnp.uint32(1), jnp.uint32(1)).item() == 2.0**32
      True
    """
    return high.astype(jnp.float32) * 2.0**32 + low.astype(jnp.float32)


def add(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Adds counts given as (low, high), uint32, exactly.

    Example:
      >>> [v.item() for v in add((jnp.uint32(2**32 - 1), jnp.uint32(0)), (jnp.uint32(3), jnp.uint32(4)))]
      [2, 5]
    """
    low = a[0] + b[0]
    return low, a[1] + b[1] + (low < a[0]).astype(jnp.uint32)


def cover_or_show(state: Bins, lo: jax.Array, hi: jax.Array, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
    """Returns a range cut to the data's own and made to hold zero; where the data are not finite, neither is the result.

    Args:
      state: (stack,) entries.
      lo: float32 (stack,), chosen from the bins.
      hi: float32 (stack,), chosen from the bins.
      spec: what the activations are rounded to.

    Returns:
      (lo, hi), float32 (stack,).

    Example:
      >>> from qjax.core import int8
      >>> state = histogram(64).update(histogram(64).init(1, 2), Rows(jnp.array([[[-1.0, 3.5]]])))
      >>> [v.item() for v in cover_or_show(state, jnp.float32([-8.0]), jnp.float32([3.0]), int8())]
      [-3.0, 3.0]
    """
    seen = state.seen
    finite = jnp.isfinite(seen.lo) & jnp.isfinite(seen.hi)
    return cover(jnp.where(finite, jnp.maximum(lo, seen.lo), seen.lo), jnp.where(finite, jnp.minimum(hi, seen.hi), seen.hi), spec)


def absmax_of(seen: Range) -> jax.Array:
    """Returns the largest magnitude of the data, float32 (stack,).

    Example:
      >>> absmax_of(no_range(1)).item()
      0.0
    """
    return jnp.maximum(-seen.lo, seen.hi)


# Compiled also for callers outside `jit`, who would otherwise compile the loop again at every call.
@jax.jit
def _update(state: Bins, x: jax.Array, owner: jax.Array | None) -> Bins:
    stack, _, per_side = state.low.shape
    finite = jnp.isfinite(x)
    largest = absmax_of(extremes(Rows(jnp.where(finite, x, 0.0), owner, stack)))
    exponent = jnp.maximum(state.exponent, _exponent_of(largest, per_side))
    part = jnp.arange(stack, dtype=jnp.int32)[:, None, None] if owner is None else owner[None, :, None]
    magnitude = jnp.where(finite, jnp.abs(x), 0.0) * _power(-exponent)[part]
    place = (2 * part + (x >= 0).astype(jnp.int32)) * per_side + jnp.floor(magnitude).astype(jnp.int32)
    nowhere = stack * 2 * per_side
    place = jnp.where(finite & (part >= 0), place, nowhere)
    new = jnp.zeros((nowhere,), jnp.uint32).at[place.ravel()].add(jnp.uint32(1), mode="drop").reshape(state.low.shape)
    low, high = add(widen(state, exponent), (new, jnp.zeros_like(new)))
    return Bins(low, high, exponent, join(state.seen, extremes(Rows(x, owner, stack))))


@jax.jit
def _merge(a: Bins, b: Bins) -> Bins:
    exponent = jnp.maximum(a.exponent, b.exponent)
    low, high = add(widen(a, exponent), widen(b, exponent))
    return Bins(low, high, exponent, join(a.seen, b.seen))


def widen(state: Bins, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the counts (low, high) in bins of `2^exponent`, int32 (stack,), no smaller than they are; exact.

    Example:
      >>> state = histogram(64).update(histogram(64).init(1, 2), Rows(jnp.array([[[1.0, 63.0]]])))
      >>> widen(state, state.exponent + 1)[0][0, 1, [0, 31]].tolist()
      [1, 1]
    """
    # After log2(N) doublings everything is in the first bin and stays there.
    first = jnp.maximum(state.exponent, exponent - (state.low.shape[2].bit_length() - 1))

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, now = carry
        grows = (now < exponent)[:, None, None]
        pairs = add((low[..., 0::2], high[..., 0::2]), (low[..., 1::2], high[..., 1::2]))
        doubled = [jnp.concatenate([v, jnp.zeros_like(v)], axis=2) for v in pairs]
        return jnp.where(grows, doubled[0], low), jnp.where(grows, doubled[1], high), jnp.minimum(now + 1, exponent)

    low, high, _ = lax.while_loop(lambda carry: jnp.any(carry[2] < exponent), step, (state.low, state.high, first))
    return low, high


def _exponent_of(largest: jax.Array, per_side: int) -> jax.Array:
    """The least `e` with `largest < per_side * 2^e`, from the float's own exponent: `frexp` fails where subnormals are flushed."""
    exponent = (lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 126
    return jnp.maximum(exponent - (per_side.bit_length() - 1), _LEAST_EXPONENT)


def _power(exponent: jax.Array) -> jax.Array:
    """`2^exponent`, exact, for -126 .. 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
