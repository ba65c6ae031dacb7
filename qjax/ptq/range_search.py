"""Search for the range that rounds a block best: clipping a few large values can pay for a finer grid."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.core import (
    BlockSpec,
    FloatSpec,
    IntSpec,
    block_decode,
    block_encode,
    block_params,
    divide,
    neighbour_scale,
    params_from_range,  # noqa: F401  # for the example
    range_params,
    tensor_scale,
)

# The setting of GPTQ's authors: 80 ranges, 1.00 down to 0.21 of the full one, and the norm 2.4.
SHRINK = np.asarray(1 - np.arange(80) / 100, np.float32)
_NORM = 2.4
# Scales of one byte that are tried, in steps from the usual one: half to twice of it. E4M3 has 8 steps in a factor of two; 5 above
# the usual one is the scale under which the largest weight becomes 4 and not 6.
_STEPS = {"e8m0": (0, -1, 1), "e4m3": (0, *(sign * i for i in range(1, 9) for sign in (-1, 1)))}

Params = tuple[jax.Array, jax.Array | None]


def search_range(
    blocks: jax.Array, spec: BlockSpec, of_tensor: jax.Array | None = None, real: jax.Array | np.ndarray | None = None
) -> Params:
    """The scale and zero point, among shrunken ranges, with the least rounding error of each block.

    `argmin over p in {1, .99, ..., .21} of sum_i |decode(encode(x_i; p * range)) - x_i|^2.4`; the largest wins a tie.
    With two bits and a zero point both integers next to the ideal zero point are tried. Scales of one byte are tried themselves: the
    powers of two beside the usual one, the E4M3 numbers between half and twice of it. Of scales that come from a mean, that one first.

    Args:
      blocks: (..., group), floating, finite; each block shares one scale.
      spec: what is rounded to. For a table the range is its absmax.
      of_tensor: see `tensor_scale`.
      real: which values are no padding, broadcasts against `blocks`; None: all, or padding does not matter.

    Returns:
      (scale float32 (..., 1), rounded to `spec.scale_dtype`; zero_point int32 (..., 1) or None).

    >>> block = jnp.float32([[10.0] + [1.0, -1.0] * 200])
    >>> absmax, _ = params_from_range(jnp.float32([-10.0]), jnp.float32([10.0]), IntSpec(2))
    >>> scale, _ = search_range(block, IntSpec(2))
    >>> bool(scale.item() < absmax.item())
    True

    Source: GPTQ's `Quantizer.find_params` with `mse` (github.com/IST-DASLab/gptq) and gptqmodel 7.7, which has the
    second zero point for two bits. There a symmetric block without a negative value gets half the scale, and values
    above the largest code are clipped; here it gets the symmetric grid like every other.
    """
    x = blocks.astype(jnp.float32)
    lo, hi = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    shrink = jnp.asarray(SHRINK)
    count, candidate = candidates(x, spec, SHRINK, of_tensor, real)
    # |error|^2.4 of very small and very large blocks leaves float32: errors are counted in units of the block's reach.
    reach = jnp.log(jnp.maximum(jnp.maximum(-lo, hi), jnp.finfo(jnp.float32).tiny))

    def step(i, best):
        tried = candidate(i)
        for params in (tried, *_other_zero_point(lo * shrink[i], tried, spec)):
            best = _keep_better(best, _error(x, reach, *params, spec, real), params)
        return best

    worst = jnp.full(lo.shape, jnp.inf, jnp.float32)
    _, (scale, zero_point) = lax.fori_loop(0, count, step, (worst, candidate(jnp.int32(0))))
    return scale, zero_point


def candidates(
    x: jax.Array, spec: BlockSpec, shares: np.ndarray, of_tensor: jax.Array | None = None, real: jax.Array | np.ndarray | None = None
) -> tuple[int, Callable[[jax.Array], Params]]:
    """The scales and zero points that a search tries, the usual ones first.

    Args:
      x: float32 (..., group).
      spec: what is rounded to.
      shares: of the range of a block, where ranges are shrunk; the first is 1.
      of_tensor: see `tensor_scale`.
      real: as for `search_range`.

    Returns:
      How many there are, and a function from the index of one, int32, to it: both (..., 1), the second None where the spec has none.

    >>> count, candidate = candidates(jnp.float32([[-7.0, 3.5]]), IntSpec(4, scale_rule="full"), np.float32([1.0, 0.5]))
    >>> count, candidate(jnp.int32(1))[0].tolist()
    (2, [[0.5]])
    """
    lo, hi = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    if of_tensor is None:
        of_tensor = next(iter(tensor_scale(x, spec)), None)
    if isinstance(spec, FloatSpec) and spec.scale_dtype in _STEPS:
        steps, reach = jnp.asarray(_STEPS[spec.scale_dtype], jnp.int32), jnp.maximum(-lo, hi)
        return len(steps), lambda i: (neighbour_scale(reach, steps[i], spec, of_tensor), None)
    by_share = jnp.asarray(shares, jnp.float32)
    if not spec.by_mean:
        return len(shares), lambda i: range_params(lo * by_share[i], hi * by_share[i], spec)
    usual = block_params(x, spec, real=real)[0]

    def after_usual(i: jax.Array) -> Params:
        share = by_share[jnp.maximum(i - 1, 0)]
        return jnp.where(i == 0, usual, range_params(lo * share, hi * share, spec)[0]), None

    return len(shares) + 1, after_usual


def _other_zero_point(lo: jax.Array, tried: Params, spec: BlockSpec) -> list[Params]:
    """With two bits, the integer on the other side of the ideal zero point."""
    scale, zero_point = tried
    if zero_point is None or not isinstance(spec, IntSpec) or spec.bits != 2 or spec.float_zero:
        return []
    ideal = spec.qmin - divide(jnp.minimum(lo, 0.0), scale)
    below, above = (jnp.clip(f(ideal), spec.qmin, spec.qmax).astype(jnp.int32) for f in (jnp.floor, jnp.ceil))
    return [(scale, jnp.where(zero_point == below, above, below))]


def _error(
    x: jax.Array, reach: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: BlockSpec, real: Any = None
) -> jax.Array:
    rounded = block_decode(block_encode(x, scale, zero_point, spec), scale, zero_point, spec)
    # exp and log, not a power, for which XLA's CPU backend calls a scalar function (4 times slower). exp(log(0)) is 0.
    error = jnp.exp(_NORM * (jnp.log(jnp.abs(rounded - x)) - reach))
    return jnp.sum(error if real is None else jnp.where(real, error, 0.0), axis=-1, keepdims=True)


def _keep_better(best, error: jax.Array, params):
    best_error, best_params = best
    better = error < best_error
    params = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best_params)
    return jnp.where(better, error, best_error), params
