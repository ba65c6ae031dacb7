"""How weights are packed for the kernels of this folder; `src/common.h` says the same to them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

LAYOUT_VERSION = 1
BITS = (2, 3, 4, 8)
_LANES = 16
_UNIT = 32


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the arrays of a packed weight mean.

    Attributes:
      bits: of a code: 2, 3, 4 or 8.
      n: rows.
      k: columns, which are contracted.
      group: consecutive columns that share a scale; `k` where a row does.
      parts: weights side by side (experts), or None for a single one.
      version: of the layout; kernels refuse another than their own.
    """

    bits: int
    n: int
    k: int
    group: int
    parts: int | None = None
    version: int = LAYOUT_VERSION

    @property
    def groups(self) -> int:
        """How many there are in a row; the last one may be short."""
        return -(-self.k // self.group)

    @property
    def group_padded(self) -> int:
        """The columns of a group as stored: a multiple of 32, of 64 where it is longer than that."""
        return _UNIT if self.group <= _UNIT else -(-self.group // 64) * 64

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows; the last one may be short."""
        return -(-self.n // _LANES)

    @property
    def units(self) -> int:
        """Units of 32 columns in a row."""
        return self.groups * self.group_padded // _UNIT

    @property
    def center(self) -> int:
        """What signed codes are stored plus."""
        return 2 ** (self.bits - 1)


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales", "zeros", "table"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight (N, K), or `parts` of them, as the kernels read it; a pytree.

    Attributes:
      codes: uint8 (parts, blocks, units, bits, 64).
      scales: float32 (parts, blocks, groups, 16).
      zeros: int32 or float32 like the scales, counted from the middle of the codes; (0,) where there are none.
      table: float32 (16,), what the codes stand for; (0,) where they are numbers.
      layout: what the arrays mean.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array
    table: jax.Array
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(a.nbytes for a in (self.codes, self.scales, self.zeros, self.table))


class Unpacked(NamedTuple):
    """Codes less the middle of their range int32 (parts, N, K); scale and zero point float32 (parts, N, K), the latter or None."""

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


class Columns(NamedTuple):
    """Columns of a weight, float32 (..., N, C): codes less zero points (or what a table says), and their scales."""

    values: jax.Array
    scale: jax.Array


def prepack(
    codes: jax.Array,
    scales: jax.Array,
    zero_points: jax.Array | None = None,
    *,
    bits: int,
    signed: bool = True,
    group_size: int | None = None,
    table: jax.Array | None = None,
) -> Packed:
    """Packs a weight `w = scale (code - zero_point)`, or `w = scale table[code]`, for `matmul`; once, when it is loaded.

    Args:
      codes: integers (N, K), or (parts, N, K): -2^(bits-1) .. 2^(bits-1) - 1 if signed, 0 .. 2^bits - 1 if not.
      scales: floating (..., N, groups), or (..., N) where there is one group.
      zero_points: the shape of `scales`, in the codes' own terms: integers, or floating; None for 0.
      bits: of a code: 2, 3, 4 or 8.
      signed: how codes are given; indices of a table are unsigned.
      group_size: consecutive columns that share a scale, any number, which need not divide K; None where a row shares one.
      table: floating (2^bits,), of at most 16 values.

    Returns:
      A `Packed`.

    Raises:
      ValueError: bits that no kernel reads; shapes that do not fit one another; a table beside signed codes or zero points.
      TypeError: codes that are no integers.

    Example:
      >>> w = prepack(jnp.ones((3, 40), jnp.int8), jnp.ones((3, 2)), bits=4, group_size=32)
      >>> w.codes.shape, w.scales.shape, w.layout.units
      ((1, 1, 2, 4, 64), (1, 1, 2, 16), 2)
    """
    codes = jnp.asarray(codes)
    if bits not in BITS:
        raise ValueError(f"`bits` must be one of {BITS}, got {bits}")
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"`codes` must be integers, got {codes.dtype}")
    if codes.ndim not in (2, 3) or 0 in codes.shape:
        raise ValueError(f"`codes` must be (N, K) or (parts, N, K), none of them 0, got {codes.shape}")
    *lead, n, k = codes.shape
    group = k if group_size is None else group_size
    if group < 1:
        raise ValueError(f"`group_size` must be positive, got {group}")
    layout = Layout(bits, n, k, min(group, k), lead[0] if lead else None)
    shape = (*lead, n, layout.groups)
    scales = _of_groups("scales", jnp.asarray(scales), shape)
    if table is not None:
        table = jnp.asarray(table, jnp.float32)
        if table.shape != (2**bits,) or bits == 8:
            raise ValueError(f"`table` must hold {2 ** min(bits, 4)} values for codes of {min(bits, 4)} bits, got {table.shape}")
        if signed or zero_points is not None:
            raise ValueError("`table` is for unsigned indices without `zero_points`: pass signed=False and None")
    if zero_points is None and not signed and table is None:
        zero_points = jnp.zeros(shape, jnp.int32)
    if zero_points is not None:
        zero_points = _of_groups("zero_points", jnp.asarray(zero_points), shape)
    return _prepack(codes, scales, zero_points, table, layout, signed)


@partial(jax.jit, static_argnums=(4, 5))
def _prepack(
    codes: jax.Array, scales: jax.Array, zero_points: jax.Array | None, table: jax.Array | None, layout: Layout, signed: bool
) -> Packed:
    zeros = jnp.zeros(0, jnp.int32)
    if zero_points is not None:
        kind = jnp.int32 if jnp.issubdtype(zero_points.dtype, jnp.integer) else jnp.float32
        zeros = _blocked(zero_points.astype(kind) - (0 if signed else layout.center), layout)
    table = jnp.zeros(0, jnp.float32) if table is None else jnp.pad(table, (0, 16 - table.size))
    return Packed(_pack(codes, layout, signed), _blocked(scales.astype(jnp.float32), layout), zeros, table, layout)


def unpack(weight: Packed) -> Unpacked:
    """The inverse of `prepack`, in plain XLA.

    Example:
      >>> w = prepack(jnp.int8([[-8, 7], [0, 3]]), jnp.ones(2), bits=4)
      >>> unpack(w).codes.tolist()
      [[[-8, 7], [0, 3]]]
    """
    layout = weight.layout
    parts = weight.codes.shape[0]
    lanes = weight.codes.reshape(parts, layout.blocks, layout.units, layout.bits, _LANES, 4)
    lanes = jnp.moveaxis(lanes, 4, 2).reshape(parts, layout.blocks * _LANES, layout.units, layout.bits, 4)[:, : layout.n]
    codes = _columns(_decode(lanes, layout.bits), layout)
    codes = codes if weight.table.size else codes - layout.center
    scale = _spread(_rows(weight.scales, layout), layout)
    zero = _spread(_rows(weight.zeros, layout), layout) if weight.zeros.size else None
    return Unpacked(codes, scale, None if zero is None else zero.astype(jnp.float32))


def dequantize(weight: Packed) -> jax.Array:
    """The weight as float32 (parts, N, K)."""
    codes, scale, zero = unpack(weight)
    if weight.table.size:
        return weight.table[codes] * scale
    return (codes.astype(jnp.float32) - (0 if zero is None else zero)) * scale


def gather_rows(weight: Packed, indices: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Rows of a packed weight, of which only those are read: an embedding.

    Args:
      weight: of one part.
      indices: integers of any shape; those outside 0 .. N - 1 are clipped.
      dtype: of the result; float32 if None.

    Returns:
      (..., K), floating.

    Raises:
      ValueError: a weight of several parts.

    Example:
      >>> w = prepack(jnp.int8([[-8, 7], [0, 3]]), jnp.float32([1.0, 0.5]), bits=4)
      >>> gather_rows(w, jnp.array([1, 0])).tolist()
      [[0.0, 1.5], [-8.0, 7.0]]
    """
    layout = weight.layout
    if layout.parts is not None:
        raise ValueError(f"`weight` must be a single one, got {layout.parts} parts")
    flat = jnp.clip(jnp.ravel(jnp.asarray(indices)), 0, layout.n - 1).astype(jnp.int32)
    block, lane = flat // _LANES, flat % _LANES
    lanes = weight.codes[0].reshape(layout.blocks, layout.units, layout.bits, _LANES, 4)

    def row(b: jax.Array, i: jax.Array) -> jax.Array:  # one gather for all rows: nothing else of the weight is read
        one = jax.lax.dynamic_slice(lanes, (b, 0, 0, i, 0), (1, layout.units, layout.bits, 1, 4))
        return one.reshape(layout.units, layout.bits, 4)

    codes = _columns(_decode(jax.vmap(row)(block, lane), layout.bits), layout)
    scale = _spread(weight.scales[0, block, :, lane], layout)
    if weight.table.size:
        out = weight.table[codes] * scale
    else:
        zero = _spread(weight.zeros[0, block, :, lane], layout).astype(jnp.float32) if weight.zeros.size else 0.0
        out = ((codes - layout.center).astype(jnp.float32) - zero) * scale
    return out.astype(jnp.float32 if dtype is None else dtype).reshape(*jnp.shape(indices), layout.k)


def gather_columns(weight: Packed, indices: jax.Array) -> Columns:
    """Columns of a packed weight, of which only those are decoded: where some of the activations are multiplied apart.

    Args:
      weight: of one part or several.
      indices: int32 (C,), or (parts, C): columns of each part; those outside 0 .. K - 1 are clipped.

    Returns:
      `Columns`, (N, C) or (parts, N, C).

    Raises:
      ValueError: indices of another rank.

    Example:
      >>> w = prepack(jnp.int8([[-8, 7], [0, 3]]), jnp.float32([1.0, 0.5]), bits=4)
      >>> gather_columns(w, jnp.array([1])).values.tolist()
      [[7.0], [3.0]]
    """
    layout = weight.layout
    indices = jnp.asarray(indices)
    if indices.ndim != (1 if layout.parts is None else 2):
        raise ValueError(f"`indices` must be ({'C' if layout.parts is None else 'parts, C'},), got shape {indices.shape}")

    def column(codes: jax.Array, scales: jax.Array, zeros: jax.Array, index: jax.Array) -> Columns:
        index = jnp.clip(index, 0, layout.k - 1)
        group, inside = index // layout.group, index % layout.group
        unit, place = group * (layout.group_padded // _UNIT) + inside // _UNIT, inside % _UNIT
        lanes = jax.lax.dynamic_index_in_dim(codes, unit, 1, keepdims=False).reshape(layout.blocks, layout.bits, _LANES, 4)
        found = jnp.take(_decode(jnp.moveaxis(lanes, 2, 1), layout.bits), place, axis=-1, mode="clip")
        if weight.table.size:
            values = weight.table[found]
        else:
            zero = jax.lax.dynamic_index_in_dim(zeros, group, 1, keepdims=False).astype(jnp.float32) if zeros.size else 0.0
            values = (found - layout.center).astype(jnp.float32) - zero
        scale = jax.lax.dynamic_index_in_dim(scales, group, 1, keepdims=False)
        return Columns(values.reshape(-1)[: layout.n], scale.reshape(-1)[: layout.n])

    zeros = weight.zeros if weight.zeros.size else jnp.zeros((weight.codes.shape[0], 0))
    each = jax.vmap(jax.vmap(column, (None, None, None, 0), 1))
    found = each(weight.codes, weight.scales, zeros, indices.reshape(weight.codes.shape[0], -1))
    return found if layout.parts is not None else Columns(*(a[0] for a in found))


def _of_groups(name: str, a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if a.shape == shape[:-1] and shape[-1] == 1:
        a = a[..., None]
    if a.shape != shape:
        raise ValueError(f"`{name}` must be {shape}: (N, groups) of codes in {shape[-1]} groups, got {a.shape}")
    return a


def _pack(codes: jax.Array, layout: Layout, signed: bool) -> jax.Array:
    bits = layout.bits
    codes = codes.astype(jnp.int32).reshape(layout.parts or 1, layout.n, layout.k) + (layout.center if signed else 0)
    codes = (codes & (2**bits - 1)).astype(jnp.uint8)
    columns = layout.groups * layout.group
    codes = jnp.pad(codes, ((0, 0), (0, layout.blocks * _LANES - layout.n), (0, columns - layout.k)))
    codes = codes.reshape(*codes.shape[:2], layout.groups, layout.group)
    codes = jnp.pad(codes, ((0, 0), (0, 0), (0, 0), (0, layout.group_padded - layout.group)))
    lanes = _encode(codes.reshape(*codes.shape[:2], layout.units, _UNIT), bits)  # (parts, rows, units, bits, 4)
    lanes = lanes.reshape(lanes.shape[0], layout.blocks, _LANES, layout.units, bits, 4)
    return jnp.moveaxis(lanes, 2, 4).reshape(lanes.shape[0], layout.blocks, layout.units, bits, 64)


def _encode(codes: jax.Array, bits: int) -> jax.Array:
    """(..., 32) -> (..., bits, 4): the bytes of one lane."""
    if bits == 8:
        return codes.reshape(*codes.shape[:-1], 8, 4)
    halves = codes.reshape(*codes.shape[:-1], 4, 2, 4)
    nibbles = halves[..., 0, :] | (halves[..., 1, :] << 4)
    if bits == 4:
        return nibbles
    low = nibbles & 0x33
    two = low[..., 0::2, :] | (low[..., 1::2, :] << 2)
    if bits == 2:
        return two
    high = (nibbles >> 2) & 0x11
    third = high[..., 0, :] | (high[..., 1, :] << 1) | (high[..., 2, :] << 2) | (high[..., 3, :] << 3)
    return jnp.concatenate([two, third[..., None, :]], axis=-2)


def _decode(lanes: jax.Array, bits: int) -> jax.Array:
    """(..., units, bits, 4) -> int32 (..., units, 32)."""
    if bits == 8:
        return lanes.reshape(*lanes.shape[:-2], _UNIT).astype(jnp.int32)
    if bits == 4:
        nibbles = lanes
    else:
        low, high = lanes[..., :2, :] & 0x33, (lanes[..., :2, :] >> 2) & 0x33
        nibbles = jnp.stack([low, high], axis=-2).reshape(*lanes.shape[:-2], 4, 4)
        if bits == 3:
            third = lanes[..., 2:, :] >> jnp.arange(4, dtype=jnp.uint8)[:, None]
            nibbles = nibbles | ((third & 0x11) << 2)
    return jnp.stack([nibbles & 15, nibbles >> 4], axis=-2).reshape(*lanes.shape[:-2], _UNIT).astype(jnp.int32)


def _columns(codes: jax.Array, layout: Layout) -> jax.Array:
    """(..., units, 32) -> (..., K): without the padding."""
    codes = codes.reshape(*codes.shape[:-2], layout.groups, layout.group_padded)[..., : layout.group]
    return codes.reshape(*codes.shape[:-2], -1)[..., : layout.k]


def _spread(a: jax.Array, layout: Layout) -> jax.Array:
    """(..., groups) -> (..., K)."""
    return jnp.repeat(a, layout.group, axis=-1, total_repeat_length=layout.groups * layout.group)[..., : layout.k]


def _blocked(a: jax.Array, layout: Layout) -> jax.Array:
    """(..., N, groups) -> (parts, blocks, groups, 16)."""
    a = a.reshape(layout.parts or 1, layout.n, layout.groups)
    a = jnp.pad(a, ((0, 0), (0, layout.blocks * _LANES - layout.n), (0, 0)))
    return a.reshape(a.shape[0], layout.blocks, _LANES, layout.groups).swapaxes(2, 3)


def _rows(a: jax.Array, layout: Layout) -> jax.Array:
    """(parts, blocks, groups, 16) -> (parts, N, groups)."""
    return a.swapaxes(2, 3).reshape(a.shape[0], -1, layout.groups)[:, : layout.n]
