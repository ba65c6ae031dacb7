"""The kernels of `qjax_kernels.cpu` as values: C++ behind `jax.ffi`, with weights in blocks of 16 rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from qjax_kernels import cpu
from qjax_kernels.request import Request, Weight

from qjax.core import ActSpec, encode_activation
from qjax.runtime.kernels import Codes, Kernel, Layout
from qjax.runtime.outliers import split_outliers
from qjax.runtime.request import Operands, activation_of, reach_of

_FEWEST = 1 << 14  # weights; below, the call costs what the product does


def kernels() -> tuple[Kernel, ...]:
    """Returns them, the fastest first."""
    layout = Layout(f"cpu kernels (layout {cpu.LAYOUT_VERSION})", _pack, _unpack, _rows)
    return (
        Kernel("cpu int8", "cpu", _why_not, _integer, layout, ("int8", "int8 codes", "int8 + outliers"), ragged=True),
        Kernel("cpu weight-only", "cpu", _why_not, _float, layout, (None,), ragged=True),
    )


def _why_not(request: Request) -> str:
    if request.n * request.k < _FEWEST:
        return f"a weight of {request.n} x {request.k} is too small to gain: {_FEWEST} values at least"
    return cpu.why_not(request)


def _pack(weight: Weight, codes: Codes) -> cpu.Packed:
    table = codes.levels if weight.kind == "codebook" else None
    return cpu.prepack(
        codes.codes,
        codes.scale,
        codes.zero_point,
        bits=weight.bits,
        signed=weight.kind == "int",
        group_size=weight.group_size,
        table=table,
    )


def _unpack(weight: Weight, k: int, laid: cpu.Packed) -> Codes:
    found = cpu.unpack(laid)
    center = laid.layout.center if weight.kind == "uint" else 0
    every = k if weight.group_size is None else weight.group_size
    zero_point = None if found.zero is None else found.zero[..., ::every].astype(jnp.int32) + center
    codes = Codes(found.codes + center, found.scale[..., ::every], zero_point, None)
    return codes if laid.layout.parts is not None else jax.tree.map(lambda a: a[0], codes)


def _rows(weight: Weight, k: int, laid: cpu.Packed, indices: jax.Array) -> jax.Array:
    del weight, k
    return cpu.gather_rows(laid, indices)


def _float(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    del act
    return _product(request, operands, None)


def _integer(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    if act is None:
        raise ValueError("`act` must say how rows are rounded")
    if request.activation == "int8":
        return _product(request, operands, _rounding(act))
    if request.activation == "int8 codes":
        return _of_codes(request, operands, act, jnp.dtype(request.dtype))
    return _with_outliers(request, operands, act)


def _rounding(act: ActSpec) -> cpu.Rounding:
    reach = reach_of(act)
    return cpu.Rounding(reach, -127 if reach == 127 else -128, 127)


def _product(request: Request, operands: Operands, rounding: cpu.Rounding | None) -> jax.Array:
    how = {"rounding": rounding, "dtype": jnp.dtype(request.dtype)}
    if operands.sizes is not None:
        return cpu.ragged_matmul(operands.x, operands.laid, operands.sizes, **how)
    return cpu.matmul(operands.x, operands.laid, **how)


def _of_codes(request: Request, operands: Operands, act: ActSpec, dtype: Any) -> jax.Array:
    """Rounds in front of the kernel, which XLA does once for products of the same rows.

    With zero points, s_x (sum_k x_k w_k - z_x sum_k w_k): the sums of the weight are its product with one row more, of ones.
    """
    x, static = operands.x, (operands.act_scale, operands.act_zero_point)
    if request.parts == 1:
        static = tuple(None if a is None else a[0] for a in static)
    axes = (x.ndim - 1,) if act.per_token else tuple(range(x.ndim))
    codes, scale, zero_point = encode_activation(x, act, axes, *static)
    if zero_point is None:
        return cpu.matmul_codes(codes, scale, operands.laid, dtype=dtype)
    codes = jnp.concatenate([codes, jnp.ones_like(codes[..., :1, :])], axis=-2)
    total = cpu.matmul_codes(codes, jnp.ones((1, 1), jnp.float32), operands.laid)
    return (scale * (total[..., :-1, :] - zero_point.astype(jnp.float32) * total[..., -1:, :])).astype(dtype)


def _with_outliers(request: Request, operands: Operands, act: ActSpec) -> jax.Array:
    """The columns with large values beside the integers, in 16 bit: only those columns of the weight are decoded for it."""
    if act.outliers is None:
        raise ValueError("`act` must say what outliers are")
    half = jnp.bfloat16  # float16 activations come as float32, and reach further than float16 does once they are rotated or divided
    split = split_outliers(operands.x, act.outliers, 0 if request.parts == 1 else 1, half)
    rest = dataclasses.replace(act, outliers=None)
    kind, inliers = activation_of(rest), operands._replace(x=split.inliers)
    if kind is not None and kind[0] == "int8":
        y = cpu.matmul(split.inliers, operands.laid, rounding=_rounding(rest), dtype=jnp.float32)
    else:
        y = _of_codes(request, inliers, rest, jnp.float32)
    columns = cpu.gather_columns(operands.laid, split.index)  # (..., N, C)
    decoded = request.weight.group_size is not None
    values = (columns.values * columns.scale if decoded else columns.values).astype(half).astype(jnp.float32)
    large = jnp.einsum("...mc,...nc->...mn", split.picked.astype(jnp.float32), values)
    return (y + (large if decoded else large * columns.scale[..., 0][..., None, :])).astype(request.dtype)
