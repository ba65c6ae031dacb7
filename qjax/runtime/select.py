"""What runs at a site: its lookup, its integer product, or a float product with the dequantized weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import ActSpec, QTensor, Spec, round_activation, round_inliers
from qjax.program import Packed, Site, compat, materialize
from qjax.runtime.adapter import adapter_product
from qjax.runtime.adapter import why_not as why_no_adapter
from qjax.runtime.convolution import window_product
from qjax.runtime.fused import Memo, Together, product_together
from qjax.runtime.integer import conv_axes, product, why_not, why_not_float8
from qjax.runtime.kernels import Runtime, choose
from qjax.runtime.layouts import laid_rows
from qjax.runtime.lookup import gather_rows
from qjax.runtime.multiply import Plain, Shared, kernel_product
from qjax.runtime.request import request_of
from qjax.runtime.rotation import input_axes, rotate_axes, rotated_operands

FLOAT, INTEGER, MIXED, FP8 = "xla", "xla int8", "xla int8 + 16 bit outliers", "xla float8"


def packed_rule(
    site: Site, eqn: Any, operands: list[Any], state: Any, runtime: Runtime | None = None, memo: Memo | None = None,
    shared: Shared | None = None,
) -> tuple[list[Any], Any]:  # fmt: skip
    """Runs a site whose weight is packed: on a kernel of `runtime` that takes it, else as follows, which is all XLA.

    A lookup reads and dequantizes only the rows it needs. A weight with an activation spec multiplies integers or FP8 where the form of
    the product has that (see `integer.why_not`), and rounds its activations in front of a float product where it has not. Any
    other weight is dequantized in front of the float operation, which XLA fuses; one with an on-line rotation stays rotated, and its
    input is. A low-rank part runs as two thin products of the float activations beside any of them, where `adapter.why_not` has nothing
    against it.
    """
    weight = operands[site.operand]
    if isinstance(weight, Packed) and weight.q.adapter is not None and site.op != "gather":
        thin = adapter_product(site, eqn, operands)
        if thin is not None:
            plain = [Packed(weight.q.with_adapter(None), weight.pending) if i == site.operand else v for i, v in enumerate(operands)]
            (out,), state = packed_rule(site, eqn, plain, state, runtime, memo, shared)
            return [(out.astype(jnp.float32) + thin).astype(out.dtype)], state
    if isinstance(weight, Packed) and isinstance(weight.q.form, Together):
        if runtime is not None and memo is not None and weight.q.adapter_left is None:
            out = product_together(site, eqn, materialize(operands[1 - site.operand]), weight, runtime, memo, _plain)
            if out is not None:
                return [out], state
        apart = [Packed(weight.q.plain(), weight.pending) if i == site.operand else v for i, v in enumerate(operands)]
        return packed_rule(site, eqn, apart, state, runtime, shared=shared)
    if runtime is not None and isinstance(weight, Packed) and site.op != "gather":
        others = tuple(jnp.asarray(materialize(v)) for v in operands[2:])
        x = materialize(operands[1 - site.operand])
        if site.op == "conv_general_dilated":
            out = window_product(site, eqn, x, weight, runtime, _plain)
            if out is not None:
                return [out], state
        out = kernel_product(site, eqn, x, weight, runtime, _plain(site, eqn), others, shared)
        if out is not None:
            return [out], state
    if isinstance(weight, Packed) and weight.q.form is not None:
        if site.op == "gather":
            rows = laid_rows(weight, eqn, operands[1])
            if rows is not None:
                return [rows], state
        plain = [Packed(weight.q.plain(), weight.pending) if i == site.operand else v for i, v in enumerate(operands)]
        return packed_rule(site, eqn, plain, state)
    if isinstance(weight, Packed) and site.op == "gather":
        rows = gather_rows(weight, eqn, operands[1])
        if rows is not None:
            return [rows], state
    elif isinstance(weight, Packed) and weight.q.act is not None:
        others = [None if i == site.operand else materialize(v) for i, v in enumerate(operands)]
        return [_with_gradient(site, eqn, others, weight)], state
    elif isinstance(weight, Packed) and weight.q.rotation is not None:
        turned = rotated_operands(site, [v if i == site.operand else materialize(v) for i, v in enumerate(operands)], weight)
        if turned is not None:
            return compat.bind(eqn, turned), state
    return compat.bind(eqn, [materialize(v) for v in operands]), state


def _plain(site: Site, eqn: Any) -> Plain:
    """The same without kernels, of the activation, the weight, and what comes behind them."""

    def run(x: jax.Array, weight: Packed, *others: jax.Array) -> jax.Array:
        values = [x, weight, *others] if site.operand == 1 else [weight, x, *others]
        return packed_rule(site, eqn, values, None)[0][0]

    return run


def kernel_of(site: Site, spec: Spec, act: ActSpec | None, q: QTensor, runtime: Runtime) -> tuple[str, str, tuple[str, ...]]:
    """Returns what runs a site.

    Args:
      site: any site.
      spec: of its weight.
      act: of its activations.
      q: its weight, arrays or shapes, whole.
      runtime: the kernels to choose from.

    Returns:
      (name; why its activations are rounded in front of a float product, or ""; why faster kernels do not run it, in words).
    """
    adapter = q.adapter_left is not None
    bare = dataclasses.replace(q, adapter_left=None, adapter_right=None) if adapter and not why_no_adapter(site) else q
    request = request_of(site, dataclasses.replace(bare, act=act), runtime.device, q.dtype, q.dtype)
    reasons: tuple[str, ...] = ()
    if isinstance(request, str):
        some = any(kernel.platform == runtime.device.platform for kernel in runtime.kernels)
        reasons = (request,) if some and site.op != "gather" else ()
    else:
        chosen = choose(request, runtime.kernels, tuned=runtime.tuned)
        reasons = tuple(f"{name}: {why}" for name, why in chosen.reasons)
        if chosen.kernel is not None:
            return chosen.kernel.name, "", reasons
    return (*_xla_of(site, spec, act, adapter), reasons)


def _xla_of(site: Site, spec: Spec, act: ActSpec | None, adapter: bool) -> tuple[str, str]:
    """Which formulation in XLA a site gets, and why not one that multiplies integers."""
    if act is None or site.op == "gather":
        return FLOAT, ""
    if site.custom_rule:
        return FLOAT, "its activations stay float inside a custom derivative rule"
    reason = why_not_float8(site, spec, act) if act.is_float else why_not(site, spec)
    if not reason and adapter and why_no_adapter(site):
        reason = "so is the low-rank part, which that product has no place for"
    if reason:
        return FLOAT, f"its activations are rounded in front of a float product: {reason}"
    return FP8 if act.is_float else INTEGER if act.outliers is None else MIXED, ""


def _with_gradient(site: Site, eqn: Any, operands: Sequence[Any], weight: Packed) -> jax.Array:
    """The product, with the straight-through gradient of the float product for its activations."""

    def float_product(x: jax.Array, others: Sequence[Any], weight: Packed) -> jax.Array:
        values = [x if v is None else v for v in others]
        values[site.operand] = weight.value()
        return compat.bind(eqn, values)[0]

    @jax.custom_vjp
    def run(x: jax.Array, others: Sequence[Any], weight: Packed) -> jax.Array:
        values = [x if i == 1 - site.operand else v for i, v in enumerate(others)]
        values[site.operand] = weight
        out = product(site, eqn, values)
        return float_product(rounded(site, eqn, x, weight.q), others, weight) if out is None else out

    def forward(x: jax.Array, others: Sequence[Any], weight: Packed) -> tuple[jax.Array, Any]:
        return run(x, others, weight), (x, others, weight)

    def backward(saved: Any, t: jax.Array) -> tuple[Any, None, None]:
        x, others, weight = saved
        (dx,) = jax.vjp(lambda x: float_product(x, others, weight), x)[1](t)
        return dx, None, None

    run.defvjp(forward, backward)
    others = [None if i == 1 - site.operand else v for i, v in enumerate(operands)]
    return run(operands[1 - site.operand], others, weight)


def rounded(site: Site, eqn: Any, x: jax.Array, q: QTensor) -> jax.Array:
    """Returns a site's activations as its integers stand for them, in float."""
    act = q.act
    # What is rounded of an input that is divided first is the quotient, which only an integer product has.
    if act is None or q.input_scale is not None:
        return x
    turned = None if q.rotation is None else input_axes(site, q)
    if q.rotation is not None and turned is not None:
        plain = dataclasses.replace(q, rotation=None)
        return rotate_axes(rounded(site, eqn, rotate_axes(x, turned, q.rotation), plain), turned, q.rotation, back=True)
    axes = shared_axes(site, eqn, act, x.ndim)
    if q.act_scale is None:
        return round_inliers(x, act, axes, column_axes(site, x.ndim))
    # Parts of a stack may have ranges of their own; in float they share the widest.
    at = jnp.argmax(q.act_scale)
    scale = q.act_scale.reshape(-1)[at].reshape([1] * x.ndim)
    zero_point = None if q.act_zero_point is None else q.act_zero_point.reshape(-1)[at].reshape([1] * x.ndim)
    return round_activation(x, act, axes, scale, zero_point)


def shared_axes(site: Site, eqn: Any, act: ActSpec, ndim: int) -> tuple[int, ...]:
    """Returns the axes of a site's activation that share a scale: all of them, or per token those that the product contracts."""
    if not act.per_token:
        return tuple(range(ndim))
    if site.op == "conv_general_dilated":
        return conv_axes(eqn, ndim)
    return tuple(x for _, x in site.pairs)


def column_axes(site: Site, ndim: int) -> tuple[int, ...]:
    """Returns the axes of a site's activation over which one of its columns runs."""
    others = {x for _, x in (*site.pairs, *site.batch)}
    return tuple(i for i in range(ndim) if i not in others)
