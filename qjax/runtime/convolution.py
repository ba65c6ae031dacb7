"""Convolutions as products of rows: y (pixels, N) = x (pixels, K) w (N, K)^T, a row being the window that a pixel of the result sees.

Windows of more than one value are copied out for it, which is worth it as long as they are few: XLA dequantizes the weight in every call.

Source: the `im2col` of Chellapilla et al. 2006, "High Performance Convolutional Neural Networks for Document Processing".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.program import Packed, Site, compat, trace
from qjax.runtime.kernels import Runtime
from qjax.runtime.multiply import kernel_product
from qjax.runtime.request import why_not_windows


def window_product(
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
      The result of the equation; None where `why_not_windows` says so, its input is dilated, or no kernel takes it.
    """
    q = weight.q
    if why_not_windows(site, q) or any(d != 1 for d in eqn.params["lhs_dilation"]):
        return None
    dims, settings = eqn.params["dimension_numbers"], {key: eqn.params[key] for key in ("precision", "preferred_element_type")}
    rows, lead = _windows(eqn, x, q.shape), len(dims.out_spec) - 1
    of_x = {dims.rhs_spec[1]: rows.ndim - 1, **{axis: lead + i for i, axis in enumerate(dims.rhs_spec[2:])}}
    flat = tuple(a + q.ndim for a in q.axes)
    numbers = (tuple(of_x[a] for a in flat), flat), ((), ())

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


def _windows(eqn: Any, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What each pixel of the result sees, (batch, spatial..., window..., features), of a weight of `shape`."""
    params = eqn.params
    dims, steps = params["dimension_numbers"], params["window_strides"]
    batch, features, *spatial = dims.lhs_spec
    x = x.transpose(batch, *spatial, features)
    x = lax.pad(x, x.dtype.type(0), [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)])
    sizes, counts = [shape[i] for i in dims.rhs_spec[2:]], [eqn.outvars[0].aval.shape[i] for i in dims.out_spec[2:]]

    def seen(place: tuple[int, ...]) -> jax.Array:
        starts = [i * d for i, d in zip(place, params["rhs_dilation"], strict=True)]
        ends = [start + (n - 1) * step + 1 for start, n, step in zip(starts, counts, steps, strict=True)]
        return lax.slice(x, [0, *starts, 0], [x.shape[0], *ends, x.shape[-1]], [1, *steps, 1])

    found = [seen(place) for place in itertools.product(*map(range, sizes))]
    out = jnp.stack(found, axis=-2) if len(found) > 1 else found[0][..., None, :]
    return out.reshape(*out.shape[:-2], *sizes, out.shape[-1])
