"""Packing codes that a method or a file gave: what `QTensor` says its arrays are, checked."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.core.elements import MINIFLOATS
from qjax.core.granularity import PerBlock
from qjax.core.layout import check_blocks, group_length, negative_axes, padded_size, stacked_positions
from qjax.core.qtensor import QTensor, check_overflow, pack_codes, zero_dtype
from qjax.core.reductions import divide
from qjax.core.rounding import check_finite
from qjax.core.scales import NESTED_BLOCK, is_nested, read_scale, store_scale, stored_scale_dtype
from qjax.core.specs import BlockSpec, CastSpec, FloatSpec, IntSpec, LearnedSpec, Spec, has_global_scale, signed_codes


def assemble(
    codes: Any,
    scale: Any,
    zero_point: Any,
    spec: Spec,
    axes: Sequence[int],
    sizes: Sequence[int],
    dtype: Any,
    perm: Any = None,
    *,
    input_scale: Any = None,
    stacked: Sequence[int] = (),
    nested_scale: Any = None,
    nested_offset: Any = None,
    levels: Any = None,
    name: str = "w",
) -> QTensor:
    """Pack codes that a method or a file gave into a `QTensor`.

    Args:
      codes: integers (kept..., K) or (kept..., Kpad), within the spec's range; for a cast the floats (kept..., K).
      scale: (kept-like..., G), each kept axis full, 1 or divided by the block; None for a cast, and for a learned table without
        groups. Floats; or, of a spec that stores them so, bytes.
      zero_point: integers, or floats with a floating `spec.zero_dtype`, of the shape of `scale`; None when the spec is symmetric.
      spec: what the codes mean.
      axes: logical axes that are contracted, in the order in which they are flattened; negative.
      sizes: their sizes.
      dtype: the logical dtype.
      perm: int32 (kept-like..., K), or None: stored position j holds the flattened index perm[j].
      input_scale: positive (kept-like..., K), or None: the codes stand for the weight times this.
      stacked: negative kept axes that hold independent arrays: with double quantization each has statistics of its own.
      nested_scale: for scales that are bytes, as `QTensor` has it; for float scales of NVFP4 the g that they are over, by default that
        under which the largest of them is 448.
      nested_offset: for scales that are the codes of double quantization, as `QTensor` has it.
      levels: (kept-like..., 2^bits), ascending, of a learned spec; else None.
      name: what an error calls the array.

    Returns:
      The `QTensor`.

    Raises:
      TypeError, ValueError: naming the argument whose dtype, shape or range does not fit.

    >>> assemble(np.int8([[7, -8]]), np.ones((1, 1)), None, IntSpec(4), (-2,), (2,), jnp.float32).dequantize().tolist()
    [[7.0], [-8.0]]
    """
    axes, sizes, dtype = tuple(map(int, axes)), tuple(map(int, sizes)), np.dtype(dtype)
    codes, k = jnp.asarray(codes), math.prod(sizes)
    ndim = codes.ndim - 1 + len(axes)
    if len(sizes) != len(axes) or negative_axes(axes, ndim, "axes") != axes:
        raise ValueError(f"`axes` must be negative, one for each of `sizes`, got {axes=}, {sizes=} for `{name}`")
    if isinstance(spec, CastSpec):
        _check_shape("codes", codes, [{n} for n in codes.shape[:-1]] + [{k}], name)
        if scale is not None or zero_point is not None:
            raise ValueError(f"`scale` and `zero_point` must be None for {spec}, the spec of `{name}`")
        codes = codes.astype(spec.dtype)
    elif isinstance(spec, LearnedSpec):
        codes, scale, levels = _checked_learned(codes, scale, zero_point, levels, spec, k, name)
    else:
        codes, scale, zero_point = _checked(codes, scale, zero_point, spec, k, name)
        positions = stacked_positions(axes, negative_axes(stacked, ndim, "stacked"), ndim)
        scale, nested_scale, nested_offset = _nested(scale, nested_scale, nested_offset, spec, positions, name)
    if perm is not None:
        perm = jnp.asarray(perm, jnp.int32)
        _check_shape("perm", perm, allowed_shapes(codes.shape[:-1], k, spec)["perm"], name)
        _check_permutation(perm, name)
    if input_scale is not None:
        input_scale = jnp.asarray(input_scale, jnp.float32)
        _check_shape("input_scale", input_scale, allowed_shapes(codes.shape[:-1], k, spec)["input_scale"], name)
        _check_positive(input_scale, name)
    if levels is not None and not isinstance(spec, LearnedSpec):
        raise ValueError(f"`levels` must be None for {spec}, the spec of `{name}`: only qjax.learned(...) keeps a table of its own")
    q = QTensor(codes, scale, zero_point, perm, spec, axes, sizes, dtype,
                input_scale=input_scale, nested_scale=nested_scale, nested_offset=nested_offset, levels=levels)  # fmt: skip
    if levels is not None:
        check_overflow(q, name)
    return q


def allowed_shapes(kept: Sequence[int], k: int, spec: Spec) -> dict[str, list[set[int]]]:
    """The sizes that each axis of the arrays beside the codes may have.

    Args:
      kept: sizes of the kept axes.
      k: how many values are contracted.
      spec: what the codes mean.

    Returns:
      By field of `QTensor`: for each axis the sizes that fit.

    >>> allowed_shapes((6,), 8, IntSpec(4))["scale"]
    [{1, 6}, {1}]
    """
    shared = [{1, n} for n in kept]
    shapes = {"perm": [*shared, {k}], "input_scale": [*shared, {k}]}
    if isinstance(spec, CastSpec):
        return shapes
    rows = [{n} for n in kept]
    if isinstance(spec, LearnedSpec):
        shapes["levels"] = [*(rows if spec.per_row else shared), {2**spec.bits}]
    scale = [*(rows if isinstance(spec, LearnedSpec) else shared), {padded_size(k, spec) // group_length(k, spec)}]
    if isinstance(spec.granularity, PerBlock) and kept:
        scale[-2] = scale[-2] | {kept[-1] // spec.granularity.kept}
    return shapes | {"scale": scale}


def _packed_codes(codes: jax.Array, spec: BlockSpec | LearnedSpec, k: int, lo: int, hi: int, name: str) -> jax.Array:
    """Codes (kept..., K) or (kept..., Kpad) from `lo` to `hi`, padded and packed, or an error that says what does not fit."""
    check_blocks((*codes.shape[:-1], k), spec, name)
    kept, padded = codes.shape[:-1], padded_size(k, spec)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"`codes` of `{name}` must hold integers, got {codes.dtype}")
    _check_shape("codes", codes, [{n} for n in kept] + [{k, padded}], name)
    _check_codes("codes", codes, lo, hi, name)
    if codes.shape[-1] < padded:
        codes = jnp.pad(codes, [(0, 0)] * len(kept) + [(0, padded - codes.shape[-1])])
    return pack_codes(codes, spec)


def _checked_learned(codes, scale, zero_point, levels, spec: LearnedSpec, k: int, name: str):
    """The packed codes, scale and levels of `assemble`, or an error that names the one that does not fit."""
    packed = _packed_codes(codes, spec, k, 0, 2**spec.bits - 1, name)
    if zero_point is not None or levels is None or (scale is None) == spec.grouped:
        raise ValueError(f"`levels` must be given, `zero_point` None and `scale` {'given' if spec.grouped else 'None'} for {spec}, "
                         f"the spec of `{name}`")  # fmt: skip
    levels, shapes = jnp.asarray(levels, spec.level_dtype), allowed_shapes(codes.shape[:-1], k, spec)
    _check_shape("levels", levels, shapes["levels"], name)
    if scale is not None:
        scale = _narrowed(jnp.asarray(scale), spec.scale_dtype, name)
        _check_shape("scale", scale, shapes["scale"], name)
    return packed, scale, levels


def _nested(scale: jax.Array, nested_scale: Any, nested_offset: Any, spec: BlockSpec, stacked: list[int], name: str):
    """The three arrays in which `assemble` stores scales, or an error that names the one that does not fit."""
    bytes_given = scale.dtype == jnp.uint8
    wanted = bytes_given and (is_nested(spec) or has_global_scale(spec)), bytes_given and is_nested(spec)
    given = nested_scale is not None, nested_offset is not None
    if given != wanted and not (has_global_scale(spec) and not given[1] and not bytes_given):
        raise ValueError(f"`nested_scale` and `nested_offset` of `{name}` must be {['None', 'given'][wanted[0]]} and "
                         f"{['None', 'given'][wanted[1]]} for {spec} with {scale.dtype} scales")  # fmt: skip
    like = [scale.shape[i] if i in stacked else 1 for i in range(scale.ndim - 1)]
    if nested_scale is not None:
        nested_scale = jnp.asarray(nested_scale, jnp.float32)
        count = -(-math.prod(scale.shape) // math.prod(like) // NESTED_BLOCK) if is_nested(spec) else 1
        _check_shape("nested_scale", nested_scale, [{n} for n in [*like, count]], name)
    if nested_offset is not None:
        nested_offset = jnp.asarray(nested_offset, jnp.float32)
        _check_shape("nested_offset", nested_offset, [{n} for n in [*like, 1]], name)
    if bytes_given:
        return scale, nested_scale, nested_offset
    if has_global_scale(spec) and nested_scale is None:
        axes = tuple(i for i in range(scale.ndim) if i not in stacked)
        nested_scale = divide(jnp.full([*like, 1], 448.0), jnp.max(scale, axis=axes, keepdims=True))
    stored = store_scale(scale, spec, stacked, nested_scale)
    if not is_nested(spec) and isinstance(spec, FloatSpec):
        _check_scale_is(read_scale(*stored, spec), scale, spec, name)
    return stored


def _check_scale_is(stored: jax.Array, given: jax.Array, spec: BlockSpec, name: str) -> None:
    if isinstance(stored, Tracer) or spec.scale_dtype not in ("e8m0", "e4m3"):
        return
    if not np.allclose(np.asarray(stored), np.asarray(given), rtol=1e-6, atol=0):
        raise ValueError(f"`scale` of `{name}` must hold {spec.scale_dtype} numbers (over `nested_scale`), as block_params gives them")


def _checked(codes, scale, zero_point, spec: BlockSpec, k: int, name: str):
    """The packed codes, scale and zero point of `assemble`, or an error that names the one that does not fit."""
    lo, hi = (spec.qmin, spec.qmax) if isinstance(spec, IntSpec) else (-127, 127) if signed_codes(spec) else (0, 2**spec.bits - 1)
    packed = _packed_codes(codes, spec, k, lo, hi, name)
    _check_no_nan(codes, spec, name)
    scale = jnp.asarray(scale)
    as_bytes = stored_scale_dtype(spec) == "uint8"
    if not (as_bytes and scale.dtype == jnp.uint8):
        scale = scale.astype(jnp.float32) if as_bytes else _narrowed(scale, spec.scale_dtype, name)
    _check_shape("scale", scale, allowed_shapes(codes.shape[:-1], k, spec)["scale"], name)
    if (zero_point is None) == (isinstance(spec, IntSpec) and not spec.symmetric):
        wanted = "given" if zero_point is None else "None"
        raise ValueError(f"`zero_point` must be {wanted} for {spec}, the spec of `{name}`")
    if zero_point is not None:
        zero_point = jnp.asarray(zero_point)
        _check_shape("zero_point", zero_point, [{n} for n in scale.shape], name)
        if isinstance(spec, IntSpec) and spec.float_zero:
            check_finite(zero_point.astype(zero_dtype(spec)), f"zero_point of {name}")
        else:
            _check_codes("zero_point", zero_point, lo, hi, name)
        zero_point = zero_point.astype(zero_dtype(spec))
    return packed, scale, zero_point


def _narrowed(scale: jax.Array, dtype: str, name: str) -> jax.Array:
    """Scales in the dtype they are stored in, which must hold them: the codes were chosen for these and no others."""
    stored = scale.astype(dtype)
    if isinstance(scale, Tracer) or dtype == "float32":
        return stored
    with jax.ensure_compile_time_eval():
        above, lost = jnp.any(jnp.isinf(stored)), jnp.any((stored == 0) & (scale != 0))
        if bool(above | lost):
            what = "the largest" if bool(above) else "the smallest, which would be 0,"
            raise ValueError(f"`scale_dtype`={dtype!r} cannot hold {what} of the scales of `{name}`; take a spec with "
                             'scale_dtype="float32" or "bfloat16"')  # fmt: skip
    return stored


def _check_shape(argument: str, array: jax.Array, allowed: list[set[int]], name: str) -> None:
    if array.ndim != len(allowed) or any(n not in a for n, a in zip(array.shape, allowed, strict=True)):
        wanted = ", ".join(" or ".join(map(str, sorted(a))) for a in allowed)
        raise ValueError(f"`{argument}` of `{name}` must have the shape ({wanted}), got {array.shape}")


def _check_codes(argument: str, codes: jax.Array, lo: int, hi: int, name: str) -> None:
    if isinstance(codes, Tracer) or codes.size == 0:
        return
    with jax.ensure_compile_time_eval():
        least, most = map(int, _ends(codes))
    if least < lo or most > hi:
        raise ValueError(f"`{argument}` of `{name}` must lie in {lo} .. {hi}, got {least} .. {most}; clamp them")


@jax.jit
def _ends(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(codes), jnp.max(codes)


def _check_no_nan(codes: jax.Array, spec: BlockSpec, name: str) -> None:
    element = MINIFLOATS.get(spec.element) if isinstance(spec, FloatSpec) else None
    if element is not None and element.bits == 8:
        _check_codes("codes", codes & 127, 0, element.largest_code, f"{name}` without the sign `")


def _check_permutation(perm: jax.Array, name: str) -> None:
    if isinstance(perm, Tracer):
        return
    if np.any(np.sort(np.asarray(perm), axis=-1) != np.arange(perm.shape[-1])):
        raise ValueError(f"`perm` of `{name}` must hold each of 0 .. {perm.shape[-1] - 1} once along its last axis")


def _check_positive(scale: jax.Array, name: str) -> None:
    if isinstance(scale, Tracer):
        return
    if not np.all((np.asarray(scale) > 0) & np.isfinite(scale)):
        raise ValueError(f"`input_scale` of `{name}` must be positive and finite, got {np.min(scale)} .. {np.max(scale)}")
