"""When rounding sets in, how many bits there are, and when ranges stand still: pure functions of the step."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import IntSpec, Spec
from qjax.core.specs import as_count


@dataclasses.dataclass(frozen=True)
class Schedule:
    """See `schedule`."""

    weights: int = 0
    activations: int = 0
    freeze: int | None = None
    bits: tuple[tuple[int, int], ...] = ()
    activation_bits: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "freeze"):
            value = getattr(self, name)
            if value is not None or name != "freeze":
                object.__setattr__(self, name, as_count(name, value, 0))
        for name in ("bits", "activation_bits"):
            object.__setattr__(self, name, _checked_bits(name, getattr(self, name)))

    @property
    def moves(self) -> bool:
        """Whether anything depends on the step."""
        return self != Schedule()

    @property
    def ends(self) -> int:
        """The step from which weights and activations are rounded to the bits of their specs."""
        return max(self.weights, self.activations, *(step for step, _ in (*self.bits, *self.activation_bits)))

    def refusal(self, spec: Spec, activation: bool = False) -> str:
        """Why a spec, of weights or of activations, cannot follow `bits` or `activation_bits`; "" if it can."""
        name, pairs = ("activation_bits", self.activation_bits) if activation else ("bits", self.bits)
        if not pairs:
            return ""
        if not isinstance(spec, IntSpec) or spec.by_mean:
            return f"`{name}` of the schedule are for integers, got {spec}: leave them out"
        if pairs[-1][1] != spec.bits:
            return f"`{name}` of the schedule end at {pairs[-1][1]} and the spec is {spec}: end at its bits, {spec.bits}"
        return ""

    def bits_at(self, step: jax.Array, activation: bool = False) -> jax.Array | None:
        """How many bits weights, or activations, have, int32; None: always those of the spec."""
        pairs = self.activation_bits if activation else self.bits
        if not pairs:
            return None
        now = jnp.int32(pairs[0][1])
        for first, bits in pairs[1:]:
            now = jnp.where(step >= first, jnp.int32(bits), now)
        return now


def _checked_bits(name: str, pairs: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(pairs, tuple) or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise TypeError(f"`{name}` must be a tuple of pairs (step, bits) such as ((0, 8), (500, 4)), got {pairs!r}")
    if any(isinstance(value, bool) or not isinstance(value, int | np.integer) for pair in pairs for value in pair):
        raise TypeError(f"`{name}` must hold whole numbers, pairs (step, bits) such as ((0, 8), (500, 4)), got {pairs!r}")
    pairs = tuple((int(step), int(bits)) for step, bits in pairs)
    steps = [step for step, _ in pairs]
    if pairs and (steps[0] != 0 or any(b <= a for a, b in itertools.pairwise(steps))):
        raise ValueError(f"`{name}` must begin at step 0 and name later steps after it, got {pairs!r}")
    if any(not 2 <= bits <= 8 for _, bits in pairs):
        raise ValueError(f"`{name}` must name 2 to 8 bits, got {pairs!r}")
    return pairs


def schedule(
    weights: int = 0,
    activations: int = 0,
    freeze: int | None = None,
    bits: tuple[tuple[int, int], ...] = (),
    activation_bits: tuple[tuple[int, int], ...] = (),
) -> Schedule:
    """What changes while training: pure functions of the state's step, so that one compiled program serves all of it.

    Args:
      weights: the step from which weights are rounded.
      activations: the step from which activations are.
      freeze: the step from which learned and followed ranges stand still; None: never. In this step and all later ones they are, bit for
        bit, what the updates of the steps before it have made of them, and 0 what they began with: they have no gradient, and what a
        momentum or a decay of weights still adds to them does not count, and is undone by `fq.advance`.
      bits: how many bits weights have from a step on, ((0, 8), (500, 4)): the last are those of the spec. Under learned scales
        more bits divide the same range more finely.
      activation_bits: the same for the activations, dynamic, static or learned, and for the operands of a product of two.

    Returns:
      A `Schedule` for `qjax.qat(schedule=...)`.

    Raises:
      TypeError, ValueError: naming the argument.

    Example:
      >>> plan = schedule(activations=100, bits=((0, 8), (500, 4)))
      >>> plan.bits_at(jnp.float32(499)).item(), plan.bits_at(jnp.float32(500)).item(), plan.ends
      (8, 4, 500)
    """
    return Schedule(weights, activations, freeze, bits, activation_bits)
