"""Tables fitted to the weights they serve: one-dimensional k-means, `w ~= levels[code]` or `levels[code] * absmax`.

Everything works on matrices (stack, N, K): a table for each row, or one for each matrix with the absmax of each group taken out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.core.affine import divide, round_scale, round_stored
from qjax.core.granularity import PerGroup
from qjax.core.layout import group_length, padded_size
from qjax.core.specs import LearnedSpec

_BINS = 256  # of the dynamic program: exact for tables of up to so many values
_ROWS = 16  # tables at a time: each takes _BINS^2 numbers while it is begun
ITERATIONS = 20  # of Lloyd's; the dynamic program leaves it little to do
# From this share of exact zeros on a level is 0. One of four that is costs a tensor's table 16 % of squared error on a normal weight.
PINNED_FROM = 0.01
_FLOOR = 1e-6  # of the mean importance: what a value without importance has


class Learned(NamedTuple):
    """Codes int32 (stack, N, Kpad); scale float32 (stack, N, G) or None; levels float32 (stack, N or 1, 2^bits), ascending."""

    codes: jax.Array
    scale: jax.Array | None
    levels: jax.Array


def learned_encode(x: jax.Array, levels: jax.Array) -> jax.Array:
    """The code of the nearest level; a tie goes to the lower one.

    Args:
      x: (..., n).
      levels: (..., 2^bits), ascending, leading axes as those of `x` or 1.

    Returns:
      int32 codes, the shape of `x`.

    >>> learned_encode(jnp.float32([-2.0, 0.0, 0.6]), jnp.float32([-1.0, 0.0, 1.0, 2.0])).tolist()
    [0, 1, 2]
    """
    middle = (levels[..., 1:] + levels[..., :-1]) * 0.5
    code = jnp.zeros(x.shape, jnp.int32)
    for i in range(middle.shape[-1]):
        code = code + (x > middle[..., i : i + 1]).astype(jnp.int32)
    return code


def learned_decode(codes: jax.Array, levels: jax.Array) -> jax.Array:
    """`levels[codes]` in float32, by comparisons, which fuse into what follows; shapes as for `learned_encode`.

    >>> learned_decode(jnp.uint8([3, 0]), jnp.float32([-1.0, 0.0, 1.0, 2.0])).tolist()
    [2.0, -1.0]
    """
    levels = levels.astype(jnp.float32)
    out = jnp.broadcast_to(levels[..., :1], codes.shape)
    for i in range(1, levels.shape[-1]):
        out = jnp.where(codes == i, levels[..., i : i + 1], out)
    return out


def learn(w: jax.Array, importance: jax.Array | None, spec: LearnedSpec, iterations: int) -> Learned:
    """The table with the least sum of importance * (w - w_hat)^2 that k-means finds, and the codes.

    Tables begin with the best division of the sorted values, found by dynamic programming over at most 256 runs of equally many
    values, which is the optimum where a table has no more values; Lloyd's steps follow on all values, and the best table is kept. A level
    that no value is nearest to stays where it is. Where more than one value in a hundred of a matrix is exactly zero, a level of
    each table that serves zeros is 0, so that they stay zeros.

    Args:
      w: (stack, N, K), floating.
      importance: non-negative, broadcasts against `w`, of each value's squared error; None: all 1. A row without any counts as 1.
      spec: a `LearnedSpec`.
      iterations: Lloyd's steps.

    Returns:
      A `Learned`; levels and scales are numbers of the dtypes they are stored in.

    Source: SqueezeLLM (arXiv 2306.07629), eq. 3, with the diagonal of X^T X for its Fisher information, and k-means++ replaced by
    the dynamic program (Wang and Song, "Ckmeans.1d.dp", R Journal 2011).
    """
    w, given = w.astype(jnp.float32), importance is not None
    stack, n, k = w.shape
    importance = jnp.zeros((1, 1, 1), jnp.float32) if importance is None else importance.astype(jnp.float32)
    mean = jnp.mean(importance, axis=-1, keepdims=True)
    importance = jnp.broadcast_to(jnp.where(mean > 0, importance + _FLOOR * mean, 1.0), w.shape)
    padding = padded_size(k, spec) - k
    sparse = jnp.broadcast_to(jnp.mean(w == 0, axis=(1, 2), keepdims=True) > PINNED_FROM, w.shape)
    real = jnp.ones(w.shape, bool)
    w, importance, sparse, real = (jnp.pad(a, ((0, 0), (0, 0), (0, padding))) for a in (w, importance, sparse, real))
    scale, x, alike = None, w, jnp.ones(w.shape, jnp.float32)
    if isinstance(spec.granularity, PerGroup):
        blocked = w.reshape(stack, n, -1, group_length(k, spec))
        scale = round_scale(jnp.max(jnp.abs(blocked), axis=-1, keepdims=True), spec.scale_dtype)
        x = divide(blocked, jnp.where(scale == 0, 1.0, scale)).reshape(w.shape)
        alike = jnp.broadcast_to(jnp.square(scale), blocked.shape).reshape(w.shape)
        importance = importance * alike
        scale = scale[..., 0]
    tables = n if spec.per_row else 1
    rows = tuple(a.reshape(stack * tables, -1) for a in (x, sparse & (w == 0), real, importance, alike))
    if not given or rows[0].shape[1] <= _BINS:
        rows = rows[:4]
    levels = lax.map(lambda row: _table(spec, iterations, *row), rows, batch_size=min(_ROWS, stack * tables))
    levels = levels.reshape(stack, tables, -1)
    return Learned(learned_encode(x, levels), scale, levels)


def learn_canonical(w: jax.Array, spec: LearnedSpec, stacked: Sequence[int], iterations: int = ITERATIONS) -> Learned:
    """`learn`, all values alike, of an array (kept..., K): `stacked` kept axes hold independent arrays.

    Args:
      w: (kept..., K), floating.
      spec: a `LearnedSpec`.
      stacked: positions of kept axes.
      iterations: Lloyd's steps.

    Returns:
      A `Learned` with the kept axes in place of stack and N; 1 where they share a table.
    """
    *kept, k = w.shape
    order = [*sorted(stacked), *(i for i in range(len(kept)) if i not in stacked)]
    lead, rest = ([kept[i] for i in axes] for axes in (order[: len(stacked)], order[len(stacked) :]))
    back = [order.index(i) for i in range(len(kept))]
    found = learn(w.transpose(*order, len(kept)).reshape(math.prod(lead), math.prod(rest), k), None, spec, iterations)

    def place(a: jax.Array) -> jax.Array:
        full = a.shape[1] == math.prod(rest)
        return a.reshape(*lead, *(n if full else 1 for n in rest), a.shape[-1]).transpose(*back, len(kept))

    return jax.tree.map(place, found)


def learned_values(found: Learned) -> jax.Array:
    """What codes, scales and levels (kept..., each its own last) stand for: float32 (kept..., Kpad)."""
    values = learned_decode(found.codes, found.levels)
    if found.scale is None:
        return values
    blocked = values.reshape(*found.scale.shape, -1) * found.scale[..., None].astype(jnp.float32)
    return blocked.reshape(values.shape)


def _table(
    spec: LearnedSpec,
    iterations: int,
    x: jax.Array,
    zeros: jax.Array,
    real: jax.Array,
    importance: jax.Array,
    other: jax.Array | None = None,
) -> jax.Array:
    """The levels (2^bits,) of values x (n,).

    Args:
      spec: the spec.
      iterations: Lloyd's steps.
      x: (n,).
      zeros: bool (n,), zeros that are to stay.
      real: bool (n,), what is no padding.
      importance: (n,).
      other: (n,), an importance whose table may serve this one better, where what it begins with is not the optimum; or None.

    Returns:
      float32, ascending.
    """
    # In units of the largest value, so that squares of very small and very large weights stay in float32.
    unit = jnp.max(jnp.abs(x))
    unit = jnp.where(unit > 0, unit, 1.0)
    most = jnp.max(importance)
    weight = jnp.where(real, importance / jnp.where(most > 0, most, 1.0), 0.0)
    y, pinned = x / unit, jnp.any(zeros)

    def stored(levels: jax.Array) -> jax.Array:
        at = jnp.arange(levels.shape[0]) == jnp.argmin(jnp.abs(levels))
        levels = jnp.sort(jnp.where(pinned & at, 0.0, levels) * unit)
        return round_stored(levels, spec.level_dtype)

    def nearest(levels: jax.Array) -> jax.Array:  # `learned_encode` in a smaller program
        middle = (levels[1:] + levels[:-1]) * 0.5
        return jnp.sum(x[:, None] > middle[None, :], axis=1, dtype=jnp.int32)

    def error(levels: jax.Array) -> jax.Array:
        return jnp.sum(weight * jnp.square(y - levels[nearest(levels)] / unit))

    def step(_: int, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        levels, best, least = state
        mine = jnp.where(nearest(levels)[None, :] == jnp.arange(levels.shape[0])[:, None], weight[None, :], 0.0)
        count, sums = jnp.sum(mine, axis=1), jnp.sum(mine * y[None, :], axis=1)
        new = stored(jnp.where(count > 0, sums / jnp.where(count > 0, count, 1.0), levels / unit))
        now = error(new)
        return new, jnp.where(now < least, new, best), jnp.minimum(now, least)

    start = stored(divide_sorted(y, weight, 2**spec.bits))
    _, best, least = lax.fori_loop(0, iterations, step, (start, start, error(start)))
    if other is None:
        return best
    plain = _table(spec, iterations, x, zeros, real, other)
    return jnp.where(error(plain) < least, plain, best)


def divide_sorted(x: jax.Array, weight: jax.Array, count: int) -> jax.Array:
    """Means of the `count` runs of the sorted values with the least weighted sum of squares, by dynamic programming.

    Args:
      x: float32 (n,); runs begin and end between 256 parts of equally many values, or anywhere if there are fewer.
      weight: (n,), non-negative.
      count: of runs; fewer are used where there are fewer values, and the last mean repeats.

    Returns:
      float32 (count,), ascending.

    >>> divide_sorted(jnp.float32([5.0, 1.0, 1.2, 5.2, 9.0]), jnp.ones(5), 3).round(2).tolist() == jnp.float32([1.1, 5.1, 9.0]).tolist()
    True
    """
    order = jnp.argsort(jnp.where(weight > 0, x, jnp.inf))  # what has no weight takes no place among the others
    x, weight = x[order], weight[order]
    bins = min(_BINS, x.shape[0])
    edges = np.linspace(0, x.shape[0], bins + 1).round().astype(np.int32)
    part = jnp.asarray(np.repeat(np.arange(bins), np.diff(edges)))

    def prefix(values: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.zeros(bins).at[part].add(values))])

    sums, firsts, squares = prefix(weight), prefix(weight * x), prefix(weight * jnp.square(x))
    mass, first, square = (s[None, :] - s[:, None] for s in (sums, firsts, squares))
    cost = jnp.maximum(square - jnp.square(first) / jnp.where(mass > 0, mass, 1.0), 0.0)
    begin, end = jnp.arange(bins + 1)[:, None], jnp.arange(bins + 1)[None, :]
    cost = jnp.where(begin <= end, cost, jnp.inf)  # a run of nothing costs nothing

    def add(least: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return jnp.min(least[:, None] + cost, axis=0), least

    _, leasts = lax.scan(add, jnp.where(jnp.arange(bins + 1) == 0, 0.0, jnp.inf), None, length=count)

    def back(end: jax.Array, least: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        begin = jnp.argmin(least + cost[:, end]).astype(jnp.int32)
        return begin, (begin, end)

    _, (begin, end) = lax.scan(back, jnp.int32(bins), leasts, reverse=True)
    mass = sums[end] - sums[begin]
    mean = (firsts[end] - firsts[begin]) / jnp.where(mass > 0, mass, 1.0)
    # A run without values takes the mean of the one before it, the first the one behind.
    mean = lax.cummax(jnp.where(mass > 0, mean, -jnp.inf))
    return jnp.where(jnp.isfinite(mean), mean, jnp.min(jnp.where(jnp.isfinite(mean), mean, jnp.inf)))
