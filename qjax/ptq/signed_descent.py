"""Rounding that is tuned by signed gradient descent: what is tuned, what it rounds to, and the loop that tunes it.

Arrays here are blocks, (..., group) as `qjax.core.blocks` gives them, so that one text serves groups, channels, tiles and tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qjax.core import IntSpec, affine_decode, block_params, divide, params_from_range
from qjax.ptq.range_search import search_range

LEAST = 1 / 16  # of a factor: a range of zero would be a grid without steps
HALF = 0.5  # a larger offset would round past the neighbours, and move a zero


@dataclasses.dataclass(frozen=True)
class Descent:
    """How the descent goes.

    Attributes:
      steps: gradient steps.
      lr: what the first one moves each number by; the rate falls linearly to zero.
      minmax: whether the ranges are tuned, too.
      mse: whether ranges start from a search in place of the extreme values.
      checks: how often, at equal distances, all of the data is looked at to keep the best.
    """

    steps: int
    lr: float
    minmax: bool
    mse: bool
    checks: int

    @property
    def turns(self) -> tuple[int, int]:
        """(checks, steps between two of them); their product is at least `steps` where that does not divide."""
        checks = max(min(self.checks, self.steps), 1)
        return checks, -(-self.steps // checks)


class Offsets(NamedTuple):
    """What is tuned of one weight.

    Attributes:
      v: (..., group), added before rounding, in units of the scale, at most 1/2 on both sides.
      top: (..., 1), times the largest value of the block (symmetric: the largest magnitude).
      bottom: (..., 1), times the smallest value; of a symmetric spec it has no effect.
    """

    v: jax.Array
    top: jax.Array
    bottom: jax.Array


class Rounded(NamedTuple):
    """Codes (..., group) and their grid (..., 1), all float32; `zero_point` None for a symmetric spec, whole unless of a floating dtype."""

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None


def start(x: jax.Array, spec: IntSpec, mse: bool) -> Offsets:
    """Offsets of zero, with the range that rounding to nearest takes (`block_params`), or the searched one.

    Args:
      x: float32 blocks.
      spec: what is rounded to.
      mse: take the range from `search_range`.

    Returns:
      The offsets.
    """
    lo, hi = _extremes(x, spec)
    ones = jnp.ones_like(hi)
    if not mse and not spec.by_mean:
        return Offsets(jnp.zeros_like(x), ones, ones)
    scale, zero_point = search_range(x, spec) if mse else block_params(x, spec)
    if zero_point is None:
        return Offsets(jnp.zeros_like(x), _factor(scale, divide(hi, _steps(spec))), ones)
    zero_point = zero_point.astype(jnp.float32)
    top, bottom = (spec.qmax - zero_point) * scale, (spec.qmin - zero_point) * scale
    return Offsets(jnp.zeros_like(x), _factor(top, jnp.maximum(hi, 0)), _factor(bottom, jnp.minimum(lo, 0)))


def _factor(part: jax.Array, whole: jax.Array) -> jax.Array:
    nothing = whole == 0
    return jnp.where(nothing, 1.0, jnp.clip(part / jnp.where(nothing, 1.0, whole), LEAST, 1.0))


def _steps(spec: IntSpec) -> float:
    """Steps from zero to the upper end of a symmetric range."""
    return spec.qmax + (0.5 if spec.scale_rule == "half" else 0.0)


def _extremes(x: jax.Array, spec: IntSpec) -> tuple[jax.Array, jax.Array]:
    if spec.symmetric and spec.signed:
        hi = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        if spec.by_mean:  # the scale of rounding is among those that a factor can give, however large an outlier
            hi = jnp.minimum(hi, block_params(x, spec)[0] * (_steps(spec) / LEAST))
        return -hi, hi
    return jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)


def round_with(x: jax.Array, offsets: Offsets, spec: IntSpec) -> Rounded:
    """Rounds with offsets: `clip(round(x / s + V) + z, qmin, qmax)`, s and z of the range `bottom * min(x) .. top * max(x)`.

    With a floating zero point `clip(round(x / s + V + z), qmin, qmax)`, as `affine_encode` has it.
    Differentiable in the offsets: rounding counts as the identity, so d codes / d V = 1 where nothing is clipped. The scale is
    rounded to `spec.scale_dtype` before it is used, the zero point to `spec.zero_dtype`, so what is computed here is what is stored,
    to the bit.

    Args:
      x: float32 blocks.
      offsets: of the same blocks.
      spec: an `IntSpec`.

    Returns:
      Codes that are whole numbers, and their grid.
    """
    lo, hi = _extremes(x, spec)
    grid = _grid(lo * (offsets.top if spec.symmetric else offsets.bottom), hi * offsets.top, spec)
    steps = divide(x, grid[0]) + offsets.v
    zero = 0.0 if grid[1] is None else grid[1]
    codes = _round(steps + zero) if spec.float_zero else _round(steps) + zero
    return Rounded(_clip(codes, spec), *grid)


def stored(rounded: Rounded, spec: IntSpec, canonical: Callable[[jax.Array], jax.Array]) -> Rounded:
    """Codes and their grid as `qjax.core.assemble` takes them.

    Args:
      rounded: of blocks.
      spec: an `IntSpec`.
      canonical: from blocks to the canonical layout.

    Returns:
      Codes int32, scale, zero point int32 or, with a floating `spec.zero_dtype`, float32.
    """
    zero_point = None if rounded.zero_point is None else rounded.zero_point[..., 0]
    if zero_point is not None and not spec.float_zero:
        zero_point = zero_point.astype(jnp.int32)
    return Rounded(canonical(rounded.codes).astype(jnp.int32), rounded.scale[..., 0], zero_point)


def _grid(lo: jax.Array, hi: jax.Array, spec: IntSpec) -> tuple[jax.Array, jax.Array | None]:
    """`params_from_range`, with the gradients of the formulas without their roundings."""
    scale, zero_point = params_from_range(lax.stop_gradient(lo), lax.stop_gradient(hi), spec)
    if spec.symmetric:
        return _instead(scale, hi / _steps(spec)), None
    lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
    scale = _instead(scale, (hi - lo) / (spec.qmax - spec.qmin))
    zero = spec.qmin - lo / scale
    return scale, _instead(jnp.asarray(zero_point, jnp.float32), zero if spec.float_zero else _clip(zero, spec))


@jax.custom_jvp
def _instead(exact: jax.Array, smooth: jax.Array) -> jax.Array:
    """`exact`, with the gradient of `smooth`."""
    del smooth
    return exact


_instead.defjvp(lambda primals, tangents: (_instead(*primals), tangents[1]))


def _round(x: jax.Array) -> jax.Array:
    return _instead(jnp.round(lax.stop_gradient(x)), x)


def _clip(codes: jax.Array, spec: IntSpec) -> jax.Array:
    """Clips; the gradient passes where nothing is clipped, the ends included (of `jnp.clip` half of it does there)."""
    clipped = jnp.clip(codes, spec.qmin, spec.qmax)
    return jnp.where(codes == clipped, codes, lax.stop_gradient(clipped))


def decode(rounded: Rounded) -> jax.Array:
    """What codes stand for, float32: the formula of `QTensor.dequantize`."""
    return affine_decode(*rounded)


def project(offsets: Offsets) -> Offsets:
    """The nearest offsets that are allowed: |V| <= 1/2, factors from `LEAST` to 1."""
    return Offsets(
        jnp.clip(offsets.v, -HALF, HALF), jnp.clip(offsets.top, LEAST, 1.0), jnp.clip(offsets.bottom, LEAST, 1.0)
    )


class Found(NamedTuple):
    """What a descent found.

    Attributes:
      best: offsets.
      least: their loss over all of the data.
      first: that of where it began.
      rounding: that of plain rounding.
      reached: what `reached` made of the gradients, true where it was in any step.
      skipped: steps that were left out, for their loss was not finite.
      holes: steps of which some numbers of the gradient were not finite.
    """

    best: Any
    least: jax.Array
    first: jax.Array
    rounding: jax.Array
    reached: Any
    skipped: jax.Array
    holes: jax.Array


def descend(
    loss: Callable[[Any, jax.Array], jax.Array],
    judge: Callable[[Any], jax.Array],
    plain: Any,
    begin: Any,
    descent: Descent,
    reached: Callable[[Any], Any] = lambda slope: (),
) -> Found:
    """Signed gradient descent with a linearly falling rate, after each step the nearest allowed offsets.

    `o <- project(o - lr (1 - t / steps) sign(d loss / d o)),  t = 0 .. steps - 1`

    A number whose gradient is not finite has no sign and stands still; a step whose loss is not finite is left out. Both are counted.

    Args:
      loss: of offsets and the number of a step; a scalar, differentiable in the offsets.
      judge: of offsets, the loss over all of the data: what is kept is the best by this, `plain` and `begin` among the candidates.
      plain: a tree of `Offsets`, those of plain rounding.
      begin: where the descent begins; where that is `plain`, it is looked at once.
      descent: how it goes.
      reached: of a gradient, a tree of arrays of bool.

    Returns:
      What was found.
    """
    checks, steps = descent.turns
    optimizer = optax.sign_sgd(optax.linear_schedule(descent.lr, 0.0, checks * steps))

    def step(t: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        at, state, seen, lost = carry
        value, slope = jax.value_and_grad(loss)(at, t)
        usable = jnp.isfinite(value)
        whole = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(slope)]))
        seen = jax.tree.map(jnp.logical_or, seen, reached(slope))
        slope = jax.tree.map(lambda g: jnp.where(usable & jnp.isfinite(g), g, 0.0), slope)
        moves, state = optimizer.update(slope, state)
        lost = lost + jnp.stack([~usable, usable & ~whole]).astype(jnp.int32)
        return _tuned(optax.apply_updates(at, moves), at, descent), state, seen, lost

    # Turn 0 looks at plain rounding and turn 1 at the begin, without a step: so `judge` is compiled once. Turn 0 falls away if both are one.
    def turn(carry: tuple[Any, ...], number: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
        (at, *rest), best, least = carry
        at = _where(number == 1, begin, at)
        first, last = jnp.maximum(number - 2, 0) * steps, jnp.maximum(number - 1, 0) * steps
        moved = lax.fori_loop(first, last, step, (at, *rest))
        now = judge(moved[0])
        better = now < least
        return (moved, _where(better, moved[0], best), jnp.where(better, now, least)), now

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), jax.eval_shape(reached, begin))
    carry = (plain, optimizer.init(begin), nothing, jnp.zeros(2, jnp.int32)), plain, jnp.float32(jnp.inf)
    ((_, _, seen, lost), best, least), losses = lax.scan(turn, carry, jnp.arange(int(begin is plain), checks + 2))
    return Found(best, least, losses[-1 - checks], losses[0], seen, *lost)


def _where(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _tuned(new: Any, old: Any, descent: Descent) -> Any:
    def one(new: Offsets, old: Offsets) -> Offsets:
        new = project(new)
        return new if descent.minmax else new._replace(top=old.top, bottom=old.bottom)

    return jax.tree.map(one, new, old, is_leaf=lambda x: isinstance(x, Offsets))
