"""The kernels of `qjax_kernels.tpu` as values: Pallas, with weights (K, N) in integers as wide as the chip has."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from qjax_kernels.request import CacheRead, Request, Weight
from qjax_kernels.tpu import tiles
from qjax_kernels.tpu.attention import decode_attention
from qjax_kernels.tpu.attention import why_not as why_not_attention
from qjax_kernels.tpu.experts import experts
from qjax_kernels.tpu.experts import why_not as why_not_experts
from qjax_kernels.tpu.fp8 import fp8
from qjax_kernels.tpu.fp8 import why_not as why_not_fp8
from qjax_kernels.tpu.int8 import int8
from qjax_kernels.tpu.int8 import why_not as why_not_int8
from qjax_kernels.tpu.rotated_int8 import rotated_int8
from qjax_kernels.tpu.rotated_int8 import why_not as why_not_rotated_int8
from qjax_kernels.tpu.weight_only import weight_only
from qjax_kernels.tpu.weight_only import why_not as why_not_weight_only

from qjax.core import ActSpec
from qjax.runtime.kernels import CacheKernel, CacheOperands, Codes, Kernel, Layout
from qjax.runtime.request import Operands, reach_of

# The layers of a model ask for the same few products: each is traced and lowered once.
_once = functools.partial(jax.jit, static_argnums=(0, 2))


def kernels() -> tuple[Kernel, ...]:
    """Returns them, the fastest first."""
    layout = Layout("tpu kernels", _pack, _unpack)
    return (
        Kernel("tpu rotated int8", "tpu", why_not_rotated_int8, _rotated_int8, layout, ("int8",), rotates=True),
        Kernel("tpu int8", "tpu", why_not_int8, _int8, layout, ("int8",)),
        Kernel("tpu fp8", "tpu", why_not_fp8, _fp8, layout, (None, "fp8")),
        Kernel("tpu weight-only", "tpu", why_not_weight_only, _weight_only, layout, (None,)),
        Kernel("tpu experts", "tpu", why_not_experts, _experts, layout, (None,), ragged=True),
    )


def cache_kernels() -> tuple[CacheKernel, ...]:
    """Returns those that read packed caches."""
    return (CacheKernel("tpu decode attention", "tpu", why_not_attention, _attention),)


def _pack(weight: Weight, codes: Codes) -> dict[str, jax.Array]:
    kind = jnp.int4 if weight.bits == 4 else jnp.int8
    if weight.kind == "fp8":
        numbers = jax.lax.bitcast_convert_type(codes.codes, jnp.float8_e4m3fn)
        return {"codes": numbers.swapaxes(-1, -2), "scale": codes.scale.swapaxes(-1, -2)}
    return {"codes": codes.codes.swapaxes(-1, -2).astype(kind), "scale": codes.scale.swapaxes(-1, -2)}


def _unpack(weight: Weight, k: int, laid: dict[str, jax.Array]) -> Codes:
    del k
    if weight.kind == "fp8":
        numbers = jax.lax.bitcast_convert_type(laid["codes"], jnp.uint8)
        return Codes(numbers.swapaxes(-1, -2), laid["scale"].swapaxes(-1, -2), None, None)
    return Codes(laid["codes"].astype(jnp.int8).swapaxes(-1, -2), laid["scale"].swapaxes(-1, -2), None, None)


def _group(request: Request) -> int:
    return request.k if request.weight.group_size is None else request.weight.group_size


@_once
def _weight_only(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    del act
    codes, scale = operands.laid["codes"], operands.laid["scale"]
    return weight_only(operands.x, codes, scale, group=_group(request), chip=request.device.chip)


@_once
def _experts(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    """Parts that have their own rows are experts with as many rows each."""
    del act
    codes, scale = operands.laid["codes"], operands.laid["scale"]
    run = functools.partial(experts, group=_group(request), chip=request.device.chip)
    if operands.sizes is not None:
        return run(operands.x, codes, scale, operands.sizes)
    # No taller than the rows of a part: a tile that parts share is multiplied once for each.
    limit = dataclasses.replace(tiles.LARGEST[request.device.chip], m=tiles.up(request.m, 16))
    y = run(operands.x.reshape(-1, request.k), codes, scale, jnp.full(request.parts, request.m, jnp.int32), limit=limit)
    return y.reshape(request.parts, request.m, request.n)


@_once
def _fp8(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    codes, scale = operands.laid["codes"], operands.laid["scale"]
    return fp8(operands.x, codes, scale, chip=request.device.chip, rounded=act is not None)


@_once
def _int8(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    codes, scale = operands.laid["codes"], operands.laid["scale"]
    return int8(operands.x, codes, scale, group=_group(request), chip=request.device.chip, levels=reach_of(act))


@_once
def _rotated_int8(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    codes, scale, size = operands.laid["codes"], operands.laid["scale"], request.rotation or request.k
    run = functools.partial(rotated_int8, group=_group(request), size=size, chip=request.device.chip, levels=reach_of(act))
    return run(operands.x, codes, scale).astype(request.dtype)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _attention(read: CacheRead, operands: CacheOperands, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    q, keys, values, lengths = operands
    # XLA lays codes whose token is narrower than a row of lanes out with tokens along them: then this moves nothing, and the other would.
    last = read.keys.bits == 4 or keys.codes.shape[-1] % 128 != 0
    k, v = (a.codes.swapaxes(2, 3) if last else a.codes for a in (keys, values))
    zeros = () if keys.zero_point is None or values.zero_point is None else (keys.zero_point, values.zero_point)
    how = {"chip": read.device.chip, "tokens_last": last, "interpret": interpret}
    return decode_attention(q, k, keys.scale, v, values.scale, lengths, *zeros, **how)
