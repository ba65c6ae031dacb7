"""Convolutions with windows of one value as products of rows: y (pixels, N) = x (pixels, K) w (N, K)^T.

A larger window would have to be copied out for every pixel, which reads and writes its values as often as it is large: XLA's own
convolution of the dequantized weight, which is small beside the pixels that it meets, is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from qjax.program import Packed, Site, compat, trace
from qjax.runtime.kernels import Runtime
from qjax.runtime.multiply import kernel_product
from qjax.runtime.request import why_not_pointwise


def pointwise_product(
    site: Site, eqn: Any, x: jax.Array, weight: Packed, runtime: Runtime, plain: Callable[[Site, Any], Any]
) -> jax.Array | None:
    """Runs a convolution on a kernel.

    Args:
      site: of a `conv_general_dilated`.
      eqn: its equation.
      x: the activation.
      weight: the other operand.
      runtime: the kernels to choose from.
      plain: of a site and its equation, the product as XLA has it.

    Returns:
      The result of the equation; None where its windows are larger, its input is dilated, or no kernel takes it.
    """
    q = weight.q
    if why_not_pointwise(site, q) or any(d != 1 for d in eqn.params["lhs_dilation"]):
        return None
    dims, settings = eqn.params["dimension_numbers"], {key: eqn.params[key] for key in ("precision", "preferred_element_type")}
    rows = _pixels(eqn, x).reshape(*_shape_of_pixels(eqn), *q.sizes)
    lead = len(dims.out_spec) - 1
    numbers = (tuple(range(lead, rows.ndim)), tuple(a + q.ndim for a in q.axes)), ((), ())

    def product(p: Any, x: jax.Array) -> jax.Array:
        return lax.dot_general(x, p[site.path], numbers, **settings)

    shape = jax.ShapeDtypeStruct(q.shape, eqn.invars[1].aval.dtype)
    program = trace(product, {site.path: shape}, jax.ShapeDtypeStruct(rows.shape, rows.dtype))
    (whole,) = program.sites
    at = compat.parts(program.jaxpr)[0].eqns[whole.key[0]]
    y = kernel_product(whole, at, rows, weight, runtime, plain(whole, at))
    if y is None:
        return None
    # (batch, spatial..., features) to where the equation has them.
    batch, features, *spatial = dims.out_spec
    order = {batch: 0, features: lead, **{axis: i + 1 for i, axis in enumerate(spatial)}}
    return y.transpose([order[i] for i in range(y.ndim)])


def _pixels(eqn: Any, x: jax.Array) -> jax.Array:
    """Those of x that windows stand on, (batch, spatial..., features)."""
    batch, features, *spatial = eqn.params["dimension_numbers"].lhs_spec
    around, steps = [(0, 0, 0)] * x.ndim, [1] * x.ndim
    for axis, (low, high), step in zip(spatial, eqn.params["padding"], eqn.params["window_strides"], strict=True):
        around[axis], steps[axis] = (low, high, 0), step
    x = lax.pad(x, x.dtype.type(0), around)
    return lax.slice(x, [0] * x.ndim, x.shape, steps).transpose(batch, *spatial, features)


def _shape_of_pixels(eqn: Any) -> list[int]:
    batch, _, *spatial = eqn.params["dimension_numbers"].out_spec
    return [eqn.outvars[0].aval.shape[axis] for axis in (batch, *spatial)]
