"""GPTQ of one weight matrix: pure numbers in, pure numbers out. Programs, calibration and packing are elsewhere."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.core import (
    BlockSpec,
    IntSpec,  # noqa: F401  # for the example
    PerBlock,
    PerGroup,
    blocks,
    check_blocks,
    group_length,
    padding,
    tensor_scale,
)
from qjax.core.specs import check_count, check_flag, is_number
from qjax.ptq.factorize import Factor, factorize
from qjax.ptq.gptq_sweep import Grid, Plan, Problem, descend, fit, free_moves, plan, sweep


@dataclasses.dataclass(frozen=True)
class GPTQOptions:
    """How `solve` works.

    Args:
      damping: share of the mean diagonal of the Hessian that is added to it (.01 in the paper's code; .05 is used too).
      act_order: quantize the columns with the largest Hessian diagonal first. Groups are then runs of that order and
        the solution has a `perm`, unless `static_groups`.
      static_groups: fix the scale of every group from the original weights beforehand, in the original order, so that
        no permutation is needed at run time.
      group_aware: quantize the groups in the order of their largest Hessian diagonal, and the columns of each group in that of
        theirs. Groups stay what they are, so no permutation is needed at run time.
      block_size: columns between two lazy updates. Groups smaller than a block take their scales at its start, all at
        once; apart from that it changes the time it takes, not the solution.
      mse: search for the range with the least rounding error (see `search_range`).
      damping_increment: added to `damping` at the first retry, three times that at the second, seven at the third ...
      max_damping_retries: retries before giving up.
      refine: passes of coordinate descent after the sweep, see `gptq_sweep.descend`.
      alpha: share of GPTAQ's correction for inputs that differ from the float program's; 0: none.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> GPTQOptions(damping=-1.0)
    Traceback (most recent call last):
    ValueError: `damping` must be a finite number >= 0, got -1.0
    """

    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    block_size: int = 128
    mse: bool = False
    damping_increment: float = 0.01
    max_damping_retries: int = 10
    group_aware: bool = False
    refine: int = 0
    alpha: float = 0.0

    def __post_init__(self):
        for argument in ("act_order", "static_groups", "mse", "group_aware"):
            check_flag(argument, getattr(self, argument))
        if self.group_aware and self.act_order:
            raise ValueError("`act_order` and `group_aware` are two orders of the columns: choose one")
        if not (is_number(self.alpha) and 0 <= self.alpha < float("inf")):
            raise ValueError(f"`alpha` must be a finite number >= 0, got {self.alpha!r}")
        if not (is_number(self.damping) and 0 <= self.damping < float("inf")):
            raise ValueError(f"`damping` must be a finite number >= 0, got {self.damping!r}")
        if not (is_number(self.damping_increment) and 0 < self.damping_increment < float("inf")):
            raise ValueError(f"`damping_increment` must be a finite number > 0, got {self.damping_increment!r}")
        for argument, least in (("block_size", 1), ("max_damping_retries", 0), ("refine", 0)):
            check_count(argument, getattr(self, argument), least)


class Solution(NamedTuple):
    """What `solve` found. Stored position j holds the original column `perm[j]`, or j where `perm` is None.

    Attributes:
      codes: int32 (N, K), in stored order.
      scale: float32 (N, G); (1, 1) per tensor, (N / kept, G) per block. Groups are runs of the stored order.
      zero_point: int32 of the shape of `scale`, or None.
      perm: int32 (K,) or None.
      loss: float32, `trace((w - q) H (w - q)^T)` with the Hessian as given, without damping. With `H = 2/n sum x x^T`
        it is twice the squared output error of a sample, summed over the N outputs. NaN: no solution was found.
      damping_used: float32, the share of the mean diagonal that was added; NaN: no solution was found.
      retries: int32, how often the factorization failed and damping was raised.
      dead: int32, columns with a zero Hessian diagonal. K: no data was seen, and `codes` is plain rounding.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    perm: jax.Array | None
    loss: jax.Array
    damping_used: jax.Array
    retries: jax.Array
    dead: jax.Array


def check_solved(solution: Solution, name: str) -> None:
    """Refuse a solution whose Hessian could not be factorized. Looks at concrete arrays: call it outside `jit`.

    Args:
      solution: of one weight, or stacked.
      name: what the error calls the weight.

    Raises:
      ValueError: naming the weight and how far damping was raised.
    """
    failed = int(np.sum(~np.isfinite(np.asarray(solution.damping_used))))
    if failed:
        of, retries = np.size(solution.damping_used), int(np.max(solution.retries))
        raise ValueError(
            f"the Hessian of `{name}` ({failed} of {of} matrices) could not be factorized, `damping` was raised "
            f"{retries} times: the calibration data holds NaN or infinity, or the Hessian is no sum of x x^T; look for "
            "activations that overflow 16-bit floats, or raise `damping`"
        )


@functools.partial(jax.jit, static_argnames=("spec", "options", "masked"))
def solve(
    w: jax.Array, hessian: jax.Array, spec: BlockSpec, options: GPTQOptions = GPTQOptions(),
    deviation: jax.Array | None = None, masked: bool = False,
) -> Solution:  # fmt: skip
    """Codes that keep the layer's output, not its weights: `argmin_q trace((w - q) H (w - q)^T)`, one column at a time.

    With `H + damping = R R^T` (R upper triangular), column j is rounded from
    `w_j + sum over i < j of (w_i - q_i) R_ij / R_jj`.

    Args:
      w: (N, K), floating: outputs, inputs.
      hessian: (K, K), floating, symmetric, positive semi-definite: see `qjax.calibration.hessian`. Only ratios of its entries
        matter, except for `loss`.
      spec: what to quantize to; every granularity but a cast.
      options: a `GPTQOptions`.
      deviation: (K, K), floating: `2/n sum (x_float - x) x^T`, for `options.alpha`; None: the inputs do not differ.
      masked: whether `w` may have exact zeros, which then stay zero, while the errors are made up for by the other weights alone.

    Returns:
      A `Solution`. It may be mapped with `jax.vmap` over stacked weights and Hessians.

    Raises:
      TypeError: `spec` is a cast.
      ValueError: shapes that do not fit, a group that does not divide K.

    >>> w = jnp.float32([[7.5, 2.4, 2.4]])
    >>> always_equal = jnp.ones((3, 3))  # inputs that are always equal: only the sum of their weights matters
    >>> solve(w, always_equal, IntSpec(4)).codes.tolist()  # rounding gives 7, 2, 2
    [[7, 3, 2]]

    Source: GPTQ (arXiv 2210.17323), the authors' code and gptqmodel 7.7. Differences: no inverse of H is formed (see
    `factorize`); a block is a whole number of groups or of parts of a group, so block boundaries move when `block_size`
    is no multiple of the group or the reverse; the mean that damping is a share of leaves dead columns out (theirs
    counts a stand-in 1 for each, which drowns a Hessian of small activations), and dead columns come last in act-order;
    a Hessian without data gives plain rounding, not zeros; failing to factorize is reported, never answered with plain
    rounding. Group-aware order: Gafni et al. (arXiv 2505.14638) and gptqmodel's `act_group_aware`; a group shorter than the
    others stays the last. For `deviation` see `corrected`.
    """
    _check(w, hessian, spec)
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    k, group = w.shape[1], group_length(w.shape[1], spec)
    # Whole channels and tensors take their range before dead columns are zeroed, groups after.
    by_group = isinstance(spec.granularity, PerGroup | PerBlock)
    of_tensor = next(iter(tensor_scale(w[..., None], spec)), None)
    known = None if by_group else _known_grids(w, spec, options, of_tensor)
    columns = _columns(hessian)
    zeros = w == 0 if masked else None
    w = jnp.where(columns.kept[None, :], w, 0.0)
    if by_group and (options.static_groups or group >= k):
        known = _known_grids(w, spec, options, of_tensor)
    order, group_order = _order(jnp.diagonal(hessian), group, options)
    layout = plan(k, group if known is None else None, options.block_size)
    deviation = deviation if options.alpha else None
    problem, factor, ordered = _problem(w, zeros, hessian, deviation, columns, known, group, order, layout, options)
    problem = problem._replace(of_tensor=of_tensor)
    swept = sweep(problem, spec, options.mse, layout)
    loss = jnp.sum(swept.loss)
    if options.refine:
        damped = jnp.where(jnp.eye(k, dtype=bool), ordered + factor.damping * columns.mean, ordered)
        swept = descend(problem, damped, swept, options.refine, spec, layout)
        loss = _loss(layout.collect(swept.difference), ordered, columns.seen if order is None else columns.seen[order])
    codes = layout.collect(swept.codes)
    if known is None:
        grids = jax.tree.map(lambda leaf: leaf[: -(-k // group)], swept.grids)
        if group_order is not None:
            grids = jax.tree.map(lambda leaf: leaf[jnp.argsort(group_order)], grids)
    else:
        grids = known
    permuted = known is None and group_order is None
    codes = codes if order is None or permuted else codes[jnp.argsort(order)]
    kept = spec.granularity.kept if isinstance(spec.granularity, PerBlock) else 1
    grids = jax.tree.map(lambda leaf: leaf.T[::kept], grids)
    return Solution(codes.T.astype(jnp.int32), grids.scale, grids.zero_point, order if permuted else None,
                    loss, factor.damping, factor.retries, columns.dead)  # fmt: skip


def _check(w: jax.Array, hessian: jax.Array, spec: BlockSpec) -> None:
    if not isinstance(spec, BlockSpec):
        raise TypeError(f"`spec` must have codes and scales, as qjax.int4() and qjax.mxfp4() have, got {spec!r}")
    if w.ndim != 2 or w.size == 0:
        raise ValueError(f"`w` must have the shape (outputs, inputs), not empty, got {w.shape}")
    if hessian.shape != (w.shape[1], w.shape[1]):
        raise ValueError(f"`hessian` must have the shape {(w.shape[1],) * 2}, the inputs of `w`, got {hessian.shape}")
    for argument, array in (("w", w), ("hessian", hessian)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"`{argument}` must be floating, got {array.dtype}")
    check_blocks(w.shape, spec, "w")


class _Columns(NamedTuple):
    """seen, kept: bool (K,), data reached it, its weights stay. mean: of the seen diagonal. dead: how many not seen."""

    seen: jax.Array
    kept: jax.Array
    mean: jax.Array
    dead: jax.Array


def _columns(hessian: jax.Array) -> _Columns:
    diagonal = jnp.diagonal(hessian)
    seen = diagonal != 0
    count, total = jnp.sum(jnp.stack([seen.astype(jnp.float32), diagonal]), axis=1)
    no_data = count == 0
    mean = total / jnp.maximum(count, 1.0)
    # Without any data every column stays as it is, and the Hessian becomes the identity: that is plain rounding.
    dead = diagonal.shape[0] - count.astype(jnp.int32)
    return _Columns(seen, seen | no_data, jnp.where(no_data, 1.0, mean), dead)


def _known_grids(w: jax.Array, spec: BlockSpec, options: GPTQOptions, of_tensor: jax.Array | None) -> Grid:
    """Grids of the original weights: (G, N), or (1, 1) per tensor."""
    kept = spec.granularity.kept if isinstance(spec.granularity, PerBlock) else 1
    grid = fit(blocks(w, spec)[0], spec, options.mse, of_tensor, **padding(w.shape[1], spec))
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[..., 0], kept, axis=0).T, grid)


def _order(diagonal: jax.Array, group: int, options: GPTQOptions) -> tuple[jax.Array | None, jax.Array | None]:
    """The order of the columns, and that of whole groups where groups stay together: int32 (K,), (G,), or None."""

    def descending(x: jax.Array) -> jax.Array:
        return jnp.argsort(-x, axis=-1, stable=True).astype(jnp.int32)

    if options.act_order:
        return descending(diagonal), None
    if not options.group_aware:
        return None, None
    k, group = diagonal.shape[0], min(group, diagonal.shape[0])
    whole = k // group
    importance = diagonal[: whole * group].reshape(whole, group)
    groups = descending(jnp.max(importance, axis=1))
    first = jnp.arange(whole, dtype=jnp.int32)[:, None] * group
    columns = (descending(importance) + first)[groups].reshape(-1)
    rest = jnp.arange(whole * group, k, dtype=jnp.int32)
    last = jnp.argsort(-diagonal[whole * group :], stable=True).astype(jnp.int32) + whole * group
    return jnp.concatenate([columns, last]), jnp.concatenate([groups, jnp.full((1 if rest.size else 0,), whole, jnp.int32)])


def _problem(
    w: jax.Array, zeros: jax.Array | None, hessian: jax.Array, deviation: jax.Array | None, columns: _Columns, known: Grid | None,
    group: int, order: jax.Array | None, layout: Plan, options: GPTQOptions,
) -> tuple[Problem, Factor, jax.Array]:  # fmt: skip
    k = w.shape[1]
    hessian = jnp.where(jnp.eye(k, dtype=bool) & ~columns.seen[None, :], columns.mean, hessian)
    place = jnp.arange(k, dtype=jnp.int32) if order is None else order
    seen, rows, masked = columns.seen, w.T, None if zeros is None else zeros.T
    if order is not None:
        hessian, seen, rows = hessian[order][:, order], seen[order], rows[order]
        masked = None if masked is None else masked[order]
    factor = factorize(hessian, columns.mean, options.damping, options.damping_increment, options.max_damping_retries)
    if deviation is not None:
        rows = corrected(rows, deviation if order is None else deviation[order][:, order], factor, options.alpha)
    gain = jnp.where(seen, jnp.square(factor.pivot), 0.0)
    damped = jnp.where(seen, factor.damping * columns.mean, 0.0)
    coupling = layout.spread(layout.spread(factor.coupling, 0), 1)
    problem = Problem(
        weight=layout.spread(rows, 0),
        coupling=coupling,
        gain=layout.spread(gain, 0),
        damped=layout.spread(damped, 0),
        known=known,
        grid_of=layout.spread(place // group, 0),
        free=free_moves(coupling, layout.block) if known is None and layout.block < layout.sizes[0] else None,
        masked=None if masked is None else layout.spread(masked, 0),
    )
    return problem, factor, hessian


def _loss(difference: jax.Array, hessian: jax.Array, seen: jax.Array) -> jax.Array:
    difference = jnp.where(seen[:, None], difference, 0.0)
    return jnp.sum(difference * jnp.matmul(hessian, difference, precision=lax.Precision.HIGHEST))


def corrected(rows: jax.Array, deviation: jax.Array, factor: Factor, alpha: float) -> jax.Array:
    """GPTAQ: the weights that make up, on the inputs as they are, for what the inputs of earlier columns lack.

    `w + alpha w P`,  `P = triu(D U^T, 1) U`,  `D = 2/n sum (x_float - x) x^T`,  `U = R^-1`: column i's share `w_i (x_float - x)_i` of
    the output's error is fitted, in least squares, by the columns after it. Nothing in P depends on codes, so the sweep stays
    what it is, on these weights.

    Args:
      rows: float32 (K, N), the weight transposed, in the order in which columns are quantized.
      deviation: (K, K), D in that order.
      factor: of the damped Hessian, `H = R R^T`.
      alpha: the share.

    Returns:
      float32 (K, N).

    Source: Li et al., GPTAQ (arXiv 2504.02692), eq. 17 and 18, and the authors' code (GPTQv2), whose alpha the paper does not have.
    There the column that P multiplies is the updated weight within a block of 128 columns, and the rounded one beyond it; here it
    is the original weight, whose output on the float input is what is aimed at: no result depends on the size of a block.
    """
    k = rows.shape[0]
    lower = factor.coupling + jnp.eye(k, dtype=jnp.float32)  # R^T = diag(pivot) lower
    solved = lax.linalg.triangular_solve(lower, deviation.astype(jnp.float32), left_side=False, lower=True, unit_diagonal=True)
    solved = jnp.triu(solved / factor.pivot[None, :], 1)
    shares = jnp.matmul(solved.T, rows, precision=lax.Precision.HIGHEST) / factor.pivot[:, None]
    return rows + alpha * lax.linalg.triangular_solve(lower, shares, left_side=True, lower=True, unit_diagonal=True)
