"""The canonical layout, kept axes in logical order and then one axis with the contracted axes flattened; its blocks."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qjax.core.specs import BlockSpec, CastSpec, FloatSpec, IntSpec, LearnedSpec, Spec  # noqa: F401  # IntSpec is for the examples


def negative_axes(axes: Sequence[int], ndim: int, argument: str) -> tuple[int, ...]:
    """Counts axes from the end.

    Args:
      axes: positions, negative or not.
      ndim: of the array.
      argument: what an error calls them.

    Returns:
      The same axes, all negative.

    Raises:
      ValueError: an axis out of range or given twice.

    >>> negative_axes((0, -1), 3, "axes")
    (-3, -1)
    """
    negative = tuple(int(a) - ndim if a >= 0 else int(a) for a in axes)
    if any(not -ndim <= a < 0 for a in negative) or len(set(negative)) != len(negative):
        raise ValueError(f"`{argument}` must be different axes of an array with {ndim} axes, got {tuple(axes)}")
    return negative


def _to_canonical(axes: Sequence[int], ndim: int) -> list[int]:
    contracted = [a + ndim for a in axes]
    return [i for i in range(ndim) if i not in contracted] + contracted


def stacked_positions(axes: Sequence[int], stacked: Sequence[int], ndim: int) -> list[int]:
    """Where the `stacked` axes of an array are in its canonical layout, and so in its scales, in ascending order.

    Args:
      axes: negative contracted axes.
      stacked: negative kept axes.
      ndim: of the array.

    Returns:
      Positions among the kept axes.

    >>> stacked_positions((-2,), (-3,), 3)
    [0]
    """
    order = _to_canonical(axes, ndim)
    return sorted(order.index(a + ndim) for a in stacked)


def canonicalize(w: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Move the contracted `axes` last and flatten them in the given order: (kept..., K).

    Args:
      w: any array.
      axes: the contracted axes.

    Returns:
      An array of two or more axes, or of one if all are contracted.

    >>> canonicalize(jnp.zeros((2, 3, 5)), (0, 1)).shape
    (5, 6)
    """
    axes = negative_axes(axes, w.ndim, "axes")
    moved = w.transpose(_to_canonical(axes, w.ndim))
    kept = moved.shape[: w.ndim - len(axes)]
    return moved.reshape(*kept, math.prod(moved.shape[len(kept) :]))


def uncanonicalize(c: jax.Array, axes: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """The inverse of `canonicalize`; `axes` are negative, `sizes` are those of the contracted axes.

    >>> uncanonicalize(jnp.zeros((5, 6)), (-3, -2), (2, 3)).shape
    (2, 3, 5)
    """
    ndim = c.ndim - 1 + len(axes)
    order = _to_canonical(axes, ndim)
    return c.reshape(*c.shape[:-1], *sizes).transpose([order.index(i) for i in range(ndim)])


def group_length(k: int, spec: BlockSpec | LearnedSpec) -> int:
    """How many of the `k` flattened contracted values share a scale.

    >>> group_length(4096, IntSpec(4, granularity=PerGroup(128))), group_length(4096, IntSpec(8))
    (128, 4096)
    """
    match spec.granularity:
        case PerGroup(size) | PerBlock(_, size):
            return size
        case _:
            return k


def padded_size(k: int, spec: Spec) -> int:
    """Kpad, the stored length of `k` flattened contracted values: `k` rounded up to whole groups.

    >>> padded_size(100, IntSpec(4, granularity=PerGroup(64), pad=True))
    128
    """
    size = 1 if isinstance(spec, CastSpec) else group_length(k, spec)
    return -(-k // size) * size if size else k


def check_blocks(shape: Sequence[int], spec: Spec, name: str) -> None:
    """Refuse a group or block that does not divide its axis, unless the spec pads the contracted one.

    Args:
      shape: the canonical shape, (kept..., K).
      spec: holds the granularity.
      name: what the error calls the array.

    Raises:
      ValueError: naming the array, the group and the sizes that would do.

    >>> check_blocks((16, 100), IntSpec(4, granularity=PerGroup(64)), "mlp/kernel")
    Traceback (most recent call last):
    ValueError: `group_size`=64 does not divide the 100 contracted values of `mlp/kernel`: take 50, the nearest size \
that does, or pad=True, which pads them to 128
    """
    if isinstance(spec, CastSpec):
        return
    *kept, k = shape
    size, padded = group_length(k, spec), padded_size(k, spec)
    argument = "`block[1]`" if isinstance(spec.granularity, PerBlock) else "`group_size`"
    if padded != k and not spec.pad:
        if fixed_blocks(spec):
            raise ValueError(f"the blocks of {spec}, {size} values, do not divide the {k} contracted values of `{name}`: give pad=True, "
                             f"which pads them to {padded}, or take another spec")  # fmt: skip
        raise ValueError(f"{argument}={size} does not divide the {k} contracted values of `{name}`: take "
                         f"{_nearest_divisor(k, size)}, the nearest size that does, or pad=True, which pads them to "
                         f"{padded}")  # fmt: skip
    if isinstance(spec.granularity, PerBlock):
        rows = spec.granularity.kept
        if not kept:
            raise ValueError(f"`block` needs a kept axis, but every axis of `{name}` is contracted: take `group_size`")
        if kept[-1] % rows:
            raise ValueError(f"`block[0]`={rows} does not divide the last kept axis of `{name}`, which has {kept[-1]}: "
                             f"take {_nearest_divisor(kept[-1], rows)}, the nearest size that does")  # fmt: skip


def fixed_blocks(spec: Spec) -> bool:
    """Whether the size of a spec's blocks is part of its format, so that no other can be taken: MX and NVFP4.

    >>> fixed_blocks(IntSpec(4))
    False
    """
    return isinstance(spec, FloatSpec) and spec.scale_dtype in ("e8m0", "e4m3")


def _nearest_divisor(n: int, size: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - size), -d))


def blocks(
    w: jax.Array, spec: BlockSpec | LearnedSpec, stacked: Sequence[int] = (), name: str = "w"
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """View a canonical array so that the last axis is one block: what shares a scale.

    Args:
      w: (kept..., K).
      spec: says what a block is; `pad=True` appends zeros to K.
      stacked: kept axes (positions in `w`) that keep their own scale even per tensor: layers of a scan, experts.
      name: what an error calls the leaf.

    Returns:
      (blocked, unblock): `blocked` is (kept-like..., G, group), the shape of the scales of a `QTensor` and then the
      block; `unblock` takes an array of that shape back to (kept..., Kpad).

    Raises:
      ValueError: a group or block does not divide its axis.

    >>> blocked, unblock = blocks(jnp.zeros((6, 8)), IntSpec(4, granularity=PerGroup(4)))
    >>> blocked.shape, unblock(blocked).shape
    ((6, 2, 4), (6, 8))
    """
    *kept, k = w.shape
    check_blocks(w.shape, spec, name)
    padded = padded_size(k, spec)
    if padded > k:
        w = jnp.pad(w, [(0, 0)] * len(kept) + [(0, padded - k)])
    match spec.granularity:
        case PerTensor():
            stacked = [a % w.ndim for a in stacked]
            order = [*sorted(stacked), *(i for i in range(w.ndim) if i not in stacked)]
            moved = w.transpose(order)
            blocked = moved.reshape(*(n if i in stacked else 1 for i, n in enumerate(w.shape)), -1)
            back = [order.index(i) for i in range(w.ndim)]
            return blocked, lambda b: b.reshape(moved.shape).transpose(back)
        case PerBlock(rows, columns):
            tiles = (*kept[:-1], kept[-1] // rows, rows, padded // columns, columns)
            swapped = w.reshape(tiles).swapaxes(-3, -2)
            blocked = swapped.reshape(*swapped.shape[:-2], rows * columns)
            return blocked, lambda b: b.reshape(swapped.shape).swapaxes(-3, -2).reshape(*kept, padded)
        case PerGroup() | PerChannel() | PerToken():
            size = group_length(k, spec)
            return w.reshape(*kept, padded // size, size), lambda b: b.reshape(*kept, padded)


def real_values(k: int, spec: BlockSpec | LearnedSpec) -> np.ndarray | None:
    """Which values of `blocks` are no padding.

    Args:
      k: how many flattened contracted values there are.
      spec: says what a block is.

    Returns:
      bool (G, group), the same for all kept values; None if all are.

    >>> real_values(6, IntSpec(4, granularity=PerGroup(4), pad=True)).tolist()
    [[True, True, True, True], [True, True, False, False]]
    """
    padded, size = padded_size(k, spec), group_length(k, spec)
    if padded == k:
        return None
    rows = spec.granularity.kept if isinstance(spec.granularity, PerBlock) else 1
    return np.tile((np.arange(padded) < k).reshape(-1, size), (1, rows))


def logical_blocks(
    w: jax.Array, spec: BlockSpec | LearnedSpec, axes: Sequence[int], stacked: Sequence[int]
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """`blocks` of a logical array.

    Args:
      w: any shape.
      spec: says what a block is.
      axes: negative contracted axes, in the order in which they are flattened.
      stacked: negative kept axes that keep their own scale even per tensor.

    Returns:
      (blocked, to_canonical, to_logical): the second takes an array like `blocked` to (kept..., Kpad), the third to the
      shape of `w`, without padding.

    >>> blocked, _, to_logical = logical_blocks(jnp.zeros((9, 6)), IntSpec(4, granularity=PerGroup(3)), (-2,), ())
    >>> blocked.shape, to_logical(blocked).shape
    ((6, 3, 3), (9, 6))
    """
    sizes = [w.shape[a] for a in axes]
    blocked, unblock = blocks(canonicalize(w, axes), spec, stacked_positions(axes, stacked, w.ndim))
    return blocked, unblock, lambda b: uncanonicalize(unblock(b)[..., : math.prod(sizes)], axes, sizes)
