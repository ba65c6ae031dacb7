"""`qat`: an estimator for weights, one for activations, rounded gradients and a schedule, together."""

from __future__ import annotations

import dataclasses
from typing import Any

from qjax.core import ActSpec, Spec
from qjax.policy import Rule, TrainsBeside
from qjax.training.estimator import ActivationEstimator, Decides, TracksRanges, WeightEstimator, check_estimators
from qjax.training.gradients import check_gradient
from qjax.training.schedule import Schedule
from qjax.training.straight_through import StraightThrough


@dataclasses.dataclass(frozen=True)
class QAT:
    """See `qat`."""

    weight: WeightEstimator = StraightThrough()  # noqa: RUF009  # frozen
    activation: ActivationEstimator = StraightThrough()  # noqa: RUF009  # frozen
    gradient: ActSpec | None = None
    schedule: Schedule = Schedule()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        for name, kind in (("weight", WeightEstimator), ("activation", ActivationEstimator)):
            if not isinstance(getattr(self, name), kind) or isinstance(getattr(self, name), type):
                raise TypeError(f"`{name}` must be an estimator of {name}s such as qjax.lsq(), got {getattr(self, name)!r}"
                                f"{_elsewhere(name, getattr(self, name))}")  # fmt: skip
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"`schedule` must be qjax.schedule(...), got {self.schedule!r}")
        if self.gradient is not None:
            check_gradient(self.gradient)

    @property
    def only_trains(self) -> str:
        return self.weight.only_trains or self.activation.only_trains

    @property
    def random(self) -> bool:
        """Whether it needs keys."""
        return self.weight.random or self.activation.random or self.gradient is not None

    @property
    def steps(self) -> bool:
        """Whether it needs the step."""
        return self.random or self.schedule.moves

    @property
    def ends(self) -> int:
        """The step from which a packed model computes what training does."""
        decided = self.schedule.freeze if isinstance(self.weight, Decides) else None
        return max(self.schedule.ends, decided or 0)

    def check(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> None:
        check_estimators(self.weight, self.activation, weight, activations)
        reasons = ["" if weight is None else self.schedule.refusal(weight)]
        reasons += [self.schedule.refusal(act.spec, activation=True) for act in activations]
        if weight is not None and isinstance(self.weight, Decides):
            reasons.insert(0, self.weight.refusal_of_schedule(self.schedule))
        reasons += [self._nothing_to_freeze(weight, activations), self._frozen_before(weight, activations)]
        reasons += [] if activations else [self._nothing_sets_in()]
        reasons += [self._nothing_static(activations)]
        for reason in filter(None, reasons):
            raise ValueError(f"`train`: {reason}")
        moves = self.schedule.activations or self.schedule.activation_bits
        if moves and any(not act.static and act.outliers is not None for act in activations):
            raise ValueError("`train`: activations with outlier columns cannot set in later or have other bits: leave "
                             "`activations` and `activation_bits` of the schedule out")

    def _frozen_before(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> str:
        """Why learned ranges would stand still before anything is rounded with them; "" if they do not."""
        when = self.schedule
        learned = {"weights": weight is not None and self.weight.learns,
                   "activations": self.activation.learns and any(act.static for act in activations)}  # fmt: skip
        for name in (name for name, learns in learned.items() if learns):
            first = getattr(when, name)
            if when.freeze is not None and when.freeze < first:
                return (f"`freeze`={when.freeze} of the schedule comes before `{name}`={first}, so that their ranges stand still before "
                        "anything is rounded with them, and never train: freeze at a later step, or leave `freeze` out")  # fmt: skip
        return ""

    def _nothing_sets_in(self) -> str:
        """Why what a schedule says of activations would change nothing in a rule without them; "" if it says nothing."""
        said = [f"`{name}`={getattr(self.schedule, name)}" for name in ("activations", "activation_bits") if getattr(self.schedule, name)]
        return "" if not said else (f"{' and '.join(said)} of the schedule changes nothing, for the rule has no `activation`: give it one, "
                                    "such as qjax.static(qjax.int8()), or leave that out of its schedule")  # fmt: skip

    def _nothing_static(self, activations: tuple[ActSpec, ...]) -> str:
        """Why an estimator of activations would do nothing; "" if it does, or is what stands there where none is given."""
        if self.activation == StraightThrough() or any(act.static for act in activations):
            return ""
        which = ", ".join(map(str, activations)) or "None"
        return (f"`activation` {self.activation!r} is for static activations, and the `activation` of the rule is {which}: give the rule "
                "one, such as qjax.static(qjax.int8()), or leave the estimator out of its qjax.qat(...)")  # fmt: skip

    def _nothing_to_freeze(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> str:
        """Why a freeze would change nothing; "" if it does, or there is none."""
        moves = self.activation.learns or isinstance(self.activation, TracksRanges)
        if self.schedule.freeze is None or (weight is not None and self.weight.learns) or (moves and any(a.static for a in activations)):
            return ""
        acts = [f"{act} by {self.activation.name}" for act in activations]
        what = ", ".join([f"weights by {self.weight.name}"] * (weight is not None) + acts)
        return (f"`freeze`={self.schedule.freeze} of the schedule has nothing to hold, for no range moves from step to step ({what}): "
                "leave `freeze` out, or train with qjax.lsq(), or static activations with qjax.moving_range()")  # fmt: skip


def _elsewhere(name: str, value: Any) -> str:
    """Where an estimator of the other kind belongs; "" for anything else."""
    other, kind = ("activation", ActivationEstimator) if name == "weight" else ("weight", WeightEstimator)
    fits = isinstance(value, kind) and not isinstance(value, type)
    return f", which is one of {other}s: give it as `{other}`" if fits else ""


def qat(
    weight: Any = StraightThrough(),  # noqa: B008  # frozen
    activation: Any = StraightThrough(),  # noqa: B008  # frozen
    *,
    gradient: ActSpec | None = None,
    schedule: Schedule = Schedule(),  # noqa: B008  # frozen
) -> QAT:
    """How a rule's numbers train, each by an estimator of its own.

    Args:
      weight: of the weights: `qjax.ste()`, `qjax.lsq()`, `qjax.dorefa()` or `qjax.adaround()`.
      activation: of static activations: `qjax.ste()` (ranges from data, which do not train), `qjax.moving_range()`, `qjax.lsq()` or
        `qjax.pact()`. Dynamic activations find their ranges in every call, and pass the gradient straight through.
      gradient: what the gradient of a site's result is rounded to, stochastically, before it goes on to both products of the backward
        pass, such as `qjax.dynamic(qjax.int8())` or floats, `qjax.dynamic(qjax.fp8_e5m2())`; None leaves it float.
      schedule: when things set in, see `qjax.schedule`.

    Returns:
      What `Rule(train=...)` takes.

    Raises:
      TypeError: an argument of the wrong kind.
      ValueError: gradients of another kind than dynamic signed integers or floats. `Rule` refuses what does not go with its specs.

    Example:
      >>> import qjax
      >>> train = qat(qjax.lsq(), qjax.pact(), schedule=qjax.schedule(activations=100))
      >>> qjax.Rule("*", weight=qjax.int4(), activation=qjax.static(qjax.uint4()), train=train).train.steps
      True
    """
    return QAT(weight, activation, gradient, schedule)


def training_of(rule: Rule | None) -> QAT:
    """How a rule trains; an estimator that stands alone is for all that it can train."""
    train: Any = None if rule is None else rule.train
    if isinstance(train, QAT):
        return train
    if isinstance(train, TrainsBeside):
        raise ValueError(f"`train` {train!r} is of adapters, which stand beside parameters that are frozen: use qjax.qlora(fn, policy)")
    weight = train if isinstance(train, WeightEstimator) else StraightThrough()
    return QAT(weight, train if isinstance(train, ActivationEstimator) else StraightThrough())
