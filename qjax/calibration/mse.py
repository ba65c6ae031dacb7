"""The range with the least squared rounding error."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.calibration.histogram import Bins, Histogram, absmax_of, counts, cover_or_show, widths
from qjax.calibration.ranges import cover
from qjax.core import FloatSpec, IntSpec, block_decode, block_encode, divide, range_params

# How many ranges are judged at once: enough to amortize a step of the loop, few enough to bound the memory.
_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Mse(Histogram):
    """See `mse`."""

    steps: int = 64

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"`steps` must be an int, e.g. 64, got {self.steps!r}")
        if not 2 <= self.steps <= 1024:
            raise ValueError(f"`steps` must lie between 2 and 1024, e.g. 64, got {self.steps}")

    def range(self, state: Bins, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
        return _range(state, self.steps, spec)


def mse(steps: int = 64) -> Mse:
    """The range with the least expected squared rounding error of the data under the spec.

    `argmin over lo, hi of sum_j count_j (decode(encode(x_j; lo, hi)) - x_j)^2`, where `x_j` is the centre of a bin (zero
    for the first one), moved into the data's range.

    First the whole range is shrunk to `1, 1 - 1/steps, ..., 1/steps, 1/steps^2`, then in steps of `2 / steps^2` around
    the best. An asymmetric spec then searches `hi` alone and `lo` alone in the same way. The largest range wins a tie.

    Args:
      steps: how many shares are tried at each of the two levels, 2 to 1024.

    Returns:
      An observer; its state is `Bins` of 8192 bins a side.

    Raises:
      TypeError, ValueError: naming `steps`.

    Example:
      >>> from qjax.calibration.rows import Rows
      >>> from qjax.core import int4
      >>> observer = mse()
      >>> x = jnp.concatenate([jnp.sin(jnp.arange(999.0)), jnp.array([2.0])])
      >>> state = observer.update(observer.init(1, 1), Rows(x.reshape(1, 1000, 1)))
      >>> round(observer.range(state, int4())[1].item(), 2)
      1.05

    Source: the shrinking of OMSE (arXiv 1902.06822) and GPTQ's `find_params`. TensorRT's toolkit (`method="mse"`) tries
    every bin's edge, for symmetric ranges only.
    """
    return Mse(steps=steps)


# Compiled also for callers outside `jit`, who would otherwise compile the loops again at every call.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _range(state: Bins, steps: int, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
    values, weights = _samples(state)
    full_lo, full_hi = cover(state.seen.lo, state.seen.hi, spec)
    absmax = absmax_of(state.seen)

    # One entry at a time, so that a stack of experts needs the memory of one.
    def best(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        values, weights, lo, hi, absmax = part

        def error(shares: jax.Array) -> jax.Array:
            scale, zero_point = range_params(lo * shares[0], hi * shares[1], spec)
            rounded = block_decode(block_encode(values, scale, zero_point, spec), scale, zero_point, spec)
            return jnp.sum(weights * jnp.square(divide(rounded - values, absmax)))

        shares = _search(error, steps, spec)
        return lo * shares[0], hi * shares[1]

    lo, hi = lax.map(best, (values, weights, full_lo, full_hi, jnp.where(absmax > 0, absmax, 1.0)))
    return cover_or_show(state, lo, hi, spec)


def _samples(state: Bins) -> tuple[jax.Array, jax.Array]:
    """One value for each bin, and its share of the data: (stack, 2, N) each."""
    place = jnp.arange(state.low.shape[2], dtype=jnp.float32)
    centre = jnp.where(place == 0, 0.0, place + 0.5)
    values = jnp.stack([-centre, centre])[None] * widths(state)[:, None, None]
    values = jnp.clip(values, state.seen.lo[:, None, None], state.seen.hi[:, None, None])
    weights = counts(state)
    return values, weights / jnp.maximum(jnp.sum(weights, axis=(1, 2), keepdims=True), 1.0)


def _search(error: Callable[[jax.Array], jax.Array], steps: int, spec: IntSpec | FloatSpec) -> jax.Array:
    """The shares (lo, hi) of the full range with the least error, float32 (2,)."""
    sides = [(True, True)] if spec.symmetric else [(True, True), (False, True), (True, False)]
    moves = jnp.asarray([side for side in sides for _ in ("coarse", "fine")])
    fine = jnp.asarray([level for _ in sides for level in (False, True)])
    offsets = np.linspace(1, -1, steps + 1)  # the largest range first: it wins a tie
    offsets = jnp.asarray(np.pad(offsets, (0, -len(offsets) % _BATCH), mode="edge"), jnp.float32)

    def stage(best: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array]):
        least, shares = best
        moves, fine = now
        middle = jnp.where(fine, shares, 0.5)
        radius = jnp.where(fine, 1 / steps, 0.5)
        tried = jnp.clip(middle[None] + radius * offsets[:, None], 1 / steps**2, 1.0)
        tried = jnp.where(moves[None], tried, shares[None])
        errors = lax.map(error, tried, batch_size=_BATCH)
        i = jnp.argmin(errors)
        better = errors[i] < least
        return (jnp.where(better, errors[i], least), jnp.where(better, tried[i], shares)), None

    full = jnp.ones((2,), jnp.float32)
    return lax.scan(stage, (error(full), full), (moves, fine))[0][1]
