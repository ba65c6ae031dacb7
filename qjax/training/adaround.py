"""AdaRound: whether a weight is rounded up or down is learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import ActSpec, IntSpec, QTensor, Spec, affine_decode, affine_params, assemble, divide, logical_blocks
from qjax.core.rounding import checked
from qjax.core.specs import check_flag, check_number
from qjax.ptq.method import Problem
from qjax.ptq.range_search import search_range
from qjax.training.estimator import Learned, Moment
from qjax.training.freezing import standing
from qjax.training.schedule import Schedule

HIGH, LOW = 1.1, -0.1  # how far the sigmoid is stretched, so that 0 and 1 are reached


def soft_step(v: jax.Array) -> jax.Array:
    """h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), how far up a weight is rounded.

    Example:
      >>> soft_step(jnp.float32([-9.0, 0.0, 9.0])).tolist()
      [0.0, 0.5, 1.0]

    Source: AdaRound (Nagel et al. 2020, arXiv 2004.10568), eq. 23.
    """
    return jnp.clip(jax.nn.sigmoid(v) * (HIGH - LOW) + LOW, 0.0, 1.0)


@jax.custom_jvp
def _stepped(x: jax.Array, h: jax.Array, value: jax.Array, scale: jax.Array, inside: jax.Array) -> jax.Array:
    """`value`, whose gradient by `x` is 1 and by `h` the scale, where `inside`."""
    del x, h, scale, inside
    return value


@_stepped.defjvp
def _stepped_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    _, _, _, scale, inside = primals
    return _stepped(*primals), jnp.where(inside, tangents[0] + scale * tangents[1], 0.0)


@dataclasses.dataclass(frozen=True)
class AdaRound:
    """See `adaround`."""

    mse: bool = True

    def __post_init__(self) -> None:
        check_flag("mse", self.mse)

    def check(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> None:
        del weight, activations
        raise ValueError("`train` qjax.adaround() needs the step at which rounding is decided: write qjax.qat(qjax.adaround(), "
                         "schedule=qjax.schedule(freeze=1000))")  # fmt: skip

    def refusal_of_schedule(self, schedule: Schedule) -> str:
        if schedule.freeze is None:
            return "adaround decides at the `freeze` of its schedule: give schedule=qjax.schedule(freeze=...), such as 3 / 4 of the steps"
        return "adaround has one grid: leave `bits` of the schedule out" if schedule.bits else ""

    @property
    def name(self) -> str:
        return "adaround" if self.mse else "adaround(mse=False)"

    @property
    def only_trains(self) -> str:
        return "its rounding is learned"

    @property
    def random(self) -> bool:
        return False

    @property
    def learns(self) -> bool:
        return True

    def refusal(self, spec: Spec) -> str:
        if not isinstance(spec, IntSpec) or spec.by_mean or spec.float_zero:
            return f"adaround learns which whole number a weight becomes, got {spec}: take a spec such as qjax.int4(), or qjax.ste()"
        return ""

    def init(self, problem: Problem) -> Learned:
        spec: Any = problem.spec
        blocked, _, to_logical = logical_blocks(problem.w.astype(jnp.float32), spec, problem.axes, problem.stacked)
        scale, zero_point = search_range(blocked, spec) if self.mse else affine_params(blocked, spec)
        steps = divide(blocked, scale)
        part = to_logical(jnp.clip(steps - jnp.floor(steps), 1e-4, 1 - 1e-4))
        grid = {"grid": scale[..., 0]} | ({} if zero_point is None else {"origin": zero_point[..., 0].astype(jnp.float32)})
        return {"rounding": -jnp.log((HIGH - LOW) / (part - LOW) - 1.0), **grid}

    def fake(self, problem: Problem, learned: Learned, moment: Moment) -> jax.Array:
        spec: Any = problem.spec
        w, axes, stacked = checked(problem.w, spec, problem.axes, problem.stacked, problem.name)
        x, _, to_logical = logical_blocks(w.astype(jnp.float32), spec, axes, stacked)
        v = logical_blocks(learned["rounding"], spec, axes, stacked)[0]
        scale, zero = _grid(learned)
        soft, hard = soft_step(v), (v >= 0).astype(jnp.float32)
        up = hard if moment.frozen is None else jnp.where(moment.frozen, hard, soft)
        low, inside = _floor(x, scale, zero, spec)
        # A weight of zero stays zero, whatever was learned.
        up, inside = jnp.where(x == 0, 0.0, up), inside & (x != 0)
        codes = jax.lax.stop_gradient(jnp.clip(low + up, spec.qmin, spec.qmax))
        return to_logical(_stepped(x, up, affine_decode(codes, scale, zero), scale, inside)).astype(w.dtype)

    def pack(self, problem: Problem, learned: Learned) -> QTensor:
        spec: Any = problem.spec
        w, axes, stacked = checked(problem.w, spec, problem.axes, problem.stacked, problem.name)
        x, to_canonical, _ = logical_blocks(w.astype(jnp.float32), spec, axes, stacked)
        v = logical_blocks(learned["rounding"], spec, axes, stacked)[0]
        scale, zero = _grid(learned)
        up = jnp.where(x == 0, 0.0, (v >= 0).astype(jnp.float32))
        codes = jnp.clip(_floor(x, scale, zero, spec)[0] + up, spec.qmin, spec.qmax).astype(jnp.int32)
        sizes, zero = [w.shape[a] for a in axes], None if zero is None else zero[..., 0].astype(jnp.int32)
        return assemble(to_canonical(codes), scale[..., 0], zero, spec, axes, sizes, w.dtype, stacked=stacked, name=problem.name)


def _grid(learned: Learned) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of each block; both count as constants."""
    grid, origin = jax.lax.stop_gradient((learned["grid"], learned.get("origin")))
    return grid[..., None], None if origin is None else origin[..., None]


def _floor(x: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: Any) -> tuple[jax.Array, jax.Array]:
    """The code below, and whether both neighbours are codes."""
    low = jnp.floor(divide(jax.lax.stop_gradient(x), scale)) + (0.0 if zero is None else zero)
    return low, (low >= spec.qmin) & (low + 1 <= spec.qmax)


def adaround(mse: bool = True) -> AdaRound:
    """AdaRound: whether each weight is rounded up or down is learned, by a number of its own that ends at 0 or 1.

    w_q = s (clip(floor(w / s) + z + h(V), q_min, q_max) - z),  h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

    V begins where h(V) is the fraction of w / s, so that only what lies outside of the codes is moved at first. It is trained by optax
    beside the other learned numbers of the state (`fq.labels`), with a penalty in the loss that pushes h to 0 or 1
    (`qjax.training.rounding_penalty`). From the step `freeze` of the schedule on V stands still and h is 1 where V >= 0 and else 0, in the
    same compiled program, and so is it packed. The grid is that of the weights at `init` and stays. The gradient passes straight through to
    the weights, too; to learn the rounding alone, as the paper does, leave them out of the optimizer (`optax.set_to_zero`). A weight of
    zero stays zero.

    The state has two float32 numbers for each weight, V and the copy that will stand still; `qjax.autoround` learns such numbers after
    training, block by block.

    Args:
      mse: the grid of least squared error (`qjax.rtn(mse=True)`); False: of the extreme values.

    Returns:
      An estimator for `qjax.qat(weight=...)`, with `schedule=qjax.schedule(freeze=...)`.

    Raises:
      TypeError: `mse` is no bool. `Rule` refuses specs that are no integers, and a schedule without `freeze` or with `bits`.

    Example:
      >>> import qjax
      >>> train = qjax.qat(adaround(), schedule=qjax.schedule(freeze=100))
      >>> fq = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Policy([qjax.Rule("*", weight=qjax.int2(), train=train)]))
      >>> params, x = {"w": jnp.array([[0.4, -0.1], [0.25, 0.5]])}, jnp.eye(2)
      >>> quant = fq.init(jax.random.key(0), params, x)
      >>> fq(params, x, quant=quant).shape
      (2, 2)
      >>> fq.labels(quant)["weights"]
      {'w': {'grid': 'fixed', 'rounding': 'learned'}}

    Source: AdaRound (Nagel et al. 2020, arXiv 2004.10568), eq. 21 to 24. There each layer is reconstructed by itself; here whatever the
    loss is.
    """
    return AdaRound(mse)


def rounding_penalty(quant: Any, steps: int, warmup: float = 0.2, beta: tuple[float, float] = (20.0, 2.0)) -> jax.Array:
    """How far learned rounding is from being decided: sum(1 - |2 h(V) - 1|^beta) over all weights.

    beta falls from `beta[0]` to `beta[1]` by a cosine between `warmup` and the end, and so reaches first what is nearly decided, then the
    rest; before, the penalty is 0. A function of the state's step: nothing is compiled anew.

    Args:
      quant: the state of `qjax.fake_quant`, with rules that train by `qjax.adaround`.
      steps: at which it ends, the `freeze` of the schedule.
      warmup: the part of the steps without it.
      beta: at its begin and end.

    Returns:
      float32, a scalar, to be added to the loss times a weight (0.01 of a sum of squares in the paper).

    Raises:
      TypeError: an argument of another type.
      ValueError: the state has no learned rounding; `steps`, `warmup` or `beta` is out of range.

    Example:
      >>> quant = {"weights": {"w": {"rounding": jnp.float32([0.0, 9.0])}}, "step": jnp.float32(50)}
      >>> rounding_penalty(quant, 100).item()
      1.0

    Source: AdaRound (Nagel et al. 2020, arXiv 2004.10568), eq. 24 and section 4, settings of its experiments.
    """
    if not isinstance(quant, Mapping):
        raise TypeError(f"`quant` must be the state that fq.init gives, got {type(quant).__name__}")
    check_number("steps", steps, positive=True)
    check_number("warmup", warmup, below=1)
    if not isinstance(beta, tuple) or len(beta) != 2:
        raise TypeError(f"`beta` must be two numbers, at the begin and the end, such as (20.0, 2.0), got {beta!r}")
    for value in beta:
        check_number("beta", value, positive=True)
    learned = [each["rounding"] for each in standing(dict(quant)).get("weights", {}).values() if "rounding" in each]
    if not learned:
        raise ValueError("`quant` has no learned rounding: give a rule train=qjax.qat(qjax.adaround(), schedule=qjax.schedule(freeze=...))")
    if "step" not in quant:
        raise ValueError("`quant` has no step: give the whole state that fq.init gives")
    at = jax.lax.stop_gradient(quant["step"]) / steps
    rest = jnp.clip((at - warmup) / (1 - warmup), 0.0, 1.0)
    now = beta[1] + 0.5 * (beta[0] - beta[1]) * (1 + jnp.cos(math.pi * rest))
    total = jnp.stack([jnp.sum(1 - jnp.abs(2 * soft_step(v) - 1) ** now) for v in learned]).sum()
    return jnp.where(at < warmup, 0.0, total)
