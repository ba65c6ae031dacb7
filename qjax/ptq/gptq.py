"""GPTQ as a method: from a weight of any shape and its Hessians to a packed weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import CrossMoment, CrossMoments, Observer, SecondMoment, deviation, hessian
from qjax.core import LearnedSpec, QTensor, has_global_scale
from qjax.ptq.gptq_solver import GPTQOptions, Solution, check_solved, solve
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.parts import check_matrix_blocks, check_not_cast, for_each_matrix, matrices, packed
from qjax.ptq.range_search import SHRINK
from qjax.ptq.sparsity import MOST_ZEROS, is_pruned, pruned_share
from qjax.ptq.work import Work, matrix_sizes

ALPHA = 0.25  # gptqmodel's and the authors' share of GPTAQ's correction
# A sweep counts on every later column, masked ones too. So many passes of refinement leave to the weights that remain what it counted
# on: on layers pruned 2:4 they take a fifth of the error off that the sweep leaves.
MASKED_PASSES = 2


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """See `gptq` and `gptaq`."""

    options: GPTQOptions

    @property
    def name(self) -> str:
        head, usual = ("gptaq", GPTQOptions(mse=True, alpha=ALPHA)) if self.options.alpha else ("gptq", GPTQOptions(mse=True))
        changed = []
        for field in dataclasses.fields(self.options):
            value = getattr(self.options, field.name)
            if value != getattr(usual, field.name):
                changed.append(field.name if value is True else f"{field.name}={value}")
        return f"{head}({', '.join(changed)})" if changed else head

    @property
    def observer(self) -> Observer[Any]:
        return CrossMoment() if self.needs_float else SecondMoment()

    @property
    def needs_float(self) -> bool:
        return self.options.alpha > 0

    def shapes(self, problem: Problem) -> QTensor:
        _check(problem, self.options)

        def solved(w: jax.Array) -> QTensor:
            laid_out = matrices(problem._replace(w=w))
            k = laid_out.shape[2]
            solution = _solve(laid_out, jnp.zeros((1, k, k), jnp.float32), None, problem, self.options, False)
            return packed(problem._replace(w=w), *_arrays(solution))

        return jax.eval_shape(solved, problem.w)

    def quantize(self, problem: Problem, state: Any) -> Outcome:
        _check(problem, self.options)
        w = matrices(problem)
        lack = deviation(state) if isinstance(state, CrossMoments) and bool(jnp.any(state.compared)) else None
        options, refined = _refined(self.options, problem)
        solution = _solve(w, hessian(state), lack, problem, options, masked=bool(jnp.any(w == 0)))
        check_solved(solution, problem.name)
        notes = (*refined, *_few_rows(np.asarray(state.count), w.shape[2]), *_notes(solution, w.shape[2], w.shape[0] > 1))
        if self.needs_float and lack is None and bool(jnp.any(state.count)):
            notes = (*notes, "nothing of the float program was seen beside its inputs: rounded like gptq")
        return Outcome(packed(problem, *_arrays(solution)), notes)

    def work(self, problem: Problem) -> Work:
        stack, n, k = matrix_sizes(problem)
        # Cholesky, the updates of the columns still to come, and the groups' ranges.
        sweep = k**3 / 3 + 2.0 * n * k * k
        options = _with_passes(self.options) if is_pruned(problem) else self.options
        sweep += options.refine * 2.0 * n * k * k
        return Work(sweep + self.needs_float * (k**3 + 2.0 * n * k * k), n * k * (len(SHRINK) if self.options.mse else 1)).times(stack)


def gptq(
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
    mse: bool = True,
    group_aware: bool = False,
    refine: int = 0,
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
      block_size: columns between two lazy updates. Groups smaller than a block take their scales at its start, all at once, as in
        the authors' code, so there it moves scales and codes a little; else it is speed only. Blocks of one group take each
        group's scale from the weights as they stand when its turn comes.
      mse: choose ranges by search (see `rtn`); False takes them from the extreme values, as the paper does.
      group_aware: quantize the groups by their largest diag(H), and the columns of each by theirs. Groups stay what they are, so
        no permutation is needed at run time.
      refine: passes of coordinate descent after the sweep: each column is rounded anew from where all the others stand, on the same
        grid. The damped error, that of the output on the data and `damping` times the mean of diag(H) times |w - w_hat|^2, never
        rises; a pass takes about the time of the sweep.

    A weight's exact zeros stay zeros, and the other weights make up for what they cannot take: a pruned weight stays pruned. One
    of which more than a tenth is zero gets at least two passes of refinement, and the report says so.

    Returns:
      A method for `qjax.Rule`. Needs calibration data.

    Raises:
      ValueError, TypeError: an option out of range or of another type; both orders at once.

    Example:
      >>> import qjax
      >>> rule = qjax.Rule("*", weight=qjax.int4(group_size=128), method=qjax.gptq(act_order=True, static_groups=True))

    Source: Frantar et al., arXiv 2210.17323, and the authors' code; see `gptq_solver.solve` for where we differ. Range
    search is off by default in both and in gptqmodel; on the shipped model it closes two thirds of the gap that rounding leaves,
    in place of a half (`experiments/gptq_model`), so here it is on.
    """
    return GPTQ(GPTQOptions(damping, act_order, static_groups, block_size, mse, group_aware=group_aware, refine=refine))


def _refined(options: GPTQOptions, problem: Problem) -> tuple[GPTQOptions, tuple[str, ...]]:
    """The options for a weight of numbers, and a remark where they have more passes because it was pruned."""
    share = pruned_share(problem)
    if share <= MOST_ZEROS or options.refine >= MASKED_PASSES:
        return options, ()
    return _with_passes(options), (f"{100 * share:.3g} % of it is pruned: {MASKED_PASSES} passes of refinement",)


def _with_passes(options: GPTQOptions) -> GPTQOptions:
    return dataclasses.replace(options, refine=max(options.refine, MASKED_PASSES))


def _solve(w: jax.Array, h: jax.Array, lack: jax.Array | None, problem: Problem, options: GPTQOptions, masked: bool) -> Solution:
    """Solves a stack of matrices (stack, N, K)."""
    if w.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], solve(w[0], h[0], problem.spec, options, None if lack is None else lack[0], masked))
    each = [None if x is None else for_each_matrix(problem, x) for x in (h, lack)]
    return _solve_many(w, *each, problem.spec, options, masked)


_solve_many = jax.jit(
    lambda w, h, lack, spec, options, masked: jax.vmap(lambda w, h, lack: solve(w, h, spec, options, lack, masked))(w, h, lack),
    static_argnums=(3, 4, 5),
)


def _check(problem: Problem, options: GPTQOptions) -> None:
    spec = problem.spec
    check_not_cast(problem, "gptq")
    if isinstance(spec, LearnedSpec):
        raise ValueError(
            f"`method` gptq rounds to a grid that is known before, and the table of {spec}, the spec of {problem.name!r}, is learned: "
            "take qjax.kmeans(), or a table such as qjax.nf4()"
        )
    check_matrix_blocks(problem, "gptq")
    if has_global_scale(spec) and problem.groups > 1:
        instead = "take a spec whose scales stand alone, such as qjax.mxfp4(), or another method"
        raise ValueError(f"gptq cannot round the grouped convolution {problem.name!r} to {spec}: {instead}")
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
