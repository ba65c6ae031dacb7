"""The straight-through estimator: rounds forward, passes the gradient backward."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qjax.calibration import minmax
from qjax.core import (
    ActSpec,
    FloatSpec,
    IntSpec,
    PerChannel,
    QTensor,
    Spec,
    affine_decode,
    affine_encode,
    affine_params,
    canonicalize,
    divide,
    in_range,
    logical_blocks,
    padding,
    params_from_range,
    quantize,
    range_params,
    round_activation,
    round_inliers,
    round_trip,
)
from qjax.core.rounding import checked, never_clips, row_params
from qjax.core.specs import check_choice, check_number
from qjax.ptq.method import Problem
from qjax.training.estimator import Codes, Learned, Moment, at_bits, check_estimators, with_gradient

Gradient = Literal["clipped", "passed"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def straight_through(w: Any, spec: Spec, axes: tuple[int, ...], stacked: tuple[int, ...], name: str) -> jax.Array:
    """Returns `dequantize(quantize(w))`, with the gradient of the identity where `w` lies in the range of the codes.

    d out / d w = 1 where q_min <= w / scale + zero_point <= q_max, else 0; the scale counts as a constant. Under
    `scale_rule="half"`, whose range ends half a step beyond the codes, the mask is wider by that half step (else the largest
    weight of most groups would never train); it is also wider by the rounding of the scale to its dtype.

    Args:
      w: float weight of any shape.
      spec: what it is rounded to.
      axes: its contracted axes, negative.
      stacked: its axes that hold independent weights, negative.
      name: what an error calls it.

    Returns:
      An array of the shape and dtype of `w`.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> straight_through(jnp.array([[0.2], [1.5]]), qjax.int2(scale_rule="full"), (-2,), (), "w").tolist()
      [[0.0], [1.5]]
    """
    return round_trip(w, spec, axes, stacked, name=name)


@straight_through.defjvp
def _straight_through_jvp(
    spec: Spec, axes: tuple[int, ...], stacked: tuple[int, ...], name: str, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (w,), (t,) = primals, tangents
    if never_clips(spec):
        return straight_through(w, spec, axes, stacked, name), t
    inside = in_range(w, spec, axes, stacked, name=name)
    return straight_through(w, spec, axes, stacked, name), jnp.where(inside, t, jnp.zeros_like(t))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def straight_through_activation(x: Any, act: ActSpec, axes: tuple[int, ...], rows: tuple[int, ...] = ()) -> jax.Array:
    """Returns activations rounded with ranges of their own, with the gradient of the identity: such ranges clip nothing.

    But for unsigned symmetric ones, which begin at 0: negative values have no gradient.

    Args:
      x: floating, any shape.
      act: a dynamic `ActSpec`.
      axes: the axes that share a scale.
      rows: the axes over which a column runs, for the outlier columns of `act`, which are not rounded.

    Returns:
      An array of the shape and dtype of `x`.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> act = qjax.dynamic(qjax.int2(scale_rule="full"))
      >>> jax.grad(lambda x: straight_through_activation(x, act, (1,)).sum())(jnp.array([[1.0, -2.0]])).tolist()
      [[1.0, 1.0]]
    """
    return round_inliers(x, act, axes, rows)


@straight_through_activation.defjvp
def _straight_through_activation_jvp(
    act: ActSpec, axes: tuple[int, ...], rows: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (x,), (t,) = primals, tangents
    value = straight_through_activation(x, act, axes, rows)
    return value, jnp.where(_below(x, value, act.spec), jnp.zeros_like(t), t)


def _below(x: jax.Array, value: jax.Array, spec: Spec) -> jax.Array:
    """Where a range that begins at 0 clips; outlier columns, which are not rounded, are not clipped."""
    unsigned = isinstance(spec, IntSpec) and spec.symmetric and not spec.signed
    return (x < 0) & (value >= 0) if unsigned else jnp.zeros(x.shape, bool)


def straight_through_at(x: jax.Array, act: ActSpec, axes: tuple[int, ...], moment: Moment) -> jax.Array:
    """`straight_through_activation` to the bits of a step.

    Args:
      x: floating, any shape.
      act: a dynamic `ActSpec` of integers without outliers.
      axes: the axes that share a scale.
      moment: of the step, with `bits`.

    Returns:
      An array of the shape and dtype of `x`.

    Example:
      >>> import qjax
      >>> act = qjax.dynamic(qjax.int8(scale_rule="full"))
      >>> straight_through_at(jnp.array([[0.4, -1.0]]), act, (1,), Moment(bits=jnp.int32(2))).tolist()
      [[0.0, -1.0]]
    """
    now = at_bits(act.spec, moment)  # pyright: ignore[reportArgumentType]  # schedules of bits are for integers
    fixed = jax.lax.stop_gradient(x).astype(jnp.float32)
    moved = jnp.moveaxis(fixed, axes, range(-len(axes), 0))
    scale, zero_point = affine_params(moved.reshape(*moved.shape[: x.ndim - len(axes)], -1), now)
    shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
    scale, zero_point = scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)
    value = affine_decode(affine_encode(fixed, scale, zero_point, now), scale, zero_point).astype(x.dtype)
    return with_gradient(x, value, ~_below(x, value, act.spec))


@jax.custom_vjp
def scaled_gradient(x: jax.Array, value: jax.Array, mask: jax.Array, slope: jax.Array) -> jax.Array:
    """`value`, with the gradient g (1 + slope sign(g)) by `x` where `mask`, else 0.

    Example:
      >>> jax.grad(lambda x: 2 * scaled_gradient(x, jnp.round(x), x < 9, 0.5 * (x - jnp.round(x))))(jnp.float32(1.25)).item()
      2.25
    """
    del x, mask, slope
    return value


def _scaled_forward(x: Any, value: Any, mask: Any, slope: Any) -> tuple[jax.Array, Any]:
    return value, (mask, slope)


def _scaled_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, None, None, None]:
    mask, slope = saved
    return jnp.where(mask, g * (1 + slope.astype(g.dtype) * jnp.sign(g)), jnp.zeros_like(g)), None, None, None


scaled_gradient.defvjp(_scaled_forward, _scaled_backward)


@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """See `ste`."""

    gradient: Gradient = "clipped"
    slope: float = 0.0
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        check_choice("gradient", self.gradient, ("clipped", "passed"))
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))
        check_number("slope", self.slope, below=1)
        object.__setattr__(self, "slope", float(self.slope))

    def check(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> None:
        check_estimators(self, self, weight, activations)

    @property
    def name(self) -> str:
        parts = [self.gradient] * (self.gradient != "clipped") + [f"slope={self.slope:g}"] * (self.slope > 0)
        parts += [self.rounding] * self.random
        return f"ste({', '.join(parts)})" if parts else "ste"

    @property
    def only_trains(self) -> str:
        return ""

    @property
    def random(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def learns(self) -> bool:
        return False

    def refusal(self, spec: Spec) -> str:
        if (self.random or self.slope) and not isinstance(spec, IntSpec):
            return f"`rounding`='stochastic' and `slope` are for integers, got {spec}: take qjax.ste() or a spec such as qjax.int4()"
        if self.random and isinstance(spec, IntSpec) and spec.by_mean:
            return f"`rounding`='stochastic' is for grids with a range, got {spec}: take qjax.ste()"
        return ""

    def refusal_of_activation(self, act: ActSpec) -> str:
        return self.refusal(act.spec) if act.is_float else ""

    def init(self, problem: Problem) -> Learned:
        del problem
        return {}

    def fake(self, problem: Problem, learned: Learned, moment: Moment) -> jax.Array:
        del learned
        w, spec, axes, stacked, name = problem.w, problem.spec, problem.axes, problem.stacked, problem.name
        if self == StraightThrough() and moment.bits is None:
            return straight_through(w, spec, axes, stacked, name)
        if not isinstance(spec, IntSpec):
            value = round_trip(jax.lax.stop_gradient(w), spec, axes, stacked, name=name)
            mask = in_range(w, spec, axes, stacked, name=name) if self.gradient == "clipped" else jnp.ones(w.shape, bool)
            return with_gradient(w, value, mask)
        w, axes, stacked = checked(w, spec, axes, stacked, name)
        blocked, _, to_logical = logical_blocks(w, spec, axes, stacked)
        now = at_bits(spec, moment)
        fixed = jax.lax.stop_gradient(blocked.astype(jnp.float32))
        scale, zero_point = affine_params(fixed, now, **padding(math.prod(w.shape[a] for a in axes), spec))
        value = self._rounded(blocked.astype(jnp.float32), now, scale, zero_point, moment)
        return to_logical(value).astype(w.dtype)

    def _rounded(self, x: jax.Array, spec: Any, scale: jax.Array, zero_point: jax.Array | None, moment: Moment) -> jax.Array:
        """Rounds float32 values on a grid that counts as a constant."""
        fixed = jax.lax.stop_gradient(x)
        steps = divide(fixed, scale)
        if self.random:
            draw = jax.random.uniform(moment.key, x.shape)  # pyright: ignore[reportArgumentType]  # `random` says that there is one
            zero = 0.0 if zero_point is None else zero_point.astype(jnp.float32)
            # A floating zero point moves the levels, and so what lies half-way between them.
            codes = jnp.floor(steps + zero + draw) if spec.float_zero else jnp.floor(steps + draw) + zero
            value = affine_decode(jnp.clip(codes, spec.qmin, spec.qmax), scale, zero_point)
        else:
            value = affine_decode(affine_encode(fixed, scale, zero_point, spec), scale, zero_point)
        mask = jnp.ones(x.shape, bool) if self.gradient == "passed" else _inside(steps, zero_point, spec)
        if not self.slope:
            return with_gradient(x, value, mask)
        return scaled_gradient(x, value, mask, self.slope * (steps - divide(value, scale)))

    def codes(self, problem: Problem, learned: Learned) -> Codes:
        del learned
        spec: Any = problem.spec
        if isinstance(spec.granularity, PerChannel) and not spec.by_mean:
            return _codes_of_rows(problem.w.astype(jnp.float32), spec, problem.axes)
        blocked, to_canonical, _ = logical_blocks(problem.w, spec, problem.axes, problem.stacked)
        real = padding(math.prod(problem.w.shape[a] for a in problem.axes), spec)
        scale, zero_point = affine_params(blocked, spec, **real)
        codes = to_canonical(affine_encode(blocked, scale, zero_point, spec))
        return Codes(codes, scale[..., 0], None if zero_point is None else zero_point[..., 0])

    def pack(self, problem: Problem, learned: Learned) -> QTensor:
        del learned
        return quantize(problem.w, problem.spec, problem.axes, problem.stacked, name=problem.name)

    def observer(self, act: ActSpec) -> Any:
        return act.observer or minmax()

    def from_data(self, state: Any, act: ActSpec) -> Learned:
        lo, hi = self.observer(act).range(state, act.spec)
        return {"lo": jnp.min(lo), "hi": jnp.max(hi)}

    def fake_activation(self, x: jax.Array, act: ActSpec, learned: Learned, moment: Moment, features: int) -> jax.Array:
        del features
        ends = jax.lax.stop_gradient((learned["lo"], learned["hi"]))
        if isinstance(act.spec, FloatSpec):
            scale = range_params(*ends, act.spec)[0].reshape((1,) * x.ndim)
            inside = jnp.abs(x.astype(jnp.float32)) <= scale * act.spec.largest
            value = round_activation(jax.lax.stop_gradient(x), act, (), scale)
            return with_gradient(x, value, jnp.ones(x.shape, bool) if self.gradient == "passed" else inside)
        now = at_bits(act.spec, moment)
        scale, zero_point = params_from_range(*ends, now)
        shape = (1,) * x.ndim
        zero_point = None if zero_point is None else zero_point.reshape(shape)
        return self._rounded(x.astype(jnp.float32), now, scale.reshape(shape), zero_point, moment).astype(x.dtype)

    def params(self, learned: Learned, act: ActSpec) -> tuple[jax.Array, jax.Array | None]:
        return range_params(learned["lo"], learned["hi"], act.spec)


def _codes_of_rows(w: jax.Array, spec: IntSpec, axes: tuple[int, ...]) -> Codes:
    """Of rows with a scale each: rounded where they lie, so that bytes are moved and not floats."""
    scale, zero_point = row_params(w, spec, axes)
    codes = affine_encode(w, scale, zero_point, spec).astype(jnp.int8 if spec.signed or spec.bits < 8 else jnp.uint8)
    codes = canonicalize(jax.lax.optimization_barrier(codes), axes)
    return Codes(codes, canonicalize(scale, axes), None if zero_point is None else canonicalize(zero_point, axes))


def _inside(steps: jax.Array, zero_point: jax.Array | None, spec: Any) -> jax.Array:
    """See `qjax.core.in_range`."""
    if spec.by_mean:
        return jnp.ones(steps.shape, bool)
    zero = 0.0 if zero_point is None else zero_point.astype(jnp.float32)
    beyond = 0.5 if spec.symmetric and spec.scale_rule == "half" else 0.0
    wider = 1.0 + float(jnp.finfo(spec.scale_dtype).eps)
    return (steps >= (spec.qmin - beyond - zero) * wider) & (steps <= (spec.qmax + beyond - zero) * wider)


def ste(gradient: Gradient = "clipped", slope: float = 0.0, rounding: Literal["nearest", "stochastic"] = "nearest") -> StraightThrough:
    """The straight-through estimator: rounds forward, passes the gradient backward; ranges are those of the data, not learned.

    dL/dx = dL/dx_q m (1 + slope sign(dL/dx_q) (x - x_q) / s),  m = [q_min <= x / s + z <= q_max] ("clipped") or 1 ("passed")

    Weights have ranges from their extreme values in every step; activations of a `qjax.static` spec those that `init` and `calibrate` find.

    Args:
      gradient: "clipped", zero where rounding clips (wider by half a step under `scale_rule="half"`, see `straight_through`); "passed"
        never is.
      slope: how much the gradient of a value is larger where it moves the value on towards where it was rounded from; 0 does not
        scale. Under it only reverse mode works.
      rounding: "nearest", or "stochastic": floor(x / s + u) with u uniform in 0 .. 1, so that the mean over draws is x; but for what a
        range clips, which under `scale_rule="half"` is the top half step: take "full" where the mean counts. The packed model rounds to
        nearest.

    Returns:
      An estimator for `Rule(train=...)`.

    Raises:
      TypeError: `slope` is no number.
      ValueError: an argument out of range.

    Example:
      >>> import qjax
      >>> qjax.Rule("*", weight=qjax.int4(), train=ste(rounding="stochastic"))
      Rule('*', weight=int4(per="channel"), train=StraightThrough(gradient='clipped', slope=0.0, rounding='stochastic'))

    Source: Bengio et al., arXiv 1308.3432; Jacob et al., arXiv 1712.05877; the slope: element-wise gradient scaling, Lee et al. 2021,
    arXiv 2104.00903, eq. 3, where distances are in units of the whole range, not of steps, and the slope follows the Hessian.
    """
    return StraightThrough(gradient, slope, rounding)
