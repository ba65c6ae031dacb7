"""The interface of what trains through rounding: an estimator for weights, one for activations, and what both are told of the step."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from qjax.calibration import Observer
from qjax.core import ActSpec, IntSpec, QTensor, Spec
from qjax.core.elements import power_of_two
from qjax.ptq.method import Problem

Learned = dict[str, jax.Array]
LEARNED = ("scale", "offset", "alpha", "rounding")  # what of it an optimizer trains; other names are found once, or from data


class Codes(NamedTuple):
    """What a weight is rounded to: integers (kept..., Kpad); scale and zero point (kept-like..., G), the second None without one."""

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None


class Moment(NamedTuple):
    """What the step decides, all of it traced.

    Attributes:
      key: a random key of this site and step, or None where nothing is random.
      bits: int32, how many bits there are now; None: those of the spec.
      frozen: bool, whether ranges stand still; None: they never do. Learned numbers are held in front of an estimator; this is for what
        it decides or tracks itself.
    """

    key: jax.Array | None = None
    bits: jax.Array | None = None
    frozen: jax.Array | None = None


@runtime_checkable
class WeightEstimator(Protocol):
    """How weights train through their rounding. Frozen and hashable; what it learns is in `Learned`, a dict of float32 arrays."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def only_trains(self) -> str:
        """Why rounding after training cannot stand for it; "" if it can."""
        ...

    @property
    def random(self) -> bool:
        """Whether it needs a key."""
        ...

    @property
    def learns(self) -> bool:
        """Whether what it learns is for an optimizer to train, by the names in `LEARNED`."""
        ...

    def refusal(self, spec: Spec) -> str:
        """Why it cannot train weights of this spec, and what can; "" if it can."""
        ...

    def init(self, problem: Problem) -> Learned:
        """What it learns, at the beginning; {} if nothing."""
        ...

    def fake(self, problem: Problem, learned: Learned, moment: Moment) -> jax.Array:
        """The rounded weight, of the shape and dtype of `problem.w`, with the estimator's gradient."""
        ...

    def pack(self, problem: Problem, learned: Learned) -> QTensor:
        """The packed weight, whose numbers are those of `fake` to the bit once schedules are over and nothing is random."""
        ...


@runtime_checkable
class ActivationEstimator(Protocol):
    """How static activations train through their rounding: one range a site, scalars inside of `Learned`."""

    @property
    def name(self) -> str: ...

    @property
    def only_trains(self) -> str: ...

    @property
    def random(self) -> bool: ...

    @property
    def learns(self) -> bool: ...

    def refusal_of_activation(self, act: ActSpec) -> str:
        """Why it cannot train activations of this spec, and what can; "" if it can."""
        ...

    def observer(self, act: ActSpec) -> Observer[Any]:
        """What looks at the data from which ranges begin."""
        ...

    def from_data(self, state: Any, act: ActSpec) -> Learned:
        """What it learns, at the beginning, from the observer's state of one site: scalars, 0 where no data came."""
        ...

    def fake_activation(self, x: jax.Array, act: ActSpec, learned: Learned, moment: Moment, features: int) -> jax.Array:
        """The rounded activation, of the shape and dtype of `x`; `features` is how many values one example has."""
        ...

    def params(self, learned: Learned, act: ActSpec) -> tuple[jax.Array, jax.Array | None]:
        """Scale float32 and zero point int32 or None as a packed weight holds them; any shape."""
        ...


@runtime_checkable
class RoundsToCodes(Protocol):
    """An estimator of weights whose forward products may run on integers: those of its codes are known in every step."""

    def codes(self, problem: Problem, learned: Learned) -> Codes:
        """What `fake` rounds to once schedules are over and nothing is random, without a gradient, of an `IntSpec`."""
        ...


@runtime_checkable
class BeginsPacked(Protocol):
    """An estimator of weights that can go on from the scales of a packed weight."""

    def adopt(self, scale: jax.Array, zero_point: jax.Array | None) -> Learned:
        """What it has learned when its grid is that of these float32 arrays."""
        ...


@runtime_checkable
class Decides(Protocol):
    """An estimator of weights whose rounding is decided at the `freeze` of the schedule."""

    def refusal_of_schedule(self, schedule: Any) -> str:
        """Why it cannot follow a `Schedule`, and what it can; "" if it can."""
        ...


@runtime_checkable
class TracksRanges(Protocol):
    """An estimator of static activations whose ranges follow the data of training."""

    def track(self, x: jax.Array, learned: Learned, moment: Moment) -> Learned:
        """The ranges after activations `x`, without a gradient; `learned` holds NaN before the first of them."""
        ...


class AtBits:
    """An `IntSpec` whose limits are traced: what reads a spec's attributes reads these.

    Example:
      >>> import qjax
      >>> at = AtBits(qjax.int4(), jnp.int32(8))
      >>> at.qmin.item(), at.qmax.item(), at.scale_rule
      (-128.0, 127.0, 'half')
    """

    def __init__(self, spec: IntSpec, bits: jax.Array):
        self.spec = spec
        full = power_of_two(bits) if not spec.signed else power_of_two(bits - 1)
        narrow = float(spec.symmetric and spec.scale_rule != "half")
        self.qmax = full - 1.0
        self.qmin = narrow - full if spec.signed else jnp.zeros_like(full)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)


def at_bits(spec: IntSpec, moment: Moment) -> Any:
    """The spec as this step has it."""
    return spec if moment.bits is None else AtBits(spec, moment.bits)


@jax.custom_jvp
def with_gradient(x: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """`value`, whose gradient by `x` is `mask` and by anything else zero.

    Example:
      >>> jax.grad(lambda x: with_gradient(x, jnp.round(x), jnp.abs(x) < 1))(0.4).item()
      1.0
    """
    del x, mask
    return value


@with_gradient.defjvp
def _with_gradient_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, value, mask = primals
    t = tangents[0].astype(value.dtype)
    return with_gradient(x, value, mask), jnp.where(mask, t, jnp.zeros_like(t))


def check_estimators(weight: Any, activation: Any, spec: Spec | None, activations: tuple[ActSpec, ...]) -> None:
    """Refuses specs that estimators cannot train.

    Args:
      weight: the estimator of weights.
      activation: that of static activations; dynamic ones have ranges of their own.
      spec: what weights become, or None.
      activations: what activations become.

    Raises:
      ValueError: naming the estimator, the spec and what to write.
    """
    reasons = [weight.refusal(spec)] if spec is not None else []
    reasons += [activation.refusal_of_activation(act) for act in activations if act.static]
    for reason in filter(None, reasons):
        raise ValueError(f"`train` {reason}")
