"""Views of a QTensor that move no float: the same transpose, reshape or slice on the packed arrays.

Each function returns what the view of the dequantized array would be, as a `QTensor`, or None where that needs numbers
to be decoded: a contracted axis that is sliced, a kept and a contracted axis that are merged, and the like. None is an
answer, not an error: the caller dequantizes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.qtensor import ARRAYS, QTensor, with_plain_scales


def _contracted(q: QTensor) -> list[int]:
    """Logical positions of the contracted axes, in the order in which they are flattened."""
    return [a + q.ndim for a in q.axes]


def _kept(q: QTensor) -> list[int]:
    contracted = _contracted(q)
    return [i for i in range(q.ndim) if i not in contracted]


def _blocked_over(q: QTensor) -> list[int]:
    """Logical positions of the kept axes, in their order, over which blocks of nested scales run; [] without double quantization."""
    if q.nested_offset is None:
        return []
    return [i for i, own in zip(_kept(q), q.nested_offset.shape[:-1], strict=True) if own == 1 and q.shape[i] != 1]


def _map_arrays(q: QTensor, f: Callable[[Any], Any], **static) -> QTensor:
    """`f` on every array inside; they have one axis for each kept axis, then the last."""
    arrays = {name: getattr(q, name) for name in ARRAYS}
    return dataclasses.replace(q, **{n: None if a is None else f(a) for n, a in arrays.items()}, **static)


def transpose(q: QTensor, permutation: Sequence[int]) -> QTensor:
    """`lax.transpose`. Always possible: the flattening order of the contracted axes is part of a `QTensor`.

    Args:
      q: any `QTensor`.
      permutation: as for `lax.transpose`; axis i of the result is axis permutation[i] of `q`.

    Returns:
      A `QTensor`.

    >>> from qjax.core import int4, quantize
    >>> transpose(quantize(jnp.ones((4, 6)), int4(), axes=(0,)), (1, 0)).shape
    (6, 4)
    """
    permutation = [int(p) for p in permutation]
    kept = _kept(q)
    if q.form is not None and [p for p in permutation if p in kept] != kept:
        q = q.plain()
    if [p for p in permutation if p in _blocked_over(q)] != _blocked_over(q):
        q = with_plain_scales(q)  # blocks of 256 scales run over these axes in their order
    order = [kept.index(p) for p in permutation if p in kept]  # as it is where the codes have a kernel's layout
    axes = tuple(permutation.index(a) - q.ndim for a in _contracted(q))
    return _map_arrays(q, lambda a: jnp.transpose(a, (*order, len(order))), axes=axes)


def squeeze(q: QTensor, dimensions: Sequence[int]) -> QTensor:
    """`lax.squeeze`: remove axes of size 1.

    Args:
      q: any `QTensor`.
      dimensions: logical axes of size 1.

    Returns:
      A `QTensor`.

    >>> from qjax.core import int4, quantize
    >>> squeeze(quantize(jnp.ones((1, 1, 8, 6)), int4(), axes=(0, 1, 2)), (0, 1)).shape
    (8, 6)
    """
    q = q.plain()
    gone = {int(d) % q.ndim for d in dimensions}
    rest = [i for i in range(q.ndim) if i not in gone]
    kept_gone = tuple(n for n, i in enumerate(_kept(q)) if i in gone)
    stay = [(rest.index(a) - len(rest), size) for a, size in zip(_contracted(q), q.sizes, strict=True) if a not in gone]
    axes, sizes = tuple(a for a, _ in stay), tuple(size for _, size in stay)
    return _map_arrays(q, lambda a: jnp.squeeze(a, kept_gone), axes=axes, sizes=sizes)


def broadcast_in_dim(q: QTensor, shape: Sequence[int], broadcast_dimensions: Sequence[int]) -> QTensor | None:
    """`lax.broadcast_in_dim`, when it only adds axes of size 1.

    Args:
      q: any `QTensor`.
      shape: the shape wanted.
      broadcast_dimensions: increasing; axis i of `q` becomes axis broadcast_dimensions[i].

    Returns:
      A `QTensor`; or None where values are repeated.

    >>> from qjax.core import int4, quantize
    >>> q = quantize(jnp.ones((4, 6)), int4(), axes=(0,))
    >>> broadcast_in_dim(q, (1, 4, 6), (1, 2)).shape, broadcast_in_dim(q, (2, 4, 6), (1, 2))
    ((1, 4, 6), None)
    """
    if math.prod(shape) != q.size or tuple(shape[d] for d in broadcast_dimensions) != q.shape:
        return None
    q = q.plain()
    contracted = [broadcast_dimensions[a] for a in _contracted(q)]
    kept = [i for i in range(len(shape)) if i not in contracted]
    new = tuple(n for n, i in enumerate(kept) if i not in broadcast_dimensions)
    return _map_arrays(q, lambda a: jnp.expand_dims(a, new), axes=tuple(a - len(shape) for a in contracted))


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """The shortest runs of old and new axes with equal products. No size is 1 and the whole products are equal."""
    runs, i, j = [], 0, 0
    while i < len(old):
        first_i, first_j, a, b = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        runs.append((range(first_i, i), range(first_j, j)))
    return runs


def reshape(q: QTensor, new_shape: Sequence[int]) -> QTensor | None:
    """`lax.reshape`, when kept axes split and merge among themselves and contracted axes among themselves.

    All axes of size 1 in the result are kept axes.

    Args:
      q: any `QTensor`.
      new_shape: the shape wanted, without -1.

    Returns:
      A `QTensor`; or None where a kept and a contracted axis merge, contracted axes merge in another order than they
      were flattened in, the scales of a 2-D block would have to be split, or an axis of stacked adapters merges with another.

    >>> from qjax.core import int4, quantize
    >>> q = quantize(jnp.ones((4, 6, 5)), int4(), axes=(0, 1))
    >>> reshape(q, (24, 5)).shape, reshape(q, (4, 30))
    ((24, 5), None)
    """
    new_shape = tuple(int(n) for n in new_shape)
    if new_shape == q.shape:
        return q
    if q.size == 0 or math.prod(new_shape) != q.size:
        return None
    q = q.plain()
    q = squeeze(q, [i for i, n in enumerate(q.shape) if n == 1])
    solid = [i for i, n in enumerate(new_shape) if n != 1]
    runs = [(old, [solid[j] for j in new]) for old, new in _runs(q.shape, [new_shape[i] for i in solid])]
    contracted = _contracted(q)
    flat = []  # (position in the flattening order, new axes) of each contracted run
    for old, new in runs:
        places = [contracted.index(i) for i in old if i in contracted]
        if places and places != list(range(places[0], places[0] + len(old))):
            return None
        if places:
            flat.append((places[0], new))
    axes = [i for _, new in sorted(flat) for i in new]
    kept_runs = [(old, new) for old, new in runs if old[0] not in contracted]
    nested = _blocked_over(q)
    if any({i in nested for i in old} == {True, False} for old, _ in kept_runs):
        q = with_plain_scales(q)
    arrays = {n: _reshape_kept(getattr(q, n), q, kept_runs, new_shape, axes, whole=n == "adapter_right") for n in ARRAYS}
    if any(arrays[n] is None and getattr(q, n) is not None for n in ARRAYS):
        return None
    sizes = tuple(new_shape[i] for i in axes)
    return dataclasses.replace(q, **arrays, axes=tuple(i - len(new_shape) for i in axes), sizes=sizes)


def _reshape_kept(
    a: Any, q: QTensor, runs, new_shape: tuple[int, ...], contracted: list[int], whole: bool
) -> jax.Array | None:
    """One array inside `q`, its kept axes reshaped run by run; an axis of `a` may be 1 where that of `q` is not.

    A `whole` one, which repeated along an axis would be larger than the weight, is never repeated.
    """
    if a is None:
        return None
    kept, shape = _kept(q), q.shape
    full, new_sizes = list(a.shape), dict.fromkeys(range(len(new_shape)), 1)
    for old, new in runs:
        wanted, own = [shape[i] for i in old], [a.shape[kept.index(i)] for i in old]
        if set(own) == {1}:
            continue
        if len(old) == len(new) == 1:
            new_sizes[new[0]] = own[0]
            continue
        if any(n not in ((w,) if whole else (1, w)) for n, w in zip(own, wanted, strict=True)):
            return None
        for i in old:
            full[kept.index(i)] = shape[i]
        new_sizes.update({i: new_shape[i] for i in new})
    target = [n for i, n in new_sizes.items() if i not in contracted]
    return jnp.broadcast_to(a, full).reshape(*target, a.shape[-1])


def _slice_kept(
    q: QTensor, window: Callable[[int, int, int], tuple | None], cut: Callable, whole: Callable[[int], bool]
) -> QTensor | None:
    """Cut every array: `window(axis, n, count)` says where along a kept axis of size n that has `count` entries.

    `whole(axis)` says whether the axis stays as it is.
    """
    q = q.plain()
    kept, shape, arrays = _kept(q), q.shape, {}
    if not all(whole(i) for i in _blocked_over(q)):
        q = with_plain_scales(q)
    for name in ARRAYS:
        a = arrays[name] = getattr(q, name)
        if a is not None:
            windows = [window(i, shape[i], count) for i, count in zip(kept, a.shape[:-1], strict=True)]
            if any(w is None for w in windows):
                return None
            arrays[name] = cut(a, windows)
    return dataclasses.replace(q, **arrays)


def slice(
    q: QTensor, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None = None
) -> QTensor | None:
    """`lax.slice`, when it takes the contracted axes whole.

    Args:
      q: any `QTensor`.
      start: first index along every logical axis.
      limit: end along every logical axis.
      strides: steps, or None for 1.

    Returns:
      A `QTensor`; or None where a contracted axis or a 2-D block is cut.

    >>> from qjax.core import int4, quantize
    >>> q = quantize(jnp.ones((4, 6)), int4(), axes=(0,))
    >>> slice(q, (0, 2), (4, 6)).shape, slice(q, (1, 0), (4, 6))
    ((4, 4), None)
    """
    steps = [1] * q.ndim if strides is None else list(strides)
    if any((start[i], limit[i], steps[i]) != (0, q.shape[i], 1) for i in _contracted(q)):
        return None

    def window(i: int, n: int, count: int):
        if count == n:
            return start[i], limit[i], steps[i]
        block = n // count
        if count == 1:
            return 0, 1, 1
        aligned = steps[i] == 1 and start[i] % block == 0 and limit[i] % block == 0
        return (start[i] // block, limit[i] // block, 1) if aligned else None

    def cut(a, windows):
        lo, hi, step = zip(*windows, (0, a.shape[-1], 1), strict=True)
        return jax.lax.slice(a, lo, hi, step)

    return _slice_kept(q, window, cut, lambda i: (start[i], limit[i], steps[i]) == (0, q.shape[i], 1))


def dynamic_slice(q: QTensor, starts: Sequence[Any], sizes: Sequence[int]) -> QTensor | None:
    """`lax.dynamic_slice`, when it takes the contracted axes whole.

    Args:
      q: any `QTensor`.
      starts: a scalar integer for every logical axis; may be traced.
      sizes: the lengths.

    Returns:
      A `QTensor`; or None where a contracted axis or an axis with 2-D blocks is cut.

    >>> from qjax.core import int4, quantize
    >>> q = quantize(jnp.ones((3, 4, 6)), int4(), axes=(1,))
    >>> dynamic_slice(q, (jnp.int32(2), 0, 0), (1, 4, 6)).shape
    (1, 4, 6)
    """
    if any(sizes[i] != q.shape[i] for i in _contracted(q)):
        return None

    def window(i: int, n: int, count: int):
        if count == n:
            return jnp.asarray(starts[i]), sizes[i]
        return (jnp.zeros_like(starts[i]), count) if count == 1 or sizes[i] == n else None

    def cut(a, windows):
        at, lengths = zip(*windows, (jnp.zeros_like(starts[0]), a.shape[-1]), strict=True)
        return jax.lax.dynamic_slice(a, at, lengths)

    return _slice_kept(q, window, cut, lambda i: sizes[i] == q.shape[i])
