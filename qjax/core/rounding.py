"""Rounding to any spec, block by block and for a whole array: what `quantize` packs and what training computes with."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.core.affine import affine_decode, affine_encode, affine_params, divide, params_from_range
from qjax.core.codebook import codebook_decode, codebook_encode, codebook_params, table_scale
from qjax.core.floating import float_decode, float_encode, float_scale, global_scale
from qjax.core.granularity import PerChannel
from qjax.core.layout import (
    canonicalize,
    check_blocks,
    logical_blocks,
    negative_axes,
    real_values,
    stacked_positions,
    uncanonicalize,
)
from qjax.core.learned import learn_canonical, learned_values
from qjax.core.scales import is_nested, nest, unnest
from qjax.core.specs import BlockSpec, CastSpec, CodebookSpec, FloatSpec, IntSpec, LearnedSpec, Spec, has_global_scale

# How scales and zero points of blocks (..., group) are chosen: both (..., 1), the second None where the spec has none. Where blocks
# have scales over one of the whole tensor, that one is a third argument; where scales come from a mean and blocks are padded, `real` is
# given, by name.
Ranges = Callable[..., tuple[jax.Array, jax.Array | None]]


def check_finite(w: Any, name: str) -> None:
    """Refuse NaN and infinity. Looks at concrete arrays only: inside `jit` there is nothing to look at.

    Args:
      w: an array.
      name: what the error calls it.

    Raises:
      ValueError: naming the array and how many values are bad.

    >>> check_finite(jnp.float32([1.0, jnp.nan]), "layers/0/kernel")
    Traceback (most recent call last):
    ValueError: `layers/0/kernel` holds 1 NaN and 0 infinite values of 2; repair or exclude it before quantizing
    """
    if isinstance(w, Tracer):
        return
    with jax.ensure_compile_time_eval():
        w = jnp.asarray(w)
        if bool(_all_finite(w)):
            return
        nans, infinities = int(jnp.sum(jnp.isnan(w))), int(jnp.sum(jnp.isinf(w)))
    raise ValueError(f"`{name}` holds {nans} NaN and {infinities} infinite values of {w.size}; "
                     "repair or exclude it before quantizing")  # fmt: skip


def check_all_finite(weights: Mapping[str, Any]) -> None:
    """`check_finite` of many arrays, by what the error calls them: none is waited for before all are looked at.

    >>> check_all_finite({"up": jnp.ones(2), "down": jnp.float32([1.0, jnp.inf])})
    Traceback (most recent call last):
    ValueError: `down` holds 0 NaN and 1 infinite values of 2; repair or exclude it before quantizing
    """
    with jax.ensure_compile_time_eval():
        finite = jax.device_get({name: _all_finite(w) for name, w in weights.items()})
    for name, fine in finite.items():
        if not fine:
            check_finite(weights[name], name)


@jax.jit
def _all_finite(w: jax.Array) -> jax.Array:
    """One program for a shape instead of two."""
    return jnp.all(jnp.isfinite(w))


def checked(
    w: Any, spec: Spec, axes: Sequence[int], stacked: Sequence[int], name: str
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """The array and its negative axes, or the errors that `quantize` documents.

    >>> checked([[1.0]], IntSpec(4), (0,), (1,), "w")[1:]
    ((-2,), (-1,))
    """
    given, w = w, jnp.asarray(w)
    axes, stacked = check_shape(w, spec, axes, stacked, name)
    check_finite(given, name)
    return w, axes, stacked


def check_shape(
    w: jax.Array | jax.ShapeDtypeStruct, spec: Spec, axes: Sequence[int], stacked: Sequence[int], name: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The negative axes, or the errors that `quantize` documents of shapes and dtypes.

    >>> check_shape(jax.ShapeDtypeStruct((3, 2, 4), jnp.float32), IntSpec(4), (1,), (0,), "w")
    ((-2,), (-3,))
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating to be quantized, got {w.dtype}")
    if w.size == 0:
        raise ValueError(f"`{name}` has the shape {w.shape}: there is nothing to quantize")
    axes = negative_axes(axes, w.ndim, "axes")
    stacked = negative_axes(stacked, w.ndim, "stacked")
    if not axes or set(axes) & set(stacked):
        raise ValueError(f"`axes` must name at least one axis and none of `stacked`, got {axes=}, {stacked=}")
    kept = [n for i, n in enumerate(w.shape, -w.ndim) if i not in axes]
    check_blocks((*kept, math.prod(w.shape[a] for a in axes)), spec, name)
    return axes, stacked


def tensor_scale(blocked: jax.Array, spec: BlockSpec, stacked: Sequence[int] = ()) -> tuple[jax.Array, ...]:
    """What `block_params` needs to know of the whole tensor: nothing, or the one scale that blocks have theirs over.

    Args:
      blocked: (kept-like..., G, group), see `layout.blocks`.
      spec: what is rounded to.
      stacked: axes that hold independent tensors.

    Returns:
      (), or (float32 (stacked axes full, others 1),).

    >>> from qjax.core.specs import PerGroup
    >>> tensor_scale(jnp.ones((3, 2, 4)), IntSpec(4)), tensor_scale(jnp.ones((3, 2, 4)), FloatSpec("e2m1", PerGroup(4), "e4m3"))[0].shape
    ((), (1, 1, 1))
    """
    if not has_global_scale(spec):
        return ()
    axes = tuple(i for i in range(blocked.ndim) if i not in stacked)
    return (global_scale(jnp.max(jnp.abs(blocked.astype(jnp.float32)), axis=axes, keepdims=True), spec),)


def padding(k: int, spec: BlockSpec) -> dict[str, np.ndarray]:
    """What `block_params` needs to know of padded blocks: nothing, or which of their values count in a mean.

    Args:
      k: how many flattened contracted values there are.
      spec: what is rounded to.

    Returns:
      {}, or {"real": bool (G, group)}, see `layout.real_values`.

    >>> from qjax.core.named_specs import ternary
    >>> padding(6, IntSpec(4)), padding(3, ternary(group_size=2, pad=True))["real"].tolist()
    ({}, [[True, True], [True, False]])
    """
    real = real_values(k, spec) if spec.by_mean else None
    return {} if real is None else {"real": real}


def block_params(
    x: jax.Array, spec: BlockSpec, of_tensor: jax.Array | None = None, real: jax.Array | np.ndarray | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of each block: `affine_params`, `codebook_params` or `float_scale`.

    Args:
      x: (..., group), floating.
      spec: what is rounded to.
      of_tensor: see `tensor_scale`; None takes `x` for the whole tensor.
      real: see `padding`; None: all values are.

    Returns:
      (scale float32 (..., 1), zero_point int32 (..., 1) or None).

    >>> block_params(jnp.float32([[-15.0, 3.0]]), IntSpec(4))[0].tolist()
    [[2.0]]
    """
    if isinstance(spec, CodebookSpec):
        return codebook_params(x, spec, real), None
    if isinstance(spec, FloatSpec):
        hi = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return range_params(-hi, hi, spec, *(tensor_scale(x, spec) if of_tensor is None else (of_tensor,)))
    return affine_params(x, spec, real)


def range_params(
    lo: jax.Array, hi: jax.Array, spec: BlockSpec, of_tensor: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of values that lie in `lo .. hi`: `params_from_range`, the largest magnitude itself, or `float_scale`.

    Args:
      lo: lower ends, any shape, floating.
      hi: upper ends, the same shape.
      spec: what is rounded to.
      of_tensor: see `tensor_scale`.

    Returns:
      (scale float32, zero_point int32 or None), the shape of `lo`.

    >>> range_params(jnp.float32([-6.0]), jnp.float32([3.0]), FloatSpec("e2m1"))[0].tolist()
    [1.0]
    """
    if isinstance(spec, IntSpec):
        return params_from_range(lo, hi, spec)
    reach = jnp.maximum(-lo, hi).astype(jnp.float32)
    if isinstance(spec, FloatSpec):
        return float_scale(reach, spec, of_tensor), None
    return table_scale(reach, spec), None


def block_encode(x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: BlockSpec) -> jax.Array:
    """The codes of each block, int32: `affine_encode`, `codebook_encode` or `float_encode`.

    >>> block_encode(jnp.float32([[-15.0, 3.0]]), jnp.float32([[2.0]]), None, IntSpec(4)).tolist()
    [[-8, 2]]
    """
    if isinstance(spec, CodebookSpec):
        return codebook_encode(x, scale, spec)
    if isinstance(spec, FloatSpec):
        return float_encode(x, scale, spec)
    return affine_encode(x, scale, zero_point, spec)


def block_decode(codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: BlockSpec) -> jax.Array:
    """What the codes stand for, float32: `affine_decode`, `codebook_decode` or `float_decode`.

    >>> block_decode(jnp.int32([[-8, 2]]), jnp.float32([[2.0]]), None, IntSpec(4)).tolist()
    [[-16.0, 4.0]]
    """
    if isinstance(spec, CodebookSpec):
        return codebook_decode(codes, scale, spec)
    if isinstance(spec, FloatSpec):
        return float_decode(codes, scale, spec)
    return affine_decode(codes, scale, zero_point)


def round_cast(w: jax.Array, spec: CastSpec) -> jax.Array:
    """`w` in the 16-bit dtype; the barrier keeps XLA from dropping the cast when it sees the cast back.

    >>> round_cast(jnp.float32(1.001), CastSpec("bfloat16")).item()
    1.0
    """
    return jax.lax.optimization_barrier(w.astype(spec.dtype))


def round_trip(w: Any, spec: Spec, axes: Sequence[int], stacked: Sequence[int] = (), *, name: str = "w") -> jax.Array:
    """`quantize(w, spec, axes, stacked).dequantize()` to the bit, without packing.

    Args:
      w: floating array of any shape.
      spec: what to round to.
      axes: the axes that the operation contracts, as for `quantize`.
      stacked: kept axes that hold independent arrays, as for `quantize`.
      name: what an error calls the array.

    Returns:
      The shape and dtype of `w`.

    Raises:
      TypeError, ValueError: as `quantize`.

    >>> round_trip(jnp.float32([[7.5], [-3.2]]), IntSpec(4), (0,)).tolist()
    [[7.0], [-3.0]]
    """
    w, axes, stacked = checked(w, spec, axes, stacked, name)
    return _round_trip(w, spec, axes, stacked)


@functools.partial(jax.jit, static_argnames=("spec", "axes", "stacked"), inline=True)
def _round_trip(w: jax.Array, spec: Spec, axes: tuple[int, ...], stacked: tuple[int, ...]) -> jax.Array:
    if isinstance(spec, CastSpec):
        return round_cast(w, spec).astype(jnp.float32).astype(w.dtype)
    if isinstance(spec, IntSpec) and isinstance(spec.granularity, PerChannel) and not spec.by_mean:
        return _round_rows(w.astype(jnp.float32), spec, axes).astype(w.dtype)
    if isinstance(spec, LearnedSpec):
        values = learned_values(learn_canonical(canonicalize(w, axes), spec, stacked_positions(axes, stacked, w.ndim)))
        sizes = [w.shape[a] for a in axes]
        return uncanonicalize(values[..., : math.prod(sizes)], axes, sizes).astype(w.dtype)
    blocked, _, to_logical = logical_blocks(w, spec, axes, stacked)
    positions = stacked_positions(axes, stacked, w.ndim)
    scale, zero_point = block_params(
        blocked, spec, *tensor_scale(blocked, spec, positions), **padding(math.prod(w.shape[a] for a in axes), spec)
    )
    codes = block_encode(blocked, scale, zero_point, spec)
    if is_nested(spec):
        scale = unnest(*nest(scale[..., 0], positions))[..., None]
    return to_logical(block_decode(codes, scale, zero_point, spec)).astype(w.dtype)


def row_params(x: jax.Array, spec: IntSpec, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
    """`affine_params` of the rows that run along some axes, where they lie: no axis is moved.

    Args:
      x: float32, any shape.
      spec: integers whose scales come from extreme values.
      axes: the axes of a row.

    Returns:
      (scale float32, zero_point int32, float32 or None), the shape of `x` with 1 in place of `axes`.

    >>> row_params(jnp.float32([[-15.0], [3.0]]), IntSpec(4), (0,))[0].tolist()
    [[2.0]]
    """
    if spec.symmetric and spec.signed:
        hi = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        return params_from_range(-hi, hi, spec)
    return params_from_range(jnp.min(x, axis=axes, keepdims=True), jnp.max(x, axis=axes, keepdims=True), spec)


def _round_rows(x: jax.Array, spec: IntSpec, axes: tuple[int, ...]) -> jax.Array:
    """What `_round_trip` does for rows with a scale each: an array that is not moved is read and written once."""
    scale, zero_point = row_params(x, spec, axes)
    return affine_decode(affine_encode(x, scale, zero_point, spec), scale, zero_point)


def never_clips(spec: Spec) -> bool:
    """Whether ranges from the data hold every value, so that `in_range` is true everywhere.

    >>> never_clips(IntSpec(4)), never_clips(IntSpec(4, signed=False, symmetric=False))
    (True, False)
    """
    return not isinstance(spec, IntSpec) or spec.by_mean or (spec.symmetric and spec.signed)


def in_range(w: Any, spec: Spec, axes: Sequence[int], stacked: Sequence[int] = (), *, name: str = "w") -> jax.Array:
    """Where `qmin <= w / scale + zero_point <= qmax`: the values that rounding does not clip.

    Symmetric with `scale_rule="half"`: half a step more on both sides, because there the range ends half a step beyond
    the codes. The bounds are wider by the rounding of the scale, so that a block's extreme value is inside. A table, floats and
    a cast clip nothing, or by less than a step; scales from the mean clip much, and their published estimator has no mask.

    Args:
      w: floating array of any shape.
      spec: what to round to.
      axes: the axes that the operation contracts, as for `quantize`.
      stacked: kept axes that hold independent arrays, as for `quantize`.
      name: what an error calls the array.

    Returns:
      bool, the shape of `w`.

    Raises:
      TypeError, ValueError: as `quantize`.

    >>> in_range(jnp.float32([[3.0], [-3.0]]), IntSpec(4, signed=False), (0,)).tolist()
    [[True], [False]]

    Source: the mask of the straight-through estimator, e.g. LSQ (arXiv 1902.08153), there without the half step.
    """
    w, axes, stacked = checked(w, spec, axes, stacked, name)
    return _in_range(w, spec, axes, stacked)


@functools.partial(jax.jit, static_argnames=("spec", "axes", "stacked"), inline=True)
def _in_range(w: jax.Array, spec: Spec, axes: tuple[int, ...], stacked: tuple[int, ...]) -> jax.Array:
    if not isinstance(spec, IntSpec) or never_clips(spec):
        return jnp.ones(w.shape, bool)
    blocked, _, to_logical = logical_blocks(w, spec, axes, stacked)
    scale, zero_point = affine_params(blocked, spec)
    zero = 0.0 if zero_point is None else zero_point.astype(jnp.float32)
    beyond = 0.5 if spec.symmetric and spec.scale_rule == "half" else 0.0
    wider = 1.0 + float(jnp.finfo(spec.scale_dtype).eps)
    steps = divide(blocked.astype(jnp.float32), scale)
    least, most = (spec.qmin - beyond - zero) * wider, (spec.qmax + beyond - zero) * wider
    return to_logical((steps >= least) & (steps <= most))
