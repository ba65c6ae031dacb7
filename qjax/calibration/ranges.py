"""Ranges from extreme values: of all data, averaged over calls, and of magnitudes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.calibration.rows import Rows
from qjax.core import FloatSpec, IntSpec


class Range(NamedTuple):
    """The smallest and the largest value. NaN or an infinity in the data shows here and stays; no data is 0 .. 0.

    Attributes:
      lo: float32 (stack,).
      hi: float32 (stack,).
      count: int32 (stack,), the number of rows (fewer than 2^31), for `MovingAverage` of calls that had rows.
    """

    lo: jax.Array
    hi: jax.Array
    count: jax.Array


class Peak(NamedTuple):
    """The largest magnitude. NaN or an infinity in the data shows here and stays; no data is 0.

    Attributes:
      absmax: float32 (stack,).
      count: int32 (stack,), the number of rows (fewer than 2^31).
    """

    absmax: jax.Array
    count: jax.Array


def extremes(rows: Rows) -> Range:
    """Returns the range of one call.

    Args:
      rows: float32; the rows of owner -1 are not read.

    Returns:
      `Range`, one entry for each part or expert.

    Example:
      >>> seen = extremes(Rows(jnp.array([[[-1.0, 2.0], [5.0, 3.0]]]), jnp.array([1, 1]), 2))
      >>> seen.lo.tolist(), seen.hi.tolist(), seen.count.tolist()
      ([0.0, -1.0], [0.0, 5.0], [0, 2])
    """
    lo = jnp.min(rows.x, axis=2, initial=jnp.inf)
    hi = jnp.max(rows.x, axis=2, initial=-jnp.inf)
    mine = jnp.ones(lo.shape, bool)
    if rows.owner is not None:
        mine = rows.owner[None] == jnp.arange(rows.experts, dtype=rows.owner.dtype)[:, None]
    lo = jnp.min(jnp.where(mine, lo, jnp.inf), axis=1, initial=jnp.inf)
    hi = jnp.max(jnp.where(mine, hi, -jnp.inf), axis=1, initial=-jnp.inf)
    count = jnp.sum(mine, axis=1, dtype=jnp.int32)
    return Range(jnp.where(count > 0, lo, 0.0), jnp.where(count > 0, hi, 0.0), count)


def join(a: Range, b: Range) -> Range:
    """Returns the range of both; an entry without data adds nothing.

    Example:
      >>> one = Range(jnp.float32([2.0]), jnp.float32([3.0]), jnp.int32([4]))
      >>> join(one, no_range(1)).lo.item(), join(one, one).count.item()
      (2.0, 8)
    """
    lo = jnp.where(a.count == 0, b.lo, jnp.where(b.count == 0, a.lo, jnp.minimum(a.lo, b.lo)))
    hi = jnp.where(a.count == 0, b.hi, jnp.where(b.count == 0, a.hi, jnp.maximum(a.hi, b.hi)))
    return Range(lo, hi, a.count + b.count)


def no_range(stack: int) -> Range:
    """Returns the range of no data.

    Example:
      >>> no_range(2).count.tolist()
      [0, 0]
    """
    return Range(jnp.zeros((stack,), jnp.float32), jnp.zeros((stack,), jnp.float32), jnp.zeros((stack,), jnp.int32))


def cover(lo: jax.Array, hi: jax.Array, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
    """Returns the range of a grid that holds `lo .. hi`: every grid holds zero, a symmetric one is as long on both sides.

    Symmetric: `-t .. t` with `t = max(-lo, hi)`; symmetric and unsigned (negative values become 0): `0 .. max(hi, 0)`;
    asymmetric: `min(lo, 0) .. max(hi, 0)`.

    Args:
      lo: float32, any shape.
      hi: float32, the same shape.
      spec: what the activations are rounded to.

    Returns:
      (lo, hi), float32.

    Example:
      >>> from qjax.core import int8, uint8
      >>> [v.item() for v in cover(jnp.float32(-1.0), jnp.float32(3.0), int8())]
      [-3.0, 3.0]
      >>> [v.item() for v in cover(jnp.float32(1.0), jnp.float32(3.0), uint8())]
      [0.0, 3.0]
    """
    if spec.symmetric and spec.signed:
        reach = jnp.maximum(-lo, hi)
        return 0.0 - reach, reach
    if spec.symmetric:
        return jnp.where(jnp.isfinite(lo), 0.0, lo), jnp.maximum(hi, 0.0)
    return jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)


@dataclasses.dataclass(frozen=True)
class MinMax:
    """See `minmax`."""

    def init(self, stack: int, columns: int) -> Range:
        return no_range(stack)

    def update(self, state: Range, rows: Rows) -> Range:
        return join(state, extremes(rows))

    def merge(self, a: Range, b: Range) -> Range:
        return join(a, b)

    def range(self, state: Range, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
        return cover(state.lo, state.hi, spec)


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """See `moving_average`."""

    decay: float = 0.99

    def __post_init__(self):
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float):
            raise TypeError(f"`decay` must be a number, e.g. 0.99, got {self.decay!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must be at least 0 and less than 1 (0 keeps the last call only), got {self.decay!r}")

    def init(self, stack: int, columns: int) -> Range:
        return no_range(stack)

    def update(self, state: Range, rows: Rows) -> Range:
        new = extremes(rows)
        return self._blend(state, new._replace(count=jnp.minimum(new.count, 1)), jnp.float32(self.decay))

    def merge(self, a: Range, b: Range) -> Range:
        share = a.count.astype(jnp.float32) / jnp.maximum(a.count + b.count, 1).astype(jnp.float32)
        return self._blend(a, b, share)

    def range(self, state: Range, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
        return cover(state.lo, state.hi, spec)

    def _blend(self, a: Range, b: Range, share: jax.Array) -> Range:
        def mean(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.where(a.count == 0, y, jnp.where(b.count == 0, x, share * x + (1 - share) * y))

        return Range(mean(a.lo, b.lo), mean(a.hi, b.hi), a.count + b.count)


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """See `absmax`."""

    def init(self, stack: int, columns: int) -> Peak:
        return Peak(jnp.zeros((stack,), jnp.float32), jnp.zeros((stack,), jnp.int32))

    def update(self, state: Peak, rows: Rows) -> Peak:
        lo, hi, count = extremes(rows)
        return self.merge(state, Peak(jnp.maximum(-lo, hi), count))

    def merge(self, a: Peak, b: Peak) -> Peak:
        return Peak(jnp.maximum(a.absmax, b.absmax), a.count + b.count)

    def range(self, state: Peak, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
        return cover(-state.absmax, state.absmax, spec)


def minmax() -> MinMax:
    """The smallest and the largest value of all data: nothing is clipped.

    Returns:
      An observer; its state is a `Range`, its result that of `cover`.

    Example:
      >>> from qjax.core import uint8
      >>> observer = minmax()
      >>> state = observer.update(observer.init(1, 2), Rows(jnp.array([[[-1.0, 2.0], [5.0, 3.0]]])))
      >>> [v.tolist() for v in observer.range(state, uint8())]
      [[-1.0], [5.0]]

    Source: Jacob et al. (arXiv 1712.05877).
    """
    return MinMax()


def moving_average(decay: float = 0.99) -> MovingAverage:
    """The exponential moving average of each call's smallest and largest value.

    `lo <- decay * lo + (1 - decay) * min(x)`, the same for `hi`; the first call that has rows sets both.

    The result depends on the order of the data and on how they are cut into calls. Merging averages two states by their
    numbers of calls, which is not what either order of the data would give. Values beyond the average are clipped.

    Args:
      decay: the share of the past, at least 0 and less than 1.

    Returns:
      An observer; its state is a `Range` that counts calls, its result that of `cover`.

    Raises:
      TypeError, ValueError: naming `decay`.

    Example:
      >>> from qjax.core import int8
      >>> observer = moving_average(0.75)
      >>> state = observer.update(observer.init(1, 1), Rows(jnp.array([[[4.0]]])))
      >>> state = observer.update(state, Rows(jnp.array([[[8.0]]])))
      >>> observer.range(state, int8())[1].tolist()
      [5.0]

    Source: PyTorch's `MovingAverageMinMaxObserver`, whose `averaging_constant` is `1 - decay`.
    """
    return MovingAverage(decay)


def absmax() -> AbsMax:
    """The largest magnitude of all data: `-a .. a`, whatever the spec (but `0 .. a` for a symmetric unsigned one).

    Under an asymmetric spec this wastes codes on a side without values: use `minmax`.

    Returns:
      An observer; its state is a `Peak`.

    Example:
      >>> from qjax.core import int8
      >>> observer = absmax()
      >>> state = observer.update(observer.init(1, 2), Rows(jnp.array([[[-7.0, 2.0]]])))
      >>> [v.tolist() for v in observer.range(state, int8())]
      [[-7.0], [7.0]]

    Source: LLM.int8() (arXiv 2208.07339), section 2.
    """
    return AbsMax()
