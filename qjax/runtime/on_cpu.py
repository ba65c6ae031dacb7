"""The kernels of `qjax_kernels.cpu` as values: C++ behind `jax.ffi`, with weights in blocks of 16 rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from qjax_kernels import cpu
from qjax_kernels.request import Request, Weight

from qjax.core import ActSpec
from qjax.runtime.kernels import Codes, Kernel, Layout
from qjax.runtime.request import Operands, reach_of

_FEWEST = 1 << 14  # weights; below, the call costs what the product does


def kernels() -> tuple[Kernel, ...]:
    """Returns them, the fastest first."""
    layout = Layout(f"cpu kernels (layout {cpu.LAYOUT_VERSION})", _pack, _unpack, _rows)
    return (
        Kernel("cpu int8", "cpu", _why_not, _integer, layout, ("int8",)),
        Kernel("cpu weight-only", "cpu", _why_not, _float, layout, (None,)),
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
    return cpu.matmul(operands.x, operands.laid, dtype=jnp.dtype(request.dtype))


def _integer(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    reach = reach_of(act)
    rounding = cpu.Rounding(reach, -127 if reach == 127 else -128, 127)
    return cpu.matmul(operands.x, operands.laid, rounding=rounding, dtype=jnp.dtype(request.dtype))
