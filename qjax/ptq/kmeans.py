"""k-means: a table of levels for each output, or for the tensor, weighted by the power of what the weight multiplies."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import ColumnPower
from qjax.core import Learned, LearnedSpec, QTensor, check_blocks, check_finite, learn
from qjax.core.learned import ITERATIONS
from qjax.core.specs import check_count, check_flag
from qjax.ptq.data import unseen_note
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.parts import check_not_cast, for_each_matrix, matrices, packed
from qjax.ptq.work import Work, matrix_sizes


@dataclasses.dataclass(frozen=True)
class KMeans:
    """See `kmeans`."""

    iterations: int = ITERATIONS
    weighted: bool = True

    @property
    def name(self) -> str:
        how = [] if self.iterations == ITERATIONS else [f"iterations={self.iterations}"]
        how += [] if self.weighted else ["weighted=False"]
        return f"kmeans({', '.join(how)})" if how else "kmeans"

    @property
    def observer(self) -> ColumnPower | None:
        return ColumnPower() if self.weighted else None

    def shapes(self, problem: Problem) -> QTensor:
        _checked(problem)
        return jax.eval_shape(lambda w: self._solved(problem._replace(w=w), None), problem.w)

    def quantize(self, problem: Problem, state: Any = None) -> Outcome:
        check_finite(problem.w, problem.name)
        notes = []
        if self.weighted and state is not None:
            notes.append(unseen_note(np.asarray(state.mean_square).any(-1), "its table counts all weights alike"))
        return Outcome(self._solved(problem, state), tuple(note for note in notes if note))

    def _solved(self, problem: Problem, state: Any) -> QTensor:
        spec = _checked(problem)
        power = jnp.zeros((1, matrix_sizes(problem)[2]), jnp.float32) if state is None else state.mean_square
        found = _learn(matrices(problem), for_each_matrix(problem, power)[:, None, :], spec, self.iterations)
        return packed(problem, found.codes, found.scale, None, levels=found.levels)

    def work(self, problem: Problem) -> Work:
        stack, n, k = matrix_sizes(problem)
        return Work(steps=float(stack * n * k) * (self.iterations + 1))


def kmeans(iterations: int = ITERATIONS, weighted: bool = True) -> KMeans:
    """k-means: fits the levels of a `qjax.learned(...)` spec to the weight.

    argmin over levels t of  sum_k h_k (w_k - t[c_k])^2,  c_k the nearest level,  h_k = E[x_k^2],

    over the weights of each table. h is the diagonal of GPTQ's Hessian up to a factor: the error of the output, if inputs were
    not correlated. Where more than one in a hundred weights is exactly zero, a level is 0; fewer are rounded, and the report says so.

    Args:
      iterations: Lloyd's steps after the dynamic program that the tables begin with.
      weighted: weigh by h, which needs calibration data; False counts all weights alike, which rounding to such a spec does.

    Returns:
      A method for `qjax.Rule` with a `weight` such as `qjax.learned(4)` or `qjax.learned(3, group_size=64)`; specs whose levels
      are fixed are refused.

    Raises:
      ValueError, TypeError: naming the argument.

    Example:
      >>> import qjax
      >>> qjax.Rule("*", weight=qjax.learned(3), method=kmeans())
      Rule('*', weight=learned(3, per="channel"), method=KMeans(iterations=20, weighted=True))

    Source: Kim et al., SqueezeLLM, arXiv 2306.07629, section 4.1. There h is the Fisher information of each weight, from gradients of the
    loss; here it is that of the layer's output, without a backward pass. The sparse outliers of its section 4.2 are not kept apart.
    The tables begin with the optimum over at most 256 runs of sorted weights, not with k-means++, and so are the same in every run.
    """
    check_count("iterations", iterations, 0)
    check_flag("weighted", weighted)
    return KMeans(iterations, weighted)


@functools.partial(jax.jit, static_argnames=("spec", "iterations"))
def _learn(w: jax.Array, importance: jax.Array, spec: LearnedSpec, iterations: int) -> Learned:
    return learn(w, importance, spec, iterations)


def _checked(problem: Problem) -> LearnedSpec:
    spec, name = problem.spec, problem.name
    check_not_cast(problem, "kmeans")
    if not isinstance(spec, LearnedSpec):
        bits = spec.bits if spec.bits in (2, 3, 4) else 4
        raise ValueError(f"`method` kmeans fits a table of levels, and those of {spec}, the spec of {name!r}, are fixed: give "
                         f"qjax.learned({bits}), or take qjax.gptq() or qjax.rtn(mse=True)")  # fmt: skip
    if problem.groups > 1 and not spec.per_row:
        raise ValueError(f"`weight` {spec} has one table for the grouped convolution {name!r}: give qjax.learned({spec.bits}), "
                         "a table for each of its channels")  # fmt: skip
    _, n, k = matrix_sizes(problem)
    check_blocks((n, k), spec, name)
    return spec
