"""Static activations whose ranges are moving averages of those of the batches in training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration import minmax
from qjax.core import ActSpec, Spec
from qjax.core.specs import check_number
from qjax.training.estimator import Learned, Moment, check_estimators
from qjax.training.straight_through import StraightThrough

_BASE = StraightThrough()


@dataclasses.dataclass(frozen=True)
class MovingRange:
    """See `moving_range`."""

    decay: float = 0.99

    def __post_init__(self) -> None:
        check_number("decay", self.decay, below=1)
        object.__setattr__(self, "decay", float(self.decay))

    def check(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> None:
        if not any(act.static for act in activations):
            raise ValueError(f"`train` {self!r} is for static activations: give `activation`, such as qjax.static(qjax.int8())")
        check_estimators(_BASE, self, weight, activations)

    @property
    def name(self) -> str:
        return f"moving_range({self.decay:g})"

    @property
    def only_trains(self) -> str:
        return ""

    @property
    def random(self) -> bool:
        return False

    @property
    def learns(self) -> bool:
        return False

    def refusal_of_activation(self, act: ActSpec) -> str:
        return _BASE.refusal_of_activation(act)

    def observer(self, act: ActSpec) -> Any:
        return act.observer or minmax()

    def from_data(self, state: Any, act: ActSpec) -> Learned:
        return _BASE.from_data(state, act)

    def track(self, x: jax.Array, learned: Learned, moment: Moment) -> Learned:
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        seen, new = {"lo": jnp.min(x), "hi": jnp.max(x)}, {}
        # A batch that is not finite leaves no trace.
        usable = jnp.isfinite(seen["lo"]) & jnp.isfinite(seen["hi"])
        for name, value in seen.items():
            old = jax.lax.stop_gradient(learned[name])
            moved = jnp.where(jnp.isnan(old), value, self.decay * old + (1 - self.decay) * value)
            still = ~usable if moment.frozen is None else ~usable | (moment.frozen & ~jnp.isnan(old))
            new[name] = jnp.where(still, old, moved)
        return new

    def fake_activation(self, x: jax.Array, act: ActSpec, learned: Learned, moment: Moment, features: int) -> jax.Array:
        return _BASE.fake_activation(x, act, learned, moment, features)

    def params(self, learned: Learned, act: ActSpec) -> tuple[jax.Array, jax.Array | None]:
        return _BASE.params(learned, act)


def moving_range(decay: float = 0.99) -> MovingRange:
    """Static activations with ranges that follow the batches of training, each site's its own.

    lo <- decay lo + (1 - decay) min(x),  hi <- decay hi + (1 - decay) max(x),  the first batch sets both;
    x is rounded with the new range, and the gradient passes straight through within it. From `qjax.schedule(freeze=...)` on ranges stand
    still, within the same compiled program.

    Ranges move in `fq.tracked(params, *inputs, quant=quant)`, which returns them beside the result; `fq(params, *inputs, quant=quant)` uses
    them as they are. Of modules they move in `model.apply(variables, x, mutable=["quant"])` (Linen) and `qjax.nnx.tracked(model, x)`.
    Weights of the same rule train straight through; see `qjax.qat` for another estimator.

    Args:
      decay: how much stays of what was; 1 / (1 - decay) steps are remembered.

    Returns:
      An estimator for `Rule(train=...)`.

    Raises:
      TypeError: `decay` is no number.
      ValueError: `decay` is not in 0 .. 1, 1 excluded. `Rule` refuses activations that are not static.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> rule = qjax.Rule("*", weight=qjax.int8(), activation=qjax.static(qjax.int8()), train=moving_range(0.5))
      >>> fq = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Policy([rule]))
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.array([[-1.0, 3.0]])
      >>> quant = fq.init(jax.random.key(0), params, x)
      >>> out, quant = fq.tracked(params, 3 * x, quant=quant)
      >>> jax.tree.map(jnp.ravel, quant["activations"]["w"])
      {'hi': Array([6.], dtype=float32), 'lo': Array([-3.], dtype=float32)}

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.1. There ranges set in late; see `activations` of `qjax.schedule`.
    """
    return MovingRange(decay)
