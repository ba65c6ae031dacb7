"""The interface that every post-training method implements."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from qjax.calibration import Observer
from qjax.core import QTensor, Spec
from qjax.program import Leaf


class Problem(NamedTuple):
    """One weight, or one layer of a stack of weights, to quantize.

    Attributes:
      w: the float weight, logical shape.
      spec: what it is to become.
      axes: its contracted axes, negative.
      stacked: its axes that hold independent parts (experts), negative.
      shared: those of the stacked axes whose parts share one set of statistics (layers that a loop picks by a traced index).
      groups: `feature_group_count`: the last kept axis splits into this many independent parts.
      name: its path, for errors.
    """

    w: jax.Array
    spec: Spec
    axes: tuple[int, ...]
    stacked: tuple[int, ...]
    groups: int
    name: str
    shared: tuple[int, ...] = ()


class Outcome(NamedTuple):
    """What a method made of a `Problem`: the packed weight, and remarks for the report."""

    q: QTensor
    notes: tuple[str, ...] = ()


@runtime_checkable
class Method(Protocol):
    """A way to choose the codes of a weight.

    A method is a frozen dataclass of its options, built by a function of its name (`qjax.gptq(act_order=True)`).
    """

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    @property
    def observer(self) -> Observer[Any] | None:
        """What it needs to know of the activations that reach the weight; None: nothing."""
        ...

    def shapes(self, problem: Problem) -> QTensor:
        """Says what `quantize` will store, from shapes alone.

        Args:
          problem: the weight; `w` may be a `jax.ShapeDtypeStruct`.

        Returns:
          A `QTensor` of `jax.ShapeDtypeStruct`s.

        Raises:
          ValueError: the weight cannot be quantized like this; naming it.
        """
        ...

    def quantize(self, problem: Problem, state: Any) -> Outcome:
        """Chooses the codes.

        Args:
          problem: the weight.
          state: the observer's state, with a leading axis over the weight's independent parts; None if no data reached it.

        Returns:
          The packed weight and remarks.
        """
        ...


@runtime_checkable
class ComparesWithFloat(Protocol):
    """A method that also wants to know what the float program makes of the same data."""

    @property
    def needs_float(self) -> bool:
        """Whether it does: then `Rows.reference` of what its observer is given holds the rows of the float program."""
        ...


def needs_float(method: Any) -> bool:
    """Whether a method compares with the float program."""
    return isinstance(method, ComparesWithFloat) and method.needs_float


@runtime_checkable
class Refuses(Protocol):
    """A method that cannot serve every parameter, whatever its spec."""

    def refusal(self, leaf: Leaf) -> str:
        """Says why it cannot quantize this parameter; "" if it can."""
        ...


def refusal(method: Any, leaf: Leaf) -> str:
    """Why a method, or one that follows it, cannot quantize a parameter; "" if it can."""
    mine = method.refusal(leaf) if isinstance(method, Refuses) else ""
    then = getattr(method, "then", None)
    return mine or ("" if then is None else refusal(then, leaf))
