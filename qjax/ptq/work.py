"""How much there is to compute: counted from shapes, for estimates of time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

from qjax.calibration import columns
from qjax.program import Leaf, Program, Site, compat
from qjax.ptq.method import Problem

STEP = 40  # floating-point operations that one step is worth where nothing was measured: it has an exp, a log and divisions


class Work(NamedTuple):
    """Attributes:
    products: floating-point operations in matrix products, a multiplication and an addition counted as two.
    steps: values rounded and compared with what they were, once for each candidate of a search.
    """

    products: float = 0.0
    steps: float = 0.0

    def plus(self, other: Work) -> Work:
        """The work of both."""
        return Work(self.products + other.products, self.steps + other.steps)

    def times(self, n: float) -> Work:
        """The work of `n` such."""
        return Work(self.products * n, self.steps * n)

    @property
    def weight(self) -> float:
        """One number, for shares of a whole."""
        return self.products + STEP * self.steps


@runtime_checkable
class Priced(Protocol):
    """A method that says how much it computes; of others only the observation is counted."""

    def work(self, problem: Problem) -> Work:
        """What `quantize` computes, from shapes alone."""
        ...


def work_of(method: Any, problem: Problem) -> Work:
    """What a method computes for a weight; one rounding of each value where it does not say."""
    return method.work(problem) if isinstance(method, Priced) else Work(steps=math.prod(problem.w.shape))


def matrix_sizes(problem: Problem) -> tuple[int, int, int]:
    """(stack, N, K) of `qjax.ptq.parts.matrices`, from shapes."""
    shape = problem.w.shape
    stack = math.prod(shape[a] for a in problem.stacked) * problem.groups
    k = math.prod(shape[a] for a in problem.axes)
    return stack, math.prod(shape) // max(stack * k, 1), k


def rows_seen(site: Site, leaf: Leaf) -> int:
    """Rows of activations that one call of a site reads, over all its parts (of a convolution: windows)."""
    if site.op == "conv_general_dilated":
        return math.prod(site.out_shape) // max(math.prod(leaf.shape[a] for a in site.kept), 1) * site.groups
    return math.prod(site.x_shape) // max(columns(site, leaf), 1)


def forward(program: Program) -> float:
    """Floating-point operations of the products and convolutions of one run; a loop of unknown length counts once."""
    return _flops(program.jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for eqn in compat.parts(jaxpr)[0].eqns:
        name = eqn.primitive.name
        if name in ("dot_general", "ragged_dot_general"):
            x = eqn.invars[0].aval.shape
            contracted = _contracted(eqn)
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(x[a] for a in contracted)
        elif name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / max(kernel[spec[0]], 1)
        inner = [_flops(program) for _, program in compat.subprograms(eqn)]
        if inner:
            total += (max(inner) if name == "cond" else sum(inner)) * (eqn.params["length"] if name == "scan" else 1)
    return total


def _contracted(eqn: Any) -> Any:
    numbers = eqn.params.get("dimension_numbers")
    if eqn.primitive.name == "ragged_dot_general":
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return numbers[0][0]
