"""GPTQ of one weight matrix: pure numbers in, pure numbers out. Programs, calibration and packing are elsewhere."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import (
    BlockSpec,
    IntSpec,  # noqa: F401  # for the example
    PerBlock,
    PerGroup,
    blocks,
    check_blocks,
    group_length,
    tensor_scale,
)
from qjax.ptq.factorize import Factor, factorize
from qjax.ptq.gptq_sweep import Grid, Plan, Problem, fit, free_moves, plan, sweep


@dataclasses.dataclass(frozen=True)
class GPTQOptions:
    """How `solve` works.

    Args:
      damping: share of the mean diagonal of the Hessian that is added to it (.01 in the paper's code; .05 is used too).
      act_order: quantize the columns with the largest Hessian diagonal first. Groups are then runs of that order and
        the solution has a `perm`, unless `static_groups`.
      static_groups: fix the scale of every group from the original weights beforehand, in the original order, so that
        no permutation is needed at run time.
      block_size: columns between two lazy updates. Groups smaller than a block take their scales at its start, all at
        once; apart from that it changes the time it takes, not the solution.
      mse: search for the range with the least rounding error (see `search_range`).
      damping_increment: added to `damping` at the first retry, three times that at the second, seven at the third ...
      max_damping_retries: retries before giving up.

    Raises:
      ValueError: naming the argument.

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

    def __post_init__(self):
        if not (0 <= self.damping < float("inf")):
            raise ValueError(f"`damping` must be a finite number >= 0, got {self.damping!r}")
        if not (0 < self.damping_increment < float("inf")):
            raise ValueError(f"`damping_increment` must be a finite number > 0, got {self.damping_increment!r}")
        for argument, least in (("block_size", 1), ("max_damping_retries", 0)):
            value = getattr(self, argument)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{argument}` must be an int >= {least}, got {value!r}")


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


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def solve(w: jax.Array, hessian: jax.Array, spec: BlockSpec, options: GPTQOptions = GPTQOptions()) -> Solution:
    """Codes that keep the layer's output, not its weights: `argmin_q trace((w - q) H (w - q)^T)`, one column at a time.

    With `H + damping = R R^T` (R upper triangular), column j is rounded from
    `w_j + sum over i < j of (w_i - q_i) R_ij / R_jj`.

    Args:
      w: (N, K), floating: outputs, inputs.
      hessian: (K, K), floating, symmetric, positive semi-definite: see `qjax.calibration.hessian`. Only ratios of its entries
        matter, except for `loss`.
      spec: what to quantize to; every granularity but a cast.
      options: a `GPTQOptions`.

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
    rounding.
    """
    _check(w, hessian, spec)
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    k, group = w.shape[1], group_length(w.shape[1], spec)
    # Whole channels and tensors take their range before dead columns are zeroed, groups after.
    by_group = isinstance(spec.granularity, PerGroup | PerBlock)
    of_tensor = next(iter(tensor_scale(w[..., None], spec)), None)
    known = None if by_group else _known_grids(w, spec, options, of_tensor)
    columns = _columns(hessian)
    w = jnp.where(columns.kept[None, :], w, 0.0)
    if by_group and (options.static_groups or group >= k):
        known = _known_grids(w, spec, options, of_tensor)
    order = jnp.argsort(-jnp.diagonal(hessian), stable=True).astype(jnp.int32) if options.act_order else None
    layout = plan(k, group if known is None else None, options.block_size)
    problem, factor = _problem(w, hessian, columns, known, group, order, layout, options)
    swept = sweep(problem._replace(of_tensor=of_tensor), spec, options.mse, layout)
    codes = layout.collect(swept.codes)
    if known is None:
        grids = jax.tree.map(lambda leaf: leaf[: -(-k // group)], swept.grids)
    else:
        grids = known
        codes = codes if order is None else codes[jnp.argsort(order)]
    kept = spec.granularity.kept if isinstance(spec.granularity, PerBlock) else 1
    grids = jax.tree.map(lambda leaf: leaf.T[::kept], grids)
    return Solution(codes.T.astype(jnp.int32), grids.scale, grids.zero_point, order if known is None else None,
                    jnp.sum(swept.loss), factor.damping, factor.retries, columns.dead)  # fmt: skip


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
    grid = fit(blocks(w, spec)[0], spec, options.mse, of_tensor)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[..., 0], kept, axis=0).T, grid)


def _problem(
    w: jax.Array, hessian: jax.Array, columns: _Columns, known: Grid | None, group: int, order: jax.Array | None,
    layout: Plan, options: GPTQOptions,
) -> tuple[Problem, Factor]:  # fmt: skip
    k = w.shape[1]
    hessian = jnp.where(jnp.eye(k, dtype=bool) & ~columns.seen[None, :], columns.mean, hessian)
    place = jnp.arange(k, dtype=jnp.int32) if order is None else order
    seen, rows = columns.seen, w.T
    if order is not None:
        hessian, seen, rows = hessian[order][:, order], seen[order], rows[order]
    factor = factorize(hessian, columns.mean, options.damping, options.damping_increment, options.max_damping_retries)
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
    )
    return problem, factor
