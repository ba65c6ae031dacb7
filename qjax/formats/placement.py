"""Packed arrays by shape alone: whether codes and scales fit their spec, and how a logical sharding cuts them."""

import math
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from qjax.core import (
    ARRAYS,
    CastSpec,
    IntSpec,
    LearnedSpec,
    QTensor,
    check_blocks,
    has_global_scale,
    is_nested,
    packed_length,
    padded_size,
    signed_codes,
    stored_scale_dtype,
)
from qjax.core.assemble import allowed_shapes
from qjax.core.layout import negative_axes
from qjax.core.scales import NESTED_BLOCK

Axes = tuple[str, ...]


def check_packed(q: QTensor, name: str) -> None:
    """Checks that the arrays of a `QTensor` have the shapes and dtypes that its static fields call for.

    Args:
      q: with anything that has a shape and a dtype for arrays.
      name: what errors call it.

    Raises:
      ValueError: naming what does not fit.

    >>> from qjax.core import int4, quantize
    >>> check_packed(quantize(np.ones((8, 2), np.float32), int4(), axes=(0,)), "w")
    """
    spec, kept, k = q.spec, q.codes.shape[:-1], math.prod(q.sizes)
    ndim = len(kept) + len(q.axes)
    if not q.codes.shape or len(q.sizes) != len(q.axes) or not q.axes or min(q.sizes) < 1:
        raise ValueError(f"`{name}` has contracted axes {q.axes} of sizes {q.sizes}, which no quantized array has")
    if negative_axes(q.axes, ndim, "axes") != q.axes:
        raise ValueError(f"`{name}` has the axes {q.axes}: they must count from the end")
    check_blocks((*kept, k), spec, name)
    padded = padded_size(k, spec)
    cast = isinstance(spec, CastSpec)
    code = spec.dtype if cast else "int8" if signed_codes(spec) and spec.bits == 8 else "uint8"
    length = k if cast else padded if spec.bits == 8 else packed_length(padded, spec.bits)
    _check("codes", q.codes, code, [{n} for n in kept] + [{length}], name)
    asymmetric = isinstance(spec, IntSpec) and not spec.symmetric
    learned = isinstance(spec, LearnedSpec)
    no_scale = cast or (isinstance(spec, LearnedSpec) and not spec.grouped)
    if (q.levels is None) == learned:
        raise ValueError(f"`{name}` must have {'a' if learned else 'no'} table of levels for {spec}")
    if (q.scale is None) != no_scale or (q.zero_point is None) == asymmetric:
        raise ValueError(
            f"`{name}` must have {'no' if no_scale else 'a'} scale and {'a' if asymmetric else 'no'} zero point for {spec}"
        )
    shapes = allowed_shapes(kept, k, spec)
    if isinstance(spec, LearnedSpec):
        _check("levels", q.levels, spec.level_dtype, shapes["levels"], name)
    if not isinstance(spec, CastSpec) and not no_scale:
        stored = spec.scale_dtype if isinstance(spec, LearnedSpec) else stored_scale_dtype(spec)
        _check("scale", q.scale, stored, shapes["scale"], name)
    if q.zero_point is not None:
        kind = spec.zero_dtype if isinstance(spec, IntSpec) and spec.float_zero else "int8" if signed_codes(spec) else "uint8"
        _check("zero_point", q.zero_point, kind, [{n} for n in q.scale.shape], name)
    if q.perm is not None:
        _check("perm", q.perm, "int32", shapes["perm"], name)
    if q.input_scale is not None:
        _check("input_scale", q.input_scale, "float32", shapes["input_scale"], name)
    _check_nested(q, name)
    _check_adapter(q, name)
    _check_activations(q, name)


def _check_adapter(q: QTensor, name: str) -> None:
    if (q.adapter_left is None) != (q.adapter_right is None):
        raise ValueError(f"`{name}` must have both parts of an adapter or neither")
    if q.adapter_left is None:
        return
    kept, dtype = q.codes.shape[:-1], np.dtype(q.adapter_left.dtype).name
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"`adapter_left` of `{name}` must be floating, not {dtype}")
    rank = q.adapter_left.shape[-1]
    _check("adapter_left", q.adapter_left, dtype, [{n} for n in kept] + [{rank}], name)
    _check("adapter_right", q.adapter_right, dtype, [{1, n} for n in kept] + [{rank * math.prod(q.sizes)}], name)


def _check_nested(q: QTensor, name: str) -> None:
    if (q.nested_scale is None) == (is_nested(q.spec) or has_global_scale(q.spec)) or (q.nested_offset is None) == is_nested(q.spec):
        raise ValueError(f"`{name}` must have nested scales, and only those, that {q.spec} calls for")
    if q.nested_scale is not None:
        like = [{1, n} for n in q.scale.shape[:-1]]
        own = zip(q.nested_scale.shape[:-1], q.scale.shape[:-1], strict=False)
        each = math.prod(q.scale.shape) // math.prod(n for o, n in own if o == n)
        _check("nested_scale", q.nested_scale, "float32", [*like, {-(-each // NESTED_BLOCK) if is_nested(q.spec) else 1}], name)
    if q.nested_scale is not None and q.nested_offset is not None:
        _check("nested_offset", q.nested_offset, "float32", [*([{n} for n in q.nested_scale.shape[:-1]]), {1}], name)


def _check_activations(q: QTensor, name: str) -> None:
    static = q.act is not None and q.act.static
    asymmetric = q.act is not None and static and not q.act.spec.symmetric
    if (q.act_scale is not None) != static or (q.act_zero_point is not None) != asymmetric:
        raise ValueError(f"`{name}` must have the ranges of static activations, and only those, for {q.act}")
    for field, dtype in (("act_scale", "float32"), ("act_zero_point", "int32")):
        if getattr(q, field) is not None:
            _check(field, getattr(q, field), dtype, [{1, n} for n in q.codes.shape[:-1]] + [{1}], name)


def _check(field: str, array: Any, dtype: str, allowed: list[set[int]], name: str) -> None:
    fits = len(array.shape) == len(allowed) and all(n in a for n, a in zip(array.shape, allowed, strict=True))
    if not fits or np.dtype(array.dtype) != np.dtype(dtype):
        wanted = ", ".join(" or ".join(map(str, sorted(a))) for a in allowed)
        raise ValueError(
            f"`{field}` of `{name}` must be {dtype} of shape ({wanted}), not {np.dtype(array.dtype)} of {array.shape}"
        )


def place_array(shape: tuple[int, ...], sharding: Sharding, name: str) -> Sharding:
    """Checks that a sharding divides an array.

    Args:
      shape: of the array.
      sharding: what the caller asks for.
      name: what errors call the array.

    Returns:
      `sharding`.

    Raises:
      ValueError: it does not divide the array.
    """
    if isinstance(sharding, NamedSharding):
        _divided(shape, sharding, name)
    return sharding


def place_packed(q: QTensor, sharding: Sharding, name: str) -> dict[str, Sharding]:
    """Carries a sharding of the logical array over to the packed arrays: each shard decodes by itself.

    Kept axes are cut as they are. Of the contracted axes the first one (in the order in which they are flattened) may
    be cut, where the cuts fall between bytes and between groups.

    Args:
      q: with anything that has a shape for arrays.
      sharding: of the logical array: a `NamedSharding`, or any that keeps the array whole.
      name: what errors call the array.

    Returns:
      A sharding for each array that `q` has, by field.

    Raises:
      TypeError: another kind of sharding.
      ValueError: it does not divide the array, or would cut a padded or permuted axis, a byte, a group or a block.
    """
    fields = {field: getattr(q, field) for field in ARRAYS}
    fields = {field: array for field, array in fields.items() if array is not None}
    if not isinstance(sharding, NamedSharding):
        if not sharding.is_fully_replicated:
            raise TypeError(f"`sharding` of `{name}` must be a NamedSharding to cut a quantized array, got {sharding}")
        return dict.fromkeys(fields, sharding)
    logical = _divided(q.shape, sharding, name)
    kept = [axes for i, axes in enumerate(logical) if i - q.ndim not in q.axes]
    last = _contracted(q, [logical[i] for i in q.axes], sharding, name)
    specs = {}
    for field, array in fields.items():
        cut = [_kept(field, array.shape[i], n, axes, sharding, name)
               for i, (n, axes) in enumerate(zip(q.codes.shape[:-1], kept, strict=True))]  # fmt: skip
        whole = field in ("perm", "nested_scale", "levels", "adapter_left") or (field != "codes" and array.shape[-1] == 1)
        cut = [*cut, () if whole else last]
        while cut and not cut[-1]:  # P() and P(None) are the same to jax and do not compare equal
            cut.pop()
        specs[field] = PartitionSpec(*(axes or None for axes in cut))
    return {
        field: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind) for field, spec in specs.items()
    }


def _what(sharding: NamedSharding, name: str) -> str:
    return f"`sharding` {sharding.spec} of `{name}`"


def _divided(shape: tuple[int, ...], sharding: NamedSharding, name: str) -> list[Axes]:
    """The mesh axes that cut each axis of an array, after checking that they divide it."""
    spec = tuple(sharding.spec)
    if len(spec) > len(shape):
        raise ValueError(f"{_what(sharding, name)} has more axes than its shape {shape}; give a callable instead")
    cut: list[Axes] = []
    for n, entry in zip(shape, (*spec, *[None] * (len(shape) - len(spec))), strict=True):
        if entry is not None and not isinstance(entry, (str, tuple)):
            raise ValueError(f"{_what(sharding, name)} must name mesh axes or None for every axis")
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        if n % _count(axes, sharding):
            raise ValueError(f"{_what(sharding, name)} cuts an axis of {n} into {_count(axes, sharding)} ({shape=})")
        cut.append(axes)
    return cut


def _count(axes: Axes, sharding: NamedSharding) -> int:
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def _contracted(q: QTensor, cut: list[Axes], sharding: NamedSharding, name: str) -> Axes:
    """The mesh axes that cut the flattened contracted axis, or an error that says what they would cut through."""
    first = next((i for i, n in enumerate(q.sizes) if n > 1), 0)
    pieces = [_count(axes, sharding) for axes in cut]
    n = pieces[first]
    if any(p > 1 for i, p in enumerate(pieces) if i != first):
        raise ValueError(
            f"{_what(sharding, name)} cuts one of the contracted axes {q.axes} that is not the first: their codes lie "
            "flattened, cut the first one or a kept axis"
        )
    if n == 1:
        return ()
    k, bits = math.prod(q.sizes), q.spec.bits
    problem = None
    if padded_size(k, q.spec) != k:
        problem = f"the contracted axis, which is padded from {k} to {padded_size(k, q.spec)} values"
    elif q.perm is not None:
        problem = "the contracted axis, whose order is permuted (act_order without static_groups)"
    elif (k // n) * bits % 8:
        problem = f"a byte: {k // n} values of {bits} bits"
    elif q.scale is not None and q.scale.shape[-1] > 1 and q.scale.shape[-1] % n:
        problem = f"a group: {q.scale.shape[-1]} groups do not divide by {n}"
    if problem:
        raise ValueError(f"{_what(sharding, name)} would cut {problem}; cut a kept axis, or keep it whole")
    return cut[first]


def _kept(field: str, count: int, n: int, axes: Axes, sharding: NamedSharding, name: str) -> Axes:
    """The mesh axes for one kept axis of `field`, which has `count` entries where the codes have `n`."""
    if count == 1 and n != 1:
        return ()
    if count % _count(axes, sharding):
        raise ValueError(f"{_what(sharding, name)} would cut a block: {n} values have {count} scales in `{field}`")
    return axes
