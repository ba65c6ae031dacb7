"""The kernels of `qjax_kernels.gpu` as values, with weights (N, K) in native integers or FP8: Mosaic GPU for Hopper, XLA for others."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from qjax_kernels.gpu import eight_bit, stock, weight_only
from qjax_kernels.gpu.order import BLOCK, by_threads, in_order
from qjax_kernels.gpu.tiles import padded_rows
from qjax_kernels.request import Request, Weight

from qjax.core import ActSpec, FloatSpec, encode_activation
from qjax.runtime.kernels import Codes, Kernel, Layout
from qjax.runtime.request import Operands

# The layers of a model ask for the same few products: each is traced and lowered once.
_once = functools.partial(jax.jit, static_argnums=(0, 2))


def kernels() -> tuple[Kernel, ...]:
    """Returns them, the fastest first."""
    layout = Layout("cuda kernels, codes by threads", _pack, _unpack)
    return (
        Kernel("hopper 8 bit", "cuda", eight_bit.why_not, _eight_bit, layout, ("int8", "fp8")),
        Kernel("hopper weight-only", "cuda", weight_only.why_not, _weight_only, layout, (None,)),
        Kernel("cuda by groups", "cuda", stock.why_not, _by_groups, layout, (None,)),
    )


def _pack(weight: Weight, codes: Codes) -> dict[str, jax.Array]:
    if weight.kind == "fp8":
        return {"codes": jax.lax.bitcast_convert_type(codes.codes, jnp.float8_e4m3fn), "scale": codes.scale}
    scale = codes.scale if weight.group_size is None else weight_only.whole_rows(codes.scale)
    if weight.bits != 4:
        return {"codes": codes.codes.astype(jnp.int8), "scale": scale}
    placed = by_threads(codes.codes) if _by_threads(weight, codes.codes.shape[-1]) else codes.codes
    return {"codes": placed.astype(jnp.int4), "scale": scale}


def _unpack(weight: Weight, k: int, laid: dict[str, jax.Array]) -> Codes:
    if weight.kind == "fp8":
        return Codes(jax.lax.bitcast_convert_type(laid["codes"], jnp.uint8), laid["scale"], None, None)
    groups = 1 if weight.group_size is None else k // weight.group_size
    codes = laid["codes"].astype(jnp.int8)
    return Codes(in_order(codes) if _by_threads(weight, k) else codes, laid["scale"][..., :groups], None, None)


def _by_threads(weight: Weight, k: int) -> bool:
    """Whether codes lie by threads, as the Hopper kernels take them: wherever a group has whole blocks of them."""
    return weight.kind == "int" and weight.bits == 4 and k % BLOCK == 0 and (weight.group_size or BLOCK) % BLOCK == 0


@_once
def _weight_only(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    del act
    group = request.weight.group_size
    laid, cores = operands.laid, _cores(request)
    how = {"group_size": group, "padded_scales": group is not None, "cores": cores}
    return weight_only.weight_only_matmul(operands.x, laid["codes"], laid["scale"], **how)


@_once
def _by_groups(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    del act
    laid, group = operands.laid, request.weight.group_size
    # Columns of x meet codes as they lie: groups keep theirs.
    x = by_threads(operands.x) if _by_threads(request.weight, request.k) else operands.x
    return stock.grouped_matmul(x, laid["codes"], laid["scale"], group_size=group or request.k)


@_once
def _eight_bit(request: Request, operands: Operands, act: ActSpec | None) -> jax.Array:
    if act is None:
        raise ValueError("`act` must say how rows are rounded")
    laid, m = operands.laid, request.m
    x = jnp.pad(operands.x, ((0, padded_rows(m) - m), (0, 0)))
    top = _top(act)
    room = -(-m // 256) * 256  # scales to the end of the largest blocks, so that nobody has to make them longer
    rounded = None if top is None else eight_bit.rounded_by_kernel(x, dtype=laid["codes"].dtype, top=top, room=room)
    if rounded is None:
        codes, scale, _ = encode_activation(x, act, (1,))
        rounded = codes, scale[:, 0]
    how = {"out_dtype": jnp.dtype(request.dtype), "cores": _cores(request)}
    return eight_bit.scaled_product(*rounded, laid["codes"], laid["scale"], **how)[:m]


def _top(act: ActSpec) -> float | None:
    """The largest magnitude over the scale, where the kernel rounds finite rows as the spec says; None where it does not.

    >>> from qjax.core import dynamic, fp8_e4m3, int8
    >>> [_top(dynamic(spec)) for spec in (int8(), int8(scale_rule="full"), fp8_e4m3(), int8(scale_dtype="bfloat16"))]
    [127.5, 127.0, 448.0, None]
    """
    spec = act.spec
    if spec.scale_dtype != "float32":
        return None
    if isinstance(spec, FloatSpec):
        return eight_bit.E4M3_MAX if spec.element == "e4m3" else None
    if spec.bits != 8 or not (spec.signed and spec.symmetric):
        return None
    return spec.qmax + (0.5 if spec.scale_rule == "half" else 0.0)


def _cores(request: Request) -> int:
    return request.device.cores if request.device.cores > 1 else 132
