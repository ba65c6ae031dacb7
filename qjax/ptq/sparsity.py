"""Pruned weights: an exact zero stays one wherever the grid has a zero, and a grid or a method that cannot keep it is refused."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from qjax.core import (
    BlockSpec,
    CodebookSpec,
    IntSpec,
    LearnedSpec,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Spec,
    check_blocks,
    logical_blocks,
)
from qjax.core.learned import PINNED_FROM
from qjax.graph.rotate import MOST_ZEROS as MOST_ZEROS
from qjax.graph.rotate import most_of
from qjax.ptq.method import Problem
from qjax.ptq.parts import matrices


def has_zero(spec: Spec) -> bool:
    """Whether a spec's grids have a level that is exactly zero, whatever their scale; of learned tables: once enough of the weight is.

    Example:
      >>> import qjax
      >>> [has_zero(spec) for spec in (qjax.int4(), qjax.uint4(), qjax.nf4(), qjax.codebook((-1.0, 1.0)))]
      [True, True, True, False]
    """
    if isinstance(spec, CodebookSpec):
        return 0.0 in spec.levels
    return not (isinstance(spec, IntSpec) and spec.float_zero)


def check_zeros(problem: Problem, permuted: bool = False) -> tuple[str, ...]:
    """Looks whether a grid without a zero would fill in what was pruned.

    A block of nothing but zeros does not count: its scale is 0, and so is all that it stands for.

    Args:
      problem: a weight of numbers, and what it is to become.
      permuted: whether its groups will be runs of another order of its columns.

    Returns:
      A remark for the report, where a few zeros become something else.

    Raises:
      ValueError: more than `MOST_ZEROS` of the weight, or of one of its independent parts, is exactly zero, and the spec has no zero.

    Example:
      >>> import qjax
      >>> check_zeros(Problem(jnp.eye(4), qjax.codebook((-1.0, 1.0), group_size=4), (-2,), (), 1, "up"))
      Traceback (most recent call last):
      ValueError: `weight`=codebook(group_size=4) has no level that is exactly zero, and 75 % of 'up' is: ...
    """
    spec, path = problem.spec, problem.name
    if isinstance(spec, LearnedSpec):
        zeros = jnp.mean(matrices(problem) == 0, axis=(1, 2))
        lost = float(jnp.max(jnp.where(zeros > PINNED_FROM, 0.0, zeros)))
        return (f"{100 * lost:.2g} % of it is exactly zero, too little for {spec} to keep a level for",) if lost else ()
    if not isinstance(spec, BlockSpec) or has_zero(spec):
        return ()
    share = most_of(_beside_others(problem, spec, permuted), problem.stacked)
    if share > MOST_ZEROS:
        raise ValueError(
            f"`weight`={spec} has no level that is exactly zero, and {100 * share:.3g} % of {path!r} is: what was pruned would come back; "
            'take a grid with a zero, such as qjax.int4(...), qjax.uint4(...) with zero_dtype="int", or qjax.nf4(...)'
        )
    return (f"{100 * share:.2g} % of it is exactly zero, which {spec} has no level for",) if share else ()


def _beside_others(problem: Problem, spec: BlockSpec, permuted: bool) -> jax.Array:
    """Where a weight is zero and something else of its block is not, bool of its shape."""
    granularity = spec.granularity
    if getattr(spec, "double_quant", False) or (permuted and isinstance(granularity, PerBlock)):
        granularity = PerTensor()  # the scale of a block of zeros is near those of the others, not 0
    elif permuted and isinstance(granularity, PerGroup):
        granularity = PerChannel()
    kept = [n for i, n in enumerate(problem.w.shape) if i - problem.w.ndim not in problem.axes]
    check_blocks((*kept, math.prod(problem.w.shape[a] for a in problem.axes)), spec, problem.name)
    spec = dataclasses.replace(spec, granularity=granularity)
    other, _, to_logical = logical_blocks(problem.w != 0, spec, problem.axes, problem.stacked)
    return (problem.w == 0) & to_logical(jnp.broadcast_to(jnp.any(other, axis=-1, keepdims=True), other.shape))


def pruned_share(problem: Problem) -> float:
    """The share of exact zeros beside other weights of the same output, of the independent part that has most of them.

    Outputs of nothing but zeros do not count: whatever is made of them by sums is zero again.

    Args:
      problem: a weight of numbers.

    Returns:
      A number from 0 to 1.

    Example:
      >>> pruned_share(Problem(jnp.eye(4).at[:, 3].set(0.0), IntSpec(4), (-2,), (), 1, "up"))
      0.5625
    """
    zero = problem.w == 0
    among = zero & ~jnp.all(zero, axis=problem.axes, keepdims=True)
    return most_of(among, problem.stacked)


def is_pruned(problem: Problem) -> bool:
    """Whether more than `MOST_ZEROS` of a weight of numbers is zero, see `pruned_share`; of shapes what the problem says.

    Example:
      >>> is_pruned(Problem(jnp.eye(4), IntSpec(4), (-2,), (), 1, "up"))
      True
    """
    return problem.pruned if isinstance(problem.w, jax.ShapeDtypeStruct) else pruned_share(problem) > MOST_ZEROS


def check_filled(problem: Problem, method: str) -> tuple[str, ...]:
    """Looks how many exact zeros a method that cannot keep them (`FillsZeros`) would fill in.

    Args:
      problem: a weight of numbers.
      method: the method's name.

    Returns:
      A remark for the report, where there are a few.

    Raises:
      ValueError: more than `MOST_ZEROS` of the weight, or of one of its independent parts.

    Example:
      >>> import qjax
      >>> check_filled(Problem(jnp.eye(4), IntSpec(4), (-2,), (), 1, "up"), "low_rank(2, then=rtn)")
      Traceback (most recent call last):
      ValueError: `method` low_rank(2, then=rtn) keeps no exact zeros, and 75 % of 'up' is: ...
    """
    share = pruned_share(problem)
    if share > MOST_ZEROS:
        raise ValueError(
            f"`method` {method} keeps no exact zeros, and {100 * share:.3g} % of {problem.name!r} is: what was pruned would come back; "
            "take a method that keeps them, such as qjax.gptq(), qjax.awq() or qjax.rtn()"
        )
    return (f"{100 * share:.2g} % of it was exactly zero, which {method} does not keep",) if share else ()
