"""What the `freeze` of a schedule holds: copies of learned numbers, which stand still whatever an optimizer does to the numbers.

A gradient of zero does not stop a momentum, nor the decay of weights. So the state has an entry "held" with a copy of each learned number
that freezes, and from which step on: until then `advance` keeps the copies up to date, from then on the copies are what counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.training.estimator import LEARNED
from qjax.training.planned import Planned
from qjax.training.qat import training_of

FROM = "from"  # the step, beside the copies
_KINDS = ("weights", "activations", "products")


def held(plan: Planned, state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the learned numbers that freeze.

    Args:
      plan: what is rounded, and by which schedule.
      state: the state of its quantizers.

    Returns:
      Of each kind of entry that has any: by the same keys the arrays, and "from", float32.
    """
    copies: dict[str, Any] = {}
    for trained in plan.weights.values():
        for kind in ("weights", "activations"):
            path = trained.leaf.path
            entry = _copy(state.get(kind, {}).get(path, {}), trained.train.schedule.freeze)
            if entry:
                copies.setdefault(kind, {})[path] = entry
    for choice in plan.products:
        freeze, name = training_of(choice.rule).schedule.freeze, choice.product.name
        sides = {side: _copy(learned, freeze) for side, learned in state.get("products", {}).get(name, {}).items()}
        if any(sides.values()):
            copies.setdefault("products", {})[name] = {side: entry for side, entry in sides.items() if entry}
    return copies


def _copy(learned: Mapping[str, Any], freeze: int | None) -> dict[str, Any]:
    found = {} if freeze is None else {name: _own(value) for name, value in learned.items() if name in LEARNED}
    return found | {FROM: jnp.float32(freeze)} if found else {}


def standing(quant: dict[str, Any]) -> dict[str, Any]:
    """The state as a step computes with it: what is frozen is as its copy, and has no gradient."""
    if "held" not in quant:
        return quant
    copies = quant["held"]
    return {**quant, **{kind: _standing(quant[kind], copies[kind], quant["step"]) for kind in copies}}


def _standing(current: Mapping[str, Any], copies: Mapping[str, Any], step: jax.Array) -> dict[str, Any]:
    if not _is_entry(copies):
        return {key: _standing(value, copies[key], step) if key in copies else value for key, value in current.items()}
    frozen = step >= copies[FROM]

    def now(value: jax.Array, copy: jax.Array) -> jax.Array:
        each = frozen.reshape(frozen.shape + (1,) * (value.ndim - frozen.ndim))  # seeds may be stacked in front
        return jnp.where(each, jax.lax.stop_gradient(copy), value)

    return {name: now(value, copies[name]) if name in copies else value for name, value in current.items()}


def recorded(quant: dict[str, Any], kinds: Collection[str] = _KINDS) -> dict[str, Any]:
    """The state with copies of its numbers as they are now, of some kinds of entries."""
    if "held" not in quant:
        return quant
    copies = quant["held"]
    return {**quant, "held": {kind: _recorded(quant[kind], each) if kind in kinds else each for kind, each in copies.items()}}


def _recorded(current: Mapping[str, Any], copies: Mapping[str, Any]) -> dict[str, Any]:
    if _is_entry(copies):
        return {name: _own(current[name]) if name in current else value for name, value in copies.items()}
    return {key: _recorded(current[key], each) for key, each in copies.items()}


def _own(value: Any) -> Any:
    """An array of its own: a state is donated, and jax takes no buffer twice."""
    return value if isinstance(value, jax.ShapeDtypeStruct) else jnp.copy(value)


def _is_entry(copies: Mapping[str, Any]) -> bool:
    """Whether arrays stand here, and not entries by path: a path may well be "from"."""
    return not any(isinstance(each, Mapping) for each in copies.values())
