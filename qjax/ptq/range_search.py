"""Search for the range that rounds a block best: clipping a few large values can pay for a finer grid."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.core import CodebookSpec, IntSpec, block_decode, block_encode, codebook_params, divide, params_from_range

# The setting of GPTQ's authors: 80 ranges, 1.00 down to 0.21 of the full one, and the norm 2.4.
SHRINK = np.asarray(1 - np.arange(80) / 100, np.float32)
_NORM = 2.4


def search_range(blocks: jax.Array, spec: IntSpec | CodebookSpec) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point, among shrunken ranges, with the least rounding error of each block.

    `argmin over p in {1, .99, ..., .21} of sum_i |decode(encode(x_i; p * range)) - x_i|^2.4`; the largest wins a tie.
    With two bits and a zero point both integers next to the ideal zero point are tried.

    Args:
      blocks: (..., group), floating, finite; each block shares one scale.
      spec: what is rounded to. For a table the range is its absmax.

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
    # |error|^2.4 of very small and very large blocks leaves float32: errors are counted in units of the block's reach.
    reach = jnp.log(jnp.maximum(jnp.maximum(-lo, hi), jnp.finfo(jnp.float32).tiny))

    def step(i, best):
        for candidate in _candidates(lo * shrink[i], hi * shrink[i], spec):
            best = _keep_better(best, _error(x, reach, *candidate, spec), candidate)
        return best

    first = _candidates(lo, hi, spec)[0]
    _, (scale, zero_point) = lax.fori_loop(0, len(SHRINK), step, (jnp.full(lo.shape, jnp.inf, jnp.float32), first))
    return scale, zero_point


def _candidates(lo: jax.Array, hi: jax.Array, spec: IntSpec | CodebookSpec):
    if isinstance(spec, CodebookSpec):
        return [(codebook_params(jnp.maximum(-lo, hi), spec), None)]
    scale, zero_point = params_from_range(lo, hi, spec)
    if zero_point is None or spec.bits != 2 or spec.float_zero:
        return [(scale, zero_point)]
    ideal = spec.qmin - divide(jnp.minimum(lo, 0.0), scale)
    below, above = (jnp.clip(f(ideal), spec.qmin, spec.qmax).astype(jnp.int32) for f in (jnp.floor, jnp.ceil))
    return [(scale, zero_point), (scale, jnp.where(zero_point == below, above, below))]


def _error(x: jax.Array, reach: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: IntSpec | CodebookSpec) -> jax.Array:
    rounded = block_decode(block_encode(x, scale, zero_point, spec), scale, zero_point, spec)
    # exp and log, not a power, for which XLA's CPU backend calls a scalar function (4 times slower). exp(log(0)) is 0.
    return jnp.sum(jnp.exp(_NORM * (jnp.log(jnp.abs(rounded - x)) - reach)), axis=-1, keepdims=True)


def _keep_better(best, error: jax.Array, params):
    best_error, best_params = best
    better = error < best_error
    params = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best_params)
    return jnp.where(better, error, best_error), params
