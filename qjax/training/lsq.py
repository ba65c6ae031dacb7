"""Learned step sizes (LSQ), with a learned offset where there is a zero point (LSQ+)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import Rows, minmax
from qjax.core import (
    ActSpec,
    IntSpec,
    QTensor,
    Spec,
    affine_decode,
    affine_encode,
    affine_params,
    assemble,
    divide,
    logical_blocks,
)
from qjax.core.affine import mean_magnitude, round_scale
from qjax.core.layout import real_values
from qjax.core.rounding import checked
from qjax.core.specs import check_choice
from qjax.ptq.method import Problem
from qjax.ptq.range_search import search_range
from qjax.training.estimator import Codes, Learned, Moment, at_bits, check_estimators

_SMALLEST = float(np.finfo(np.float32).tiny)


def grid_of(scale: jax.Array, offset: jax.Array | None, spec: Any) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point that learned numbers stand for.

    A scale counts by its magnitude (an optimizer may step across 0 where scales are small: 8 bits), is rounded to `spec.scale_dtype`, and
    is at least float32's smallest normal number; `zero_point = round(-offset / scale)`, within the codes, not rounded where it is floating.

    Args:
      scale: float32.
      offset: float32 of the shape of `scale`, the number that code 0 stands for; None without a zero point.
      spec: an `IntSpec`, or one `at_bits`.

    Returns:
      (scale float32, zero_point int32, float32 or None).

    Example:
      >>> import qjax
      >>> [v.tolist() for v in grid_of(jnp.float32([0.5]), jnp.float32([-1.2]), qjax.uint4())]
      [[0.5], [2]]
    """
    scale = jnp.maximum(round_scale(jnp.abs(scale), spec.scale_dtype), _SMALLEST)
    if offset is None:
        return scale, None
    zero = divide(-offset, scale)
    if spec.float_zero:
        return scale, round_scale(zero, spec.zero_dtype)
    return scale, jnp.clip(jnp.round(zero), spec.qmin, spec.qmax).astype(jnp.int32)


def learned_round(x: jax.Array, scale: jax.Array, offset: jax.Array | None, factor: float | np.ndarray, spec: Any) -> jax.Array:
    """Rounds to a grid whose scale s and offset b are learned.

    x_q = (clip(round(x / s) + z, q_min, q_max) - z) s,  z = round(-b / s), and with v = x / s + z
    dx_q/dx = 1 where q_min < v < q_max, else 0
    dx_q/ds = factor * (round(x / s) - x / s where q_min < v < q_max, else q_min or q_max)
    dx_q/db = factor * (0 where q_min < v < q_max, else 1)
    Without an offset z is 0. A negative s counts as -s, and so does its gradient.

    Args:
      x: float32, any shape.
      scale: float32, broadcasts against `x`.
      offset: of the shape of `scale`, or None.
      factor: the scale of the gradients of both, 1 / sqrt(n q_max); a number, or an array that broadcasts against `x`.
      spec: an `IntSpec`, or one `at_bits`.

    Returns:
      float32, the shape of `x`.

    Example:
      >>> import qjax
      >>> by_scale = jax.jacfwd(lambda s: learned_round(jnp.float32([0.6, 9.0]), s, None, 1.0, qjax.int4()))(jnp.float32(1.0))
      >>> [round(v, 2) for v in by_scale.tolist()]
      [0.4, 7.0]

    Source: LSQ (Esser et al. 2020, arXiv 1902.08153), eq. 1 to 3 and section 2.2; LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576), eq. 5
    to 7, where the offset is not rounded to a multiple of the scale; integer products need that it is.
    """
    limits = jnp.float32(spec.qmin), jnp.float32(spec.qmax)

    # Limits and the two grids are arguments, for a rule may close over nothing that is traced.
    @jax.custom_jvp
    def run(x: jax.Array, scale: jax.Array, offset: Any, used: jax.Array, zero: Any, limits: Any) -> jax.Array:
        del scale, offset
        limited: Any = _WithLimits(spec, *limits)
        return affine_decode(affine_encode(x, used, zero, limited), used, zero)

    @run.defjvp
    def jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        x, given, _, used, zero, (least, most) = primals
        t_x, t_scale, t_offset = tangents[:3]
        steps = divide(x, used)
        moved = steps if zero is None else steps + zero.astype(jnp.float32)
        inside, above = (moved > least) & (moved < most), moved >= most
        whole = jnp.round(moved) - moved if spec.float_zero and zero is not None else jnp.round(steps) - steps
        by_scale = jnp.where(inside, whole, jnp.where(above, most, least))
        t = jnp.where(inside, t_x, 0.0) + factor * by_scale * jnp.where(given < 0, -t_scale, t_scale)
        if t_offset is not None:
            t = t + jnp.where(inside, 0.0, factor * t_offset)
        return run(*primals), t

    used, zero = grid_of(*jax.lax.stop_gradient((scale, offset)), spec)
    return run(x, scale, offset, used, zero, limits)


class _WithLimits:
    """A spec with the given limits."""

    def __init__(self, spec: Any, qmin: jax.Array, qmax: jax.Array):
        self.spec, self.qmin, self.qmax = spec, qmin, qmax

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)


class Size(NamedTuple):
    """Sums of magnitudes: float32 (stack,) both."""

    total: jax.Array
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class MeanSize:
    """Observes mean |x|.

    Example:
      >>> observer = MeanSize()
      >>> state = observer.update(observer.init(1, 2), Rows(jnp.array([[[1.0, -2.0], [0.0, 1.0]]])))
      >>> observer.mean(state).item()
      1.0
    """

    def init(self, stack: int, columns: int) -> Size:
        del columns
        return Size(jnp.zeros((stack,), jnp.float32), jnp.zeros((stack,), jnp.float32))

    def update(self, state: Size, rows: Rows) -> Size:
        each, width = jnp.sum(jnp.abs(rows.x), axis=2), float(rows.x.shape[2])
        if rows.owner is None:
            return Size(state.total + each.sum(1), state.count + width * rows.x.shape[1])
        mine = rows.owner[None] == jnp.arange(rows.experts, dtype=rows.owner.dtype)[:, None]
        return Size(state.total + jnp.where(mine, each, 0.0).sum(1), state.count + width * mine.sum(1).astype(jnp.float32))

    def merge(self, a: Size, b: Size) -> Size:
        return jax.tree.map(jnp.add, a, b)

    def mean(self, state: Size) -> jax.Array:
        """mean |x| of all parts together, a scalar."""
        return jnp.sum(state.total) / jnp.maximum(jnp.sum(state.count), 1.0)


@dataclasses.dataclass(frozen=True)
class LearnedStep:
    """See `lsq`."""

    start: Literal["mean", "extremes", "mse"] = "mean"

    def __post_init__(self) -> None:
        check_choice("start", self.start, ("mean", "extremes", "mse"))

    def check(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> None:
        check_estimators(self, self, weight, activations)

    @property
    def name(self) -> str:
        return "lsq"

    @property
    def only_trains(self) -> str:
        return "its scales are learned"

    @property
    def random(self) -> bool:
        return False

    @property
    def learns(self) -> bool:
        return True

    def refusal(self, spec: Spec) -> str:
        if not isinstance(spec, IntSpec) or spec.by_mean:
            return f"lsq learns the scales of integers, got {spec}: take a spec such as qjax.int4(), or qjax.ste()"
        return ""

    def refusal_of_activation(self, act: ActSpec) -> str:
        return self.refusal(act.spec)

    def init(self, problem: Problem) -> Learned:
        spec: Any = problem.spec
        blocked = logical_blocks(problem.w.astype(jnp.float32), spec, problem.axes, problem.stacked)[0]
        if self.start == "mean" and spec.symmetric:
            real = real_values(math.prod(problem.w.shape[a] for a in problem.axes), spec)
            return {"scale": 2 * mean_magnitude(blocked, real=real)[..., 0] / math.sqrt(spec.qmax)}
        scale, zero_point = search_range(blocked, spec) if self.start == "mse" else affine_params(blocked, spec)
        return self.adopt(scale[..., 0], None if zero_point is None else zero_point[..., 0].astype(jnp.float32))

    def adopt(self, scale: jax.Array, zero_point: jax.Array | None) -> Learned:
        return {"scale": scale} if zero_point is None else {"scale": scale, "offset": -zero_point * scale}

    def fake(self, problem: Problem, learned: Learned, moment: Moment) -> jax.Array:
        spec: Any = problem.spec
        w, axes, stacked = checked(problem.w, spec, problem.axes, problem.stacked, problem.name)
        blocked, _, to_logical = logical_blocks(w, spec, axes, stacked)
        real = real_values(math.prod(w.shape[a] for a in axes), spec)  # what pads a group is no weight that shares its scale
        count: Any = blocked.shape[-1] if real is None else real.sum(-1).reshape(*(1,) * (blocked.ndim - 2), -1, 1)
        value = _at(blocked.astype(jnp.float32), learned, spec, moment, count, lambda a: a[..., None])
        return to_logical(value).astype(w.dtype)

    def codes(self, problem: Problem, learned: Learned) -> Codes:
        spec: Any = problem.spec
        blocked, to_canonical, _ = logical_blocks(problem.w, spec, problem.axes, problem.stacked)
        scale, zero_point = grid_of(learned["scale"], learned.get("offset"), spec)
        codes = affine_encode(blocked, scale[..., None], None if zero_point is None else zero_point[..., None], spec)
        return Codes(to_canonical(codes), scale, zero_point)

    def pack(self, problem: Problem, learned: Learned) -> QTensor:
        w, axes, stacked = checked(problem.w, problem.spec, problem.axes, problem.stacked, problem.name)
        found, sizes = self.codes(problem, learned), [w.shape[a] for a in axes]
        return assemble(*found, problem.spec, axes, sizes, w.dtype, stacked=stacked, name=problem.name)

    def observer(self, act: ActSpec) -> Any:
        by_mean = self.start == "mean" and act.observer is None and act.spec.symmetric
        return MeanSize() if by_mean else act.observer or minmax()

    def from_data(self, state: Any, act: ActSpec) -> Learned:
        spec: Any = act.spec
        if isinstance(state, Size):
            return {"scale": 2 * MeanSize().mean(state) / math.sqrt(spec.qmax)}
        lo, hi = self.observer(act).range(state, spec)
        lo, hi = jnp.min(lo), jnp.max(hi)
        if spec.symmetric:
            return {"scale": jnp.maximum(-lo, hi) / (spec.qmax + (0.5 if spec.scale_rule == "half" else 0.0))}
        return {"scale": (hi - lo) / (spec.qmax - spec.qmin), "offset": lo - spec.qmin * ((hi - lo) / (spec.qmax - spec.qmin))}

    def fake_activation(self, x: jax.Array, act: ActSpec, learned: Learned, moment: Moment, features: int) -> jax.Array:
        value = _at(x.astype(jnp.float32), learned, act.spec, moment, features, lambda a: a.reshape((1,) * x.ndim))
        return value.astype(x.dtype)

    def params(self, learned: Learned, act: ActSpec) -> tuple[jax.Array, jax.Array | None]:
        return grid_of(learned["scale"], learned.get("offset"), act.spec)


def _at(x: jax.Array, learned: Learned, spec: Any, moment: Moment, count: int | np.ndarray, place: Any) -> jax.Array:
    """`learned_round` with the grid of this step: with more bits than the spec's, the range stays and steps are finer.

    `count` is the n of the gradient scale, or one for each block that broadcasts against `x`.
    """
    now = at_bits(spec, moment)
    scale, offset = learned["scale"], learned.get("offset")
    if moment.bits is not None:  # at the bits of the spec it is the scale itself: s 15 / 15 need not be s
        finer = scale * (spec.qmax - spec.qmin) / (now.qmax - now.qmin)
        scale = jnp.where(moment.bits == spec.bits, scale, finer)
    factor = 1 / math.sqrt(count * spec.qmax) if isinstance(count, int) else (1 / np.sqrt(count * spec.qmax)).astype(np.float32)
    return learned_round(x, place(scale), None if offset is None else place(offset), factor, now)


def lsq(start: Literal["mean", "extremes", "mse"] = "mean") -> LearnedStep:
    """Learned step sizes: the scale of each block of weights, and of static activations, is a parameter.

    v = (clip(round(w / s) + z, q_min, q_max) - z) s, with the gradients of `learned_round`: those of s and of the offset are
    multiplied by 1 / sqrt(n q_max), with n the weights that share a scale, or the values that one example has at the site.
    Specs with a zero point (`qjax.uint4()`) learn an offset too: LSQ+.

    Args:
      start: where scales begin. "mean": 2 mean |w| / sqrt(q_max), as published (with a zero point: extremes); at 8 bits that is
        coarse. "extremes": as rounding takes them. "mse": the least error of weights (`qjax.rtn(mse=True)`). Static activations begin with
        the range of their spec's observer, or without one under "mean" by the mean of the data that `init` is given.

    Returns:
      An estimator for `Rule(train=...)`: of the weights, and of static activations.

    Raises:
      ValueError: another `start`. `Rule` refuses specs that are no integers.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(), train=lsq())])
      >>> fq = qjax.fake_quant(lambda p, x: x @ p["w"], policy)
      >>> params, x = {"w": jnp.linspace(-1, 1, 8).reshape(4, 2)}, jnp.ones((1, 4))
      >>> quant = fq.init(jax.random.key(0), params, x)
      >>> jax.tree.map(jnp.shape, quant["weights"]), fq.labels(quant)["weights"]
      ({'w': {'scale': (2, 1)}}, {'w': {'scale': 'learned'}})

    Source: LSQ (Esser et al. 2020, arXiv 1902.08153); LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576). There one scale a layer, of n weights;
    here one for each block that the spec says, of the weights in it.
    """
    return LearnedStep(start)
