"""The kernels of `qjax_kernels.gpu` as values: Mosaic GPU for Hopper, with weights (N, K) in native integers or FP8."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from qjax_kernels.gpu import eight_bit, weight_only
from qjax_kernels.gpu.tiles import eight_bit_tiles
from qjax_kernels.request import Request, Weight

from qjax.core import ActSpec, encode_activation
from qjax.runtime.kernels import Codes, Kernel, Layout
from qjax.runtime.request import Operands


def kernels() -> tuple[Kernel, ...]:
    """Returns them, the fastest first."""
    layout = Layout("cuda kernels", _pack, _unpack)
    return (
        Kernel("hopper 8 bit", "cuda", lambda request: eight_bit.why_not(request) or "", _eight_bit, layout, ("int8", "fp8")),
        Kernel("hopper weight-only", "cuda", lambda request: weight_only.why_not(request) or "", _weight_only, layout, (None,)),
    )


def _pack(weight: Weight, codes: Codes) -> dict[str, jax.Array]:
    if weight.kind == "fp8":
        return {"codes": jax.lax.bitcast_convert_type(codes.codes, jnp.float8_e4m3fn), "scale": codes.scale}
    return {"codes": codes.codes.astype(jnp.int4 if weight.bits == 4 else jnp.int8), "scale": codes.scale}


def _unpack(weight: Weight, k: int, laid: dict[str, jax.Array]) -> Codes:
    del k
    if weight.kind == "fp8":
        return Codes(jax.lax.bitcast_convert_type(laid["codes"], jnp.uint8), laid["scale"], None, None)
    return Codes(laid["codes"].astype(jnp.int8), laid["scale"], None, None)


def _weight_only(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    del act
    group = request.weight.group_size
    laid, cores = operands.laid, _cores(request)
    return weight_only.weight_only_matmul(operands.x, laid["codes"], laid["scale"], group_size=group, cores=cores)


def _eight_bit(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    """Rows are rounded as the spec says, which the kernel's own rounding need not do."""
    from qjax_kernels.gpu.eight_bit_kernel import eight_bit as run  # the compiler's packages are wanted only here

    x, w = operands.x, operands.laid
    if act is None:
        raise ValueError("`act` must say how rows are rounded")
    tiles = eight_bit_tiles(request.m, request.n, request.k, _cores(request))
    m = request.m if request.m < 8 else -(-request.m // 8) * 8
    codes, scale, _ = encode_activation(jnp.pad(x, ((0, m - request.m), (0, 0))), act, (1,))
    reach = max(32, -(-m // tiles.block_m) * tiles.block_m)  # the copy engine reads 128 bytes of scales at least
    scale = jnp.pad(scale[:, 0], (0, reach - m))
    y = run(codes, scale, w["codes"], w["scale"].reshape(request.n), tiles=tiles, out_dtype=jnp.dtype(request.dtype))
    y = functools.reduce(jnp.add, y).astype(request.dtype) if tiles.split_k > 1 else y
    return y[: request.m]


def _cores(request: Request) -> int:
    return request.device.cores if request.device.cores > 1 else 132
