"""The sweep over columns that is GPTQ's inner part: nested compiled loops over chunks of columns.

Everything is transposed: an array (K, N) has a row for each column of the weight, so that a step touches contiguous
memory. Write D for the rows of `weight - rounded` that are final and 0 for the others. The target of a row j is

    weight[j] + coupling[j, :] @ D          (coupling is strictly lower triangular: only earlier rows count)

so a level of the nest adds, for each of its chunks, the part of that sum that lies in the level's own rows, and hands
the chunk down. At the lowest level a chunk has some 16 rows, which stay in the processor's cache while they are rounded
one by one. Where scales come from the updated weights, one level's chunks are the groups, or blocks of several groups.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.core import BlockSpec, IntSpec, PerBlock, block_decode, block_encode, block_params, signed_codes
from qjax.ptq.range_search import search_range

_ROWS = 16  # of the lowest level
_FAN_OUT = 4  # blocks in a superblock
_MOST_MASKED = 1024  # rows of a level whose products include rows that are still zero; a larger one loops over chunks


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each of K columns goes, in a number of rows that the levels of the nest divide.

    Attributes:
      k: columns.
      group: columns that share a scale taken from the updated weights, or None when all scales are known beforehand.
      padded_group: rows of a group. What is added is zero, has no coupling and changes nothing.
      block: rows whose groups take their scales at the same time, a multiple of `padded_group`, one of `sizes`.
      sizes: rows of a chunk at each level, each dividing the one before; the first is all of them.
    """

    k: int
    group: int | None
    padded_group: int
    block: int
    sizes: tuple[int, ...]

    def spread(self, x: jax.Array, axis: int) -> jax.Array:
        """`x` with the K entries of `axis` in their rows, zeros between."""
        if self.group is not None and self.group != self.padded_group:
            before, after, groups = x.shape[:axis], x.shape[axis + 1 :], -(-self.k // self.group)
            x = _pad(x, axis, groups * self.group).reshape(*before, groups, self.group, *after)
            x = _pad(x, axis + 1, self.padded_group).reshape(*before, groups * self.padded_group, *after)
        return _pad(x, axis, self.sizes[0])

    def collect(self, rows: jax.Array) -> jax.Array:
        """The inverse of `spread` on the first axis."""
        if self.group is not None and self.group != self.padded_group:
            groups = -(-self.k // self.group)
            rows = rows[: groups * self.padded_group].reshape(groups, self.padded_group, *rows.shape[1:])
            rows = rows[:, : self.group].reshape(groups * self.group, *rows.shape[2:])
        return rows[: self.k]


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])


def plan(k: int, group: int | None, block_size: int) -> Plan:
    """Levels for `k` columns: some 16 rows, about `block_size`, a few blocks, all; the group's size if it is larger.

    >>> plan(4096, 32, 128).sizes, plan(4096, None, 128).sizes, plan(1200, 300, 128).sizes
    ((4096, 512, 128, 16), (4096, 512, 128, 16), (1200, 300, 75, 15))
    """
    rows = _ROWS if group is None else _rows_of(group)
    padded_group = rows if group is None else -(-group // rows) * rows
    sizes = [rows]
    if padded_group > block_size:
        for target in (block_size, _FAN_OUT * block_size):
            sizes.append(_largest_between(sizes[-1], padded_group, target))
    sizes.append(padded_group * max(1, block_size // padded_group))
    block = sizes[-1]
    needed = k if group is None else -(-k // group) * padded_group
    fan_outs = range(max(1, _FAN_OUT * block_size // block), 0, -1)
    sizes.append(min((block * f for f in fan_outs), key=lambda size: -(-needed // size) * size))
    below = [s for s in sizes if s <= needed] or [rows]
    total = -(-needed // below[-1]) * below[-1]
    return Plan(k, group, padded_group, min(block, total), tuple(sorted({total, *below}, reverse=True)))


def _rows_of(group: int) -> int:
    if group < 8:
        return group
    return min((d for d in range(8, 33) if group % d == 0), key=lambda d: abs(d - _ROWS), default=_ROWS)


def _largest_between(step: int, whole: int, target: int) -> int:
    """The largest multiple of `step` that divides `whole` and is at most `target` (at least `step`)."""
    return max(n for n in range(step, max(step, target) + 1, step) if whole % n == 0)


class Grid(NamedTuple):
    """scale: float32. zero_point: int32 of the same shape, or None. Both broadcast against what they round."""

    scale: jax.Array
    zero_point: jax.Array | None


def fit(
    blocks: jax.Array, spec: BlockSpec, mse: bool, of_tensor: jax.Array | None = None, real: jax.Array | np.ndarray | None = None
) -> Grid:
    """The grid (..., 1) of each block (..., group): of its whole range, or of the best one (see `search_range`)."""
    return Grid(*(search_range if mse else block_params)(blocks, spec, of_tensor, real))


class Problem(NamedTuple):
    """What is swept, in rows (see `Plan`).

    Attributes:
      weight: float32 (K, N).
      coupling: float32 (K, K), strictly lower triangular, see `Factor`.
      gain: float32 (K,), squared pivots: what a squared difference between target and rounded weight costs.
      damped: float32 (K,), what damping added to the Hessian's diagonal: what the cost above has too much of.
      known: grids (G, N) or (G, 1), or None when groups take theirs from the updated weights.
      grid_of: int32 (K,), the row of `known` for each row.
      free: float32 (blocks, block, block), see `free_moves`; None when it is not needed.
      of_tensor: float32 (1, 1, 1), the scale of the whole weight that those of blocks are over (see `core.tensor_scale`), or None.
      masked: bool (K, N), entries that stay exactly zero; None when there are none. Such an entry is rounded from 0 whatever its
        target, so what it should have made up for falls to the rows below it, as SparseGPT (arXiv 2301.00774) prunes.
    """

    weight: jax.Array
    coupling: jax.Array
    gain: jax.Array
    damped: jax.Array
    known: Grid | None
    grid_of: jax.Array
    free: jax.Array | None
    of_tensor: jax.Array | None = None
    masked: jax.Array | None = None


class Swept(NamedTuple):
    """What is known of some rows after they were swept.

    Attributes:
      difference: float32 (rows, N), weight minus rounded weight.
      codes: int8 or uint8 (rows, N).
      loss: float32 (1, N).
      grids: `Grid` of (groups, N), or None below the level that fits them and when they are known beforehand.
    """

    difference: jax.Array
    codes: jax.Array
    loss: jax.Array
    grids: Grid | None


class _Static(NamedTuple):
    spec: BlockSpec
    mse: bool
    plan: Plan


def sweep(problem: Problem, spec: BlockSpec, mse: bool, plan: Plan) -> Swept:
    """Round every row of the problem, each from its target.

    Args:
      problem: see `Problem`.
      spec: what to quantize to.
      mse: search for the range of groups that take it from the updated weights.
      plan: how the rows are laid out.

    Returns:
      A `Swept`; padding rows and groups included.
    """
    static = _Static(spec, mse, plan)
    if problem.known is not None or plan.block < plan.sizes[0]:
        return _chunks(problem, static, 0, problem.weight, 0, None)
    # One block holds every group: nothing is updated before it.
    grids = _fit_groups(_zeroed(problem, problem.weight, 0), static, problem.of_tensor, 0)
    return _chunks(problem, static, 0, problem.weight, 0, (0, grids))._replace(grids=grids)


def descend(problem: Problem, hessian: jax.Array, swept: Swept, passes: int, spec: BlockSpec, plan: Plan) -> Swept:
    """Cyclic coordinate descent from what a sweep found, its grids kept: every row is rounded anew from where all the others stand.

    The target of row j is `weight[j] + sum over i != j of H[j, i] D[i] / H[j, j]`, which no rounding beats while the others stay, so
    `D^T H D` never rises. It is the sweep again, with another coupling: earlier rows count as they are now, later ones as they were.

    Args:
      problem: what was swept.
      hessian: float32 (K, K), damped, in the order of the rows; not yet spread.
      swept: what was found.
      passes: how often all rows are visited.
      spec: what to quantize to.
      plan: how the rows are laid out.

    Returns:
      A `Swept` with the grids of `swept`; `loss` is not that of the problem.

    Source: QuantEase (arXiv 2309.01885), there from the float weights; CDQuant (arXiv 2406.17542), from GPTQ as here.
    """
    diagonal = jnp.diagonal(hessian)[:, None]
    shares = jnp.where(jnp.eye(hessian.shape[0], dtype=bool), 0.0, hessian / diagonal)
    shares = plan.spread(plan.spread(shares, 0), 1)
    lower, upper = jnp.tril(shares, -1), jnp.triu(shares, 1)
    if problem.known is None:
        rows = jnp.arange(plan.sizes[0], dtype=jnp.int32)
        problem = problem._replace(known=swept.grids, grid_of=rows // plan.padded_group, free=None)
    problem, static = problem._replace(coupling=lower), _Static(spec, False, plan)

    def step(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done = _chunks(problem, static, 0, problem.weight + _product(upper, state[0]), 0, None)
        return done.difference, done.codes

    difference, codes = lax.fori_loop(0, passes, step, (swept.difference, swept.codes))
    return swept._replace(difference=difference, codes=codes)


def _fit_groups(rows: jax.Array, static: _Static, of_tensor: jax.Array | None, start: Any) -> Grid:
    """The grids (groups, N) of whole groups of rows, `start ..` of the plan's."""
    granularity, n, size = static.spec.granularity, rows.shape[1], static.plan.padded_group
    kept = granularity.kept if isinstance(granularity, PerBlock) else 1
    rows, real = rows.reshape(-1, size, n), None
    if static.spec.by_mean:
        group = static.plan.group or size
        rows = rows[:, :group]  # the zeros of a padded group are not its own
        left = static.plan.k - (start // size + jnp.arange(rows.shape[0])) * group  # nor are those behind the last row
        real = jnp.tile(jnp.arange(group), kept)[None, None, :] < jnp.maximum(left, 1)[:, None, None]
    elif not static.mse:
        # Only the extreme values count: a reduction here spares transposing the group.
        rows = jnp.stack([jnp.min(rows, axis=1), jnp.max(rows, axis=1)], axis=1)
    blocks = rows.swapaxes(1, 2).reshape(rows.shape[0], n // kept, kept * rows.shape[1])
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[..., 0], kept, axis=1), fit(blocks, static.spec, static.mse, of_tensor, real))


def _chunks(p: Problem, static: _Static, level: int, target: jax.Array, start: Any, block: tuple[Any, Grid] | None) -> Swept:
    """Sweep rows `start ..` whose `target` has every update from before `start`; `block` is its first row and grids."""
    plan, n = static.plan, target.shape[1]
    if level + 1 == len(plan.sizes):
        return _rows(p, static, target, start, block)
    size, chunk = plan.sizes[level], plan.sizes[level + 1]
    fits_here_or_below = p.known is None and block is None
    fits_here = fits_here_or_below and chunk == plan.block

    def step(i, done: Swept) -> Swept:
        first = i * chunk
        rows = lax.dynamic_slice_in_dim(target, first, chunk) + _earlier(p, done.difference, start, i, chunk)
        inner = block
        if fits_here:
            at = start + first
            inner = at, _fit_groups(_zeroed(p, _updated(p, rows, at), at), static, p.of_tensor, at)
        part = _chunks(p, static, level + 1, rows, start + first, inner)
        grids = done.grids
        if fits_here_or_below:
            new = part.grids if inner is None else inner[1]
            grids = jax.tree.map(lambda all_, some: _put(all_, some, first // plan.padded_group), grids, new)
        return Swept(_put(done.difference, part.difference, first), _put(done.codes, part.codes, first),
                     done.loss + part.loss, grids)  # fmt: skip

    nothing = _nothing(size, n, static.spec)
    if fits_here_or_below:
        zeros = jnp.zeros((size // plan.padded_group, n), jnp.float32)
        has_zero_point = isinstance(static.spec, IntSpec) and not static.spec.symmetric
        kind = jnp.float32 if isinstance(static.spec, IntSpec) and static.spec.float_zero else jnp.int32
        nothing = nothing._replace(grids=Grid(zeros, zeros.astype(kind) if has_zero_point else None))
    return lax.fori_loop(0, size // chunk, step, nothing)


def _zeroed(p: Problem, rows: jax.Array, start: Any) -> jax.Array:
    """Rows `start ..` with zeros where entries are masked."""
    return rows if p.masked is None else jnp.where(lax.dynamic_slice_in_dim(p.masked, start, rows.shape[0]), 0.0, rows)


def _updated(p: Problem, target: jax.Array, start: Any) -> jax.Array:
    """GPTQ's updated weights of a block, before any of its rows is rounded.

    They are what free rows move to, at no cost, to make up for those that are final. With y for how far they move, no
    cost means that every row meets its target: `y + coupling @ y = target - weight`. The target alone is something
    else: it supposes that the free rows above it stay where they were.
    """
    size = target.shape[0]
    weight = lax.dynamic_slice_in_dim(p.weight, start, size)
    return target + _product(lax.dynamic_index_in_dim(p.free, start // size, keepdims=False), target - weight)


def free_moves(coupling: jax.Array, block: int) -> jax.Array:
    """`(I + coupling)^-1 - I` for each diagonal block, float32 (K / block, block, block).

    Without I the first row of a block adds exactly nothing, so a first row that sets the scale is also rounded with it.
    """
    count = coupling.shape[0] // block
    each = jnp.arange(count)
    diagonal = coupling.reshape(count, block, count, block)[each, :, each, :]
    eye = jnp.broadcast_to(jnp.eye(block, dtype=jnp.float32), diagonal.shape)
    return lax.linalg.triangular_solve(diagonal, eye, left_side=True, lower=True, unit_diagonal=True) - eye


def _earlier(p: Problem, difference: jax.Array, start: Any, i: Any, chunk: int) -> jax.Array:
    """What the first `i` chunks of this level add to the targets of the next one."""
    size, first = difference.shape[0], start + i * chunk
    if size <= _MOST_MASKED:
        return _product(lax.dynamic_slice(p.coupling, (first, start), (chunk, size)), difference)

    def add(j, total):
        coupling = lax.dynamic_slice(p.coupling, (first, start + j * chunk), (chunk, chunk))
        return total + _product(coupling, lax.dynamic_slice_in_dim(difference, j * chunk, chunk))

    return lax.fori_loop(0, i, add, jnp.zeros((chunk, difference.shape[1]), jnp.float32))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _rows(p: Problem, static: _Static, target: jax.Array, start: Any, block: tuple[Any, Grid] | None) -> Swept:
    """Round the rows of the lowest level one by one, each adding to the targets of those below it."""
    size, n = target.shape
    couplings = lax.dynamic_slice(p.coupling, (start, start), (size, size))
    # A chunk of this level lies in one group, unless act-order mixes groups that are known beforehand.
    grid = None if block is None else _pick(block[1], (start - block[0]) // static.plan.padded_group)

    def step(j, state):
        target, done = state
        row = start + j
        here = grid or _pick(p.known, p.grid_of[row])
        goal = lax.dynamic_slice_in_dim(target, j, 1)
        codes = block_encode(_zeroed(p, goal, row), *here, static.spec)
        rounded = block_decode(codes, *here, static.spec)
        difference = lax.dynamic_slice_in_dim(p.weight, row, 1) - rounded
        loss = jnp.square(goal - rounded) * p.gain[row] - jnp.square(difference) * p.damped[row]
        target = target + lax.dynamic_slice_in_dim(couplings, j, 1, axis=1) * difference
        return target, Swept(_put(done.difference, difference, j), _put(done.codes, codes.astype(done.codes.dtype), j),
                             done.loss + loss, None)  # fmt: skip

    return lax.fori_loop(0, size, step, (target, _nothing(size, n, static.spec)))[1]


def _pick(grids: Grid | None, index: Any) -> Grid:
    return jax.tree.map(lambda leaf: leaf if leaf.shape[0] == 1 else lax.dynamic_slice_in_dim(leaf, index, 1), grids)


def _nothing(size: int, n: int, spec: BlockSpec) -> Swept:
    codes = jnp.zeros((size, n), jnp.int8 if signed_codes(spec) else jnp.uint8)
    return Swept(jnp.zeros((size, n), jnp.float32), codes, jnp.zeros((1, n), jnp.float32), None)


def _put(whole: jax.Array, part: jax.Array, first: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, part, first, axis=0)
