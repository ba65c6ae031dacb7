"""The interface that every post-training method implements."""

from __future__ import annotations

from collections.abc import Iterator
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
      pruned: of shapes alone, to price them: whether the weight is known to be pruned (see `qjax.ptq.sparsity`).
    """

    w: jax.Array
    spec: Spec
    axes: tuple[int, ...]
    stacked: tuple[int, ...]
    groups: int
    name: str
    shared: tuple[int, ...] = ()
    pruned: bool = False


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


def methods_of(method: Any) -> Iterator[Any]:
    """A method and, one after the other, those that it hands the rounding over to: what any of them does, the packed weight has.

    Example:
      >>> import qjax
      >>> [each.name for each in methods_of(qjax.low_rank(2, then=qjax.online_rotation(qjax.gptq())))]
      ['low_rank(2, then=online_rotation(gptq))', 'online_rotation(gptq)', 'gptq']
    """
    while method is not None:
        yield method
        method = getattr(method, "then", None)


def needs_float(method: Any) -> bool:
    """Whether a method, or one that follows it, compares with the float program."""
    return any(isinstance(each, ComparesWithFloat) and each.needs_float for each in methods_of(method))


@runtime_checkable
class FillsZeros(Protocol):
    """A method that cannot keep exact zeros beside other weights of the same output."""

    @property
    def fills_zeros(self) -> bool:
        """Whether it cannot."""
        ...


def fills_zeros(method: Any) -> bool:
    """Whether a method, or one that follows it, turns exact zeros into other numbers."""
    return any(isinstance(each, FillsZeros) and each.fills_zeros for each in methods_of(method))


@runtime_checkable
class Refuses(Protocol):
    """A method that cannot serve every parameter, whatever its spec."""

    def refusal(self, leaf: Leaf) -> str:
        """Says why it cannot quantize this parameter; "" if it can."""
        ...


def refusal(method: Any, leaf: Leaf) -> str:
    """Why a method, or one that follows it, cannot quantize a parameter; "" if it can."""
    reasons = (each.refusal(leaf) for each in methods_of(method) if isinstance(each, Refuses))
    return next(filter(None, reasons), "")
