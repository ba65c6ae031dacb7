"""GPTQ as a method: from a weight of any shape and its Hessians to a packed weight."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import SecondMoment, hessian
from qjax.core import CastSpec, LearnedSpec, PerBlock, PerTensor, QTensor, check_blocks
from qjax.ptq.gptq_solver import GPTQOptions, Solution, check_solved, solve
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.parts import axes_order, for_each_matrix, matrices, packed
from qjax.ptq.range_search import SHRINK
from qjax.ptq.work import Work, matrix_sizes


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """See `gptq`."""

    options: GPTQOptions

    @property
    def name(self) -> str:
        changed, usual = [], gptq().options
        for field in dataclasses.fields(self.options):
            value = getattr(self.options, field.name)
            if value != getattr(usual, field.name):
                changed.append(field.name if value is True else f"{field.name}={value}")
        return f"gptq({', '.join(changed)})" if changed else "gptq"

    @property
    def observer(self) -> SecondMoment:
        return SecondMoment()

    def shapes(self, problem: Problem) -> QTensor:
        _check(problem, self.options)

        def solved(w: jax.Array) -> QTensor:
            laid_out = matrices(problem._replace(w=w))
            k = laid_out.shape[2]
            solution = _solve(laid_out, jnp.zeros((1, k, k), jnp.float32), problem, self.options)
            return packed(problem._replace(w=w), *_arrays(solution))

        return jax.eval_shape(solved, problem.w)

    def quantize(self, problem: Problem, state: Any) -> Outcome:
        _check(problem, self.options)
        w = matrices(problem)
        solution = _solve(w, hessian(state), problem, self.options)
        check_solved(solution, problem.name)
        notes = (*_few_rows(np.asarray(state.count), w.shape[2]), *_notes(solution, w.shape[2], w.shape[0] > 1))
        return Outcome(packed(problem, *_arrays(solution)), notes)

    def work(self, problem: Problem) -> Work:
        stack, n, k = matrix_sizes(problem)
        # Cholesky, the updates of the columns still to come, and the groups' ranges.
        return Work(k**3 / 3 + 2.0 * n * k * k, n * k * (len(SHRINK) if self.options.mse else 1)).times(stack)


def gptq(
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
    mse: bool = True,
) -> GPTQ:
    """GPTQ: rounds column by column and lets the columns still to come make up for the error.

    Minimises |X w - X w_hat|^2 over the calibration data through H = 2/n X^T X, sites in data-flow order, each on the activations
    of the already quantized sites before it.

    Args:
      damping: share of the mean of diag(H) added to the diagonal; raised step by step, and reported, where the
        factorization fails.
      act_order: quantize the columns with the largest diag(H) first. Better; a permutation is stored unless
        `static_groups`.
      static_groups: fix every group's range before anything is rounded, so no permutation is needed at run time.
      block_size: columns between two lazy updates; speed only.
      mse: choose ranges by search (see `rtn`); False takes them from the extreme values, as the paper does.

    Returns:
      A method for `qjax.Rule`. Needs calibration data.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> import qjax
      >>> rule = qjax.Rule("*", weight=qjax.int4(group_size=128), method=qjax.gptq(act_order=True, static_groups=True))

    Source: Frantar et al., arXiv 2210.17323, and the authors' code; see `gptq_solver.solve` for where we differ. Range
    search is off by default in both and in gptqmodel; on the shipped model it closes two thirds of the gap that rounding leaves,
    in place of a half (`experiments/gptq_model`), so here it is on.
    """
    return GPTQ(GPTQOptions(damping, act_order, static_groups, block_size, mse))


def _solve(w: jax.Array, h: jax.Array, problem: Problem, options: GPTQOptions) -> Solution:
    """Solves a stack of matrices (stack, N, K)."""
    if w.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], solve(w[0], h[0], problem.spec, options))
    return _solve_many(w, for_each_matrix(problem, h), problem.spec, options)


_solve_many = jax.jit(
    lambda w, h, spec, options: jax.vmap(lambda w, h: solve(w, h, spec, options))(w, h), static_argnums=(2, 3)
)


def _check(problem: Problem, options: GPTQOptions) -> None:
    spec = problem.spec
    if isinstance(spec, CastSpec):
        raise ValueError(f"`method` gptq has nothing to choose for the cast {spec} of {problem.name!r}; leave `method` out")
    if isinstance(spec, LearnedSpec):
        raise ValueError(
            f"`method` gptq rounds to a grid that is known before, and the table of {spec}, the spec of {problem.name!r}, is learned: "
            "take qjax.kmeans(), or a table such as qjax.nf4()"
        )
    _, rows, columns = axes_order(problem)
    shape = problem.w.shape
    check_blocks((math.prod(shape[a] for a in rows) // problem.groups, math.prod(shape[a] for a in columns)), spec, problem.name)
    kept = len(rows)
    if isinstance(spec.granularity, PerBlock) and (kept > 1 or problem.groups > 1):
        raise ValueError(
            f"`block` granularity with gptq needs a weight with one kept axis, {problem.name!r} has {kept} "
            f"(and {problem.groups} groups); use group_size= instead"
        )
    if isinstance(spec.granularity, PerTensor) and problem.groups > 1:
        raise ValueError(f"gptq of the grouped convolution {problem.name!r} needs a scale per channel or group, not per tensor")
    if options.act_order and not options.static_groups and problem.groups > 1:
        raise ValueError(f"`act_order` of the grouped convolution {problem.name!r} needs `static_groups=True`")


def _arrays(solution: Solution) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    return solution.codes, solution.scale, solution.zero_point, solution.perm


def _few_rows(count: np.ndarray, k: int) -> tuple[str, ...]:
    """Says where fewer rows than columns were seen: directions that no row has are rounded as if they did not matter."""
    few = np.unique(count[(count > 0) & (count < k)]).tolist()
    if not few:
        return ()
    rows = f"{few[0]} row{'s' * (few[0] != 1)}" if len(few) == 1 else f"{few[0]} to {few[-1]} rows"
    return (f"{rows} for {k} columns: the Hessian is not of full rank",)


def _notes(solution: Solution, k: int, many: bool) -> tuple[str, ...]:
    retries, dead = np.asarray(solution.retries), np.asarray(solution.dead)
    damping = np.asarray(solution.damping_used)
    notes = []
    if retries.any():
        notes.append(f"damping raised to {damping.max():.3g} after {retries.max()} retries")
    unseen = np.flatnonzero(dead == k)
    if unseen.size:
        which = f" in parts {', '.join(map(str, unseen))}" if many else ""
        notes.append(f"no calibration data but zeros reached it{which}: rounded")
    partly = dead[dead < k]
    if partly.any():
        notes.append(f"{partly.max()} dead columns")
    return tuple(notes)
