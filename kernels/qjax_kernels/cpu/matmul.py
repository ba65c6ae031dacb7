"""Products with packed weights through the C++ kernels."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax_kernels.cpu import reference
from qjax_kernels.cpu.layout import BITS, LAYOUT_VERSION, Packed, dequantize
from qjax_kernels.cpu.library import INSTRUCTION_SETS, TARGET, load
from qjax_kernels.request import Request
from qjax_kernels.varying import varying_like

_INTEGER_GROUP = 32768  # columns whose products fit in an int32 sum


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How the rows of x become int8: `clip(round(x / scale), low, high)`, `scale = max |x| / divisor`.

    Attributes:
      divisor: 127.5 is the half-step grid of compressed-tensors, 127 the full one.
      low: the lowest code.
      high: the highest code.
    """

    divisor: float = 127.5
    low: int = -128
    high: int = 127


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is known of a call when it is traced."""

    layout: Any
    rounding: Rounding | None
    instruction_set: str
    dtype: str


def why_not(request: Request, instruction_set: str = "") -> str:
    """Why `matmul` cannot run a product, in words; "" if it can.

    Args:
      request: the product.
      instruction_set: one that is forced; "" for the best one of this machine.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> why_not(Request(Device("tpu", "v6e"), 1, 64, 64, Weight("int", 4)))
      'made for CPUs, not for tpu'
    """
    weight = request.weight
    if request.device.platform != "cpu":
        return f"made for CPUs, not for {request.device.platform}"
    if weight.kind == "fp8":
        return "FP8 codes have no kernel for CPUs"
    if weight.bits not in BITS:
        return f"codes of {weight.bits} bits, and the kernels read {', '.join(map(str, BITS))}"
    if weight.kind == "codebook" and weight.bits > 4:
        return f"a table of {2**weight.bits} values, and the kernels have room for 16"
    if request.activation == "fp8":
        return "FP8 activations have no kernel for CPUs"
    if request.activation == "int8" and weight.kind == "codebook":
        return "codes of a table are no integers, which rounded activations need"
    if request.activation == "int8" and (weight.group_size or request.k) > _INTEGER_GROUP:
        return f"an int32 sum over {weight.group_size or request.k} products could overflow: {_INTEGER_GROUP} at most"
    return _why_not_here(instruction_set)


def _why_not_here(instruction_set: str) -> str:
    if instruction_set and instruction_set not in INSTRUCTION_SETS:
        return f"no instruction set is called {instruction_set!r}: {', '.join(INSTRUCTION_SETS)}"
    loaded = load()
    if loaded.reason:
        return loaded.reason
    if instruction_set and instruction_set not in loaded.instruction_sets:
        return f"this machine has no {instruction_set}: it has {', '.join(loaded.instruction_sets)}"
    return ""


def matmul(
    x: jax.Array, weight: Packed, *, rounding: Rounding | None = None, instruction_set: str = "", dtype: Any | None = None
) -> jax.Array:
    """`y = x W^T`, x as it is or rounded to int8 by row.

    Without rounding the products are those of float32 x and exact weights, and only sums and scales round. With it, products are added up
    in int32 over each group.

    Args:
      x: float32 or bfloat16 (..., K); (parts, ..., K) where the weight has parts.
      weight: from `prepack`.
      rounding: of x; None keeps it.
      instruction_set: one of `INSTRUCTION_SETS`; "" for the best one of this machine.
      dtype: of y, float32 or bfloat16; that of x if None.

    Returns:
      (..., N), or (parts, ..., N). Gradients flow to x and the scales as if x were not rounded; `vmap` adds rows or parts.

    Raises:
      ValueError: shapes that do not fit, a weight packed in another layout, an instruction set that is not there, a table
        beside `rounding`.
      TypeError: dtypes that no kernel takes.

    Example:
      >>> from qjax_kernels import cpu
      >>> w = cpu.prepack(jnp.int8([[-8, 7, 1], [0, 3, 1]]), jnp.float32([1.0, 0.5]), bits=4)
      >>> matmul(jnp.float32([[1.0, 1.0, 2.0]]), w).tolist() if not cpu.why_not_loaded() else [[1.0, 2.5]]
      [[1.0, 2.5]]
    """
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"`x` must be float32 or bfloat16, got {x.dtype}")
    call = _checked(weight, rounding, instruction_set, dtype or x.dtype)
    if rounding is not None and not (rounding.divisor > 0 and -128 <= rounding.low < rounding.high <= 127):
        raise ValueError(f"`rounding` must have a positive divisor and -128 <= low < high <= 127, got {rounding}")
    rows, shape = _as_rows(x, weight)
    y: jax.Array = _differentiable(call, rows, weight)  # type: ignore[assignment]
    return y.reshape(*shape, weight.layout.n)


def matmul_codes(
    codes: jax.Array, scale: jax.Array, weight: Packed, *, instruction_set: str = "", dtype: Any = jnp.float32
) -> jax.Array:
    """`y = scale codes W^T` of rows that are int8 already: a static range, or one rounding for several products.

    Args:
      codes: int8 (..., K), or (parts, ..., K).
      scale: float32 (..., 1), broadcasts.
      weight: from `prepack`.
      instruction_set: as for `matmul`.
      dtype: of y.

    Returns:
      (..., N). It has no gradient.

    Raises:
      ValueError, TypeError: as `matmul`.
    """
    codes = jnp.asarray(codes)
    if codes.dtype != jnp.int8:
        raise TypeError(f"`codes` must be int8, got {codes.dtype}")
    call = _checked(weight, Rounding(), instruction_set, dtype)
    rows, shape = _as_rows(codes, weight)
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (*shape, 1)).reshape(rows.shape[:2])
    return _kernel(call, rows, scale, weight, None).reshape(*shape, weight.layout.n)


def ragged_matmul(
    x: jax.Array, weight: Packed, sizes: jax.Array, *, rounding: Rounding | None = None, instruction_set: str = "", dtype: Any | None = None
) -> jax.Array:
    """Rows that stand expert after expert: `sizes[i]` of them meet part i.

    Args:
      x: float32 or bfloat16 (rows, K).
      weight: of several parts.
      sizes: int32 (parts,); rows beyond their sum give zeros.
      rounding: as for `matmul`.
      instruction_set: as for `matmul`.
      dtype: of y; that of x if None.

    Returns:
      (rows, N). Gradients flow to x and the scales.

    Raises:
      ValueError, TypeError: as `matmul`; sizes that add up to more than the rows are refused when it runs.
    """
    x, sizes = jnp.asarray(x), jnp.asarray(sizes)
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"`x` must be float32 or bfloat16, got {x.dtype}")
    if weight.layout.parts is None or sizes.shape != (weight.layout.parts,):
        raise ValueError(f"`sizes` must be ({weight.layout.parts},), one for each part of `weight`, got {sizes.shape}")
    if x.ndim != 2 or x.shape[1] != weight.layout.k:
        raise ValueError(f"`x` must be (rows, {weight.layout.k}), got {x.shape}")
    return _ragged(_checked(weight, rounding, instruction_set, dtype or x.dtype), x, weight, sizes.astype(jnp.int32))


def _checked(weight: Packed, rounding: Rounding | None, instruction_set: str, dtype: Any) -> _Call:
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"`dtype` must be float32 or bfloat16, got {jnp.dtype(dtype)}")
    layout = weight.layout
    if layout.version != LAYOUT_VERSION:
        raise ValueError(f"`weight` has layout version {layout.version}, and the kernels read {LAYOUT_VERSION}: prepack it again")
    shape = (layout.parts or 1, layout.blocks, layout.units, layout.bits, 64)
    if weight.codes.shape != shape or weight.codes.dtype != jnp.uint8:
        raise ValueError(f"`weight` must hold codes uint8{shape} by its layout, got {weight.codes.dtype}{weight.codes.shape}")
    shape = (layout.parts or 1, layout.blocks, layout.groups, 16)
    if weight.scales.shape != shape or weight.scales.dtype != jnp.float32:
        raise ValueError(f"`weight` must hold scales float32{shape} by its layout, got {weight.scales.dtype}{weight.scales.shape}")
    if rounding is not None and weight.table.size:
        raise ValueError("`rounding` makes an integer product, and `weight` has a table: leave the activations float")
    if rounding is not None and layout.group > _INTEGER_GROUP:
        raise ValueError(f"`rounding`: an int32 sum over {layout.group} products could overflow, {_INTEGER_GROUP} at most")
    reason = _why_not_here(instruction_set)
    if reason:
        raise ValueError(f"`instruction_set` {instruction_set!r}: {reason}" if instruction_set else f"no C++ kernel: {reason}")
    return _Call(layout, rounding, instruction_set, jnp.dtype(dtype).name)


def _as_rows(x: jax.Array, weight: Packed) -> tuple[jax.Array, tuple[int, ...]]:
    layout = weight.layout
    parts = () if layout.parts is None else (layout.parts,)
    if x.ndim < 1 + len(parts) or x.shape[-1] != layout.k or x.shape[: len(parts)] != parts:
        lead = "..." if not parts else f"{layout.parts}, ..."
        raise ValueError(f"`x` must be ({lead}, {layout.k}) for this weight, got {x.shape}")
    return x.reshape(layout.parts or 1, -1, layout.k), x.shape[:-1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(call: _Call, rows: jax.Array, weight: Packed) -> jax.Array:
    return _kernel(call, rows, None, weight, None)


def _forward(call: _Call, rows: jax.Array, weight: Packed) -> tuple[jax.Array, Any]:
    return _kernel(call, rows, None, weight, None), (rows, weight)


def _backward(call: _Call, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, Packed]:
    rows, weight = saved
    _, pull = jax.vjp(lambda x, w: reference.matmul(x, w).astype(call.dtype), rows, weight)
    return pull(cotangent)


_differentiable.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(call: _Call, x: jax.Array, weight: Packed, sizes: jax.Array) -> jax.Array:
    return _kernel(call, x, None, weight, sizes)


def _ragged_forward(call: _Call, x: jax.Array, weight: Packed, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _kernel(call, x, None, weight, sizes), (x, weight, sizes)


def _ragged_backward(call: _Call, saved: Any, cotangent: jax.Array) -> tuple[Any, Any, Any]:
    x, weight, sizes = saved

    def product(x: jax.Array, weight: Packed) -> jax.Array:
        w = dequantize(weight).swapaxes(1, 2)
        return lax.ragged_dot(x.astype(jnp.float32), w, sizes, precision=lax.Precision.HIGHEST).astype(call.dtype)

    _, pull = jax.vjp(product, x, weight)
    return (*pull(cotangent), np.zeros(sizes.shape, jax.dtypes.float0))


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _kernel(call: _Call, x: jax.Array, scale: jax.Array | None, weight: Packed, sizes: jax.Array | None) -> jax.Array:
    """x (parts, M, K) or, with sizes, (rows, K)."""
    none = jnp.zeros(0, jnp.float32)
    operands = (x, none if scale is None else scale, weight.codes, weight.scales, weight.zeros, weight.table)
    return _foldable(call)(*operands, jnp.zeros(0, jnp.int32) if sizes is None else sizes)


def _foldable(call: _Call) -> Any:
    """The custom call with a rule for `vmap`: a batch of x becomes rows, a batch of weights becomes parts."""

    @jax.custom_batching.custom_vmap
    def product(*operands: jax.Array) -> jax.Array:
        return _custom_call(call, *operands)

    @product.def_vmap
    def rule(size: int, batched: list[bool], *operands: jax.Array) -> tuple[jax.Array, bool]:
        x, scale, codes, scales, zeros, table, sizes = operands
        if batched[5] or batched[6] or sizes.size:  # tables or sizes of their own: one after another
            free = [a for a, b in zip(operands, batched, strict=True) if b]

            def one(args: list[jax.Array]) -> jax.Array:
                left = iter(args)
                return product(*(next(left) if b else a for a, b in zip(operands, batched, strict=True)))

            return lax.map(one, free), True
        if not any(batched[2:]):
            x, scale = (a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(operands[:2], batched[:2], strict=True))
            parts, m = x.shape[1:3]
            scale = scale.swapaxes(0, 1).reshape(parts, -1) if scale.size else scale.reshape(0)
            y = product(x.swapaxes(0, 1).reshape(parts, size * m, -1), scale, codes, scales, zeros, table, sizes)
            return y.reshape(parts, size, m, -1).swapaxes(0, 1), True
        parts = [a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(operands[:5], batched[:5], strict=True)]
        flat = [a.reshape(-1, *a.shape[2:]) if a.size else a.reshape(0) for a in parts]
        y = product(*flat, table, sizes)
        return y.reshape(size, -1, *y.shape[1:]), True

    return product


def _custom_call(call: _Call, *operands: jax.Array) -> jax.Array:
    layout, rounding = call.layout, call.rounding or Rounding()
    x = operands[0]
    result = jax.ShapeDtypeStruct((*x.shape[:-1], layout.n), jnp.dtype(call.dtype))
    y = jax.ffi.ffi_call(TARGET, result)(
        *operands,
        version=np.int64(layout.version),
        bits=np.int64(layout.bits),
        k=np.int64(layout.k),
        n=np.int64(layout.n),
        group=np.int64(layout.group),
        isa=np.int64(INSTRUCTION_SETS.get(call.instruction_set, 0)),
        integer=np.int64(call.rounding is not None),
        divisor=np.float32(rounding.divisor),
        low=np.int64(rounding.low),
        high=np.int64(rounding.high),
    )
    return varying_like(y, operands)
