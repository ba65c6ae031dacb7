"""Rounds the gradient that comes back to a product, without bias, so that both products of the backward pass have few bits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import ActSpec, FloatSpec, IntSpec, PerGroup, affine_decode, affine_params, divide
from qjax.core.elements import MINIFLOATS, floor_log2, power_of_two
from qjax.core.floating import float_scale


def check_gradient(act: Any) -> None:
    """Refuses what gradients cannot be rounded to.

    Raises:
      TypeError, ValueError: naming `gradient` and the remedy.
    """
    if not isinstance(act, ActSpec):
        raise TypeError(f"`gradient` must be qjax.dynamic(...) or None, got {act!r}")
    integers = isinstance(act.spec, IntSpec) and act.spec.symmetric and act.spec.signed
    floats = act.is_float and not isinstance(act.spec.granularity, PerGroup)
    if act.static or not (integers or floats):
        raise ValueError("`gradient` must be dynamic and of signed symmetric integers such as qjax.dynamic(qjax.int8()), or of floats "
                         f"without groups such as qjax.dynamic(qjax.fp8_e5m2()), got {act}")  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rounded_gradient(y: jax.Array, key: jax.Array, act: ActSpec, axes: tuple[int, ...]) -> jax.Array:
    """`y`; backward g is rounded at random to one of the two neighbours on the grid, so that the mean over draws is g.

    Integers: floor(g / s + u) s with u uniform in 0 .. 1, s = max |g| / q_max.
    Floats: the number below g / s or the one above it, times s, as `random_float` has it; s = max |g| / the largest number.
    s is a float32 number whatever `scale_rule` and `scale_dtype` of the spec say: nothing is clipped. Where `y` has 16 bits it is the
    power of two above, so that codes times s are numbers of that dtype and no further rounding moves the mean.

    Args:
      y: the result of a product, floating, any shape.
      key: a random key.
      act: what the gradient becomes, dynamic.
      axes: the axes of `y` that share a scale.

    Returns:
      `y`.

    Example:
      >>> import qjax
      >>> act = qjax.dynamic(qjax.int8(scale_rule="full"), per="tensor")
      >>> f = lambda y: (rounded_gradient(y, jax.random.key(0), act, (0,)) * jnp.array([127.0, 0.5])).sum()
      >>> jax.grad(f)(jnp.zeros(2)).tolist() in ([127.0, 0.0], [127.0, 1.0])
      True

    Source: accurate quantized training (Abdolrashidi et al. 2021, arXiv 2105.03536); stochastic rounding of gradients: Gupta et al.
    2015, arXiv 1502.02551; E5M2 for gradients: Micikevicius et al. 2022, arXiv 2209.05433, where they round to nearest; at random, and why
    that matters below 16 bits: Wang et al. 2018, arXiv 1812.08011.
    """
    del key, act, axes
    return y


def random_float(x: jax.Array, draw: jax.Array, spec: FloatSpec) -> jax.Array:
    """One of the two numbers of a float format next to x: the upper one, in magnitude, where u < (|x| - lower) / (upper - lower).

    Neighbours lie 2^(e - M) apart for 2^e <= |x| < 2^(e + 1) with M bits of mantissa, and below the smallest normal number as far apart as
    just above it. So the mean over u uniform in 0 .. 1 is x, and a number of the format stays as it is.

    Args:
      x: float32, any shape; magnitudes beyond the largest number become that, never infinity. NaN stays.
      draw: float32, the shape of `x`, at least 0 and below 1.
      spec: the format; its scales are not looked at.

    Returns:
      float32, the shape of `x`.

    Example:
      >>> import qjax
      >>> x = jnp.float32([1.1, -1.1, 1.25, 6e4])
      >>> [random_float(x, jnp.full(4, u), qjax.fp8_e5m2()).tolist() for u in (0.3, 0.5)]
      [[1.25, -1.25, 1.25, 57344.0], [1.0, -1.0, 1.25, 57344.0]]
    """
    size = jnp.minimum(jnp.abs(x), spec.largest)
    if spec.element == "int8":
        exponent = jnp.full(x.shape, -6, jnp.int32)
    else:
        element = MINIFLOATS[spec.element]
        exponent = jnp.maximum(floor_log2(size), 1 - element.bias) - element.mantissa_bits
    steps = size * power_of_two(-exponent)  # by a power of two: exact
    below = jnp.floor(steps)
    rounded = (below + (draw < steps - below)) * power_of_two(exponent)
    return jnp.where(jnp.isnan(x), x, jnp.copysign(rounded, x))


def _forward(y: jax.Array, key: jax.Array, act: ActSpec, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    del act, axes
    return y, key


def _backward(act: ActSpec, axes: tuple[int, ...], key: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    # The whole range: ends half a step beyond the codes, or a scale that was rounded down, would clip, and change the mean.
    wide, draw = g.astype(jnp.float32), jax.random.uniform(key, g.shape)
    if isinstance(act.spec, FloatSpec):
        exact = dataclasses.replace(act.spec, scale_dtype="float32", exponent_rule="floor")
        scale = _held(float_scale(jnp.max(jnp.abs(wide), axis=axes, keepdims=True, initial=0.0), exact), g.dtype)
        return (random_float(divide(wide, scale), draw, exact) * scale).astype(g.dtype), None
    spec: Any = dataclasses.replace(act.spec, scale_rule="full", scale_dtype="float32")
    moved = jnp.moveaxis(wide, axes, range(-len(axes), 0))
    scale, _ = affine_params(moved.reshape(*moved.shape[: g.ndim - len(axes)], -1), spec)
    scale = _held(scale.reshape([1 if i in axes else n for i, n in enumerate(g.shape)]), g.dtype)
    codes = jnp.floor(divide(wide, scale) + draw)
    return affine_decode(jnp.clip(codes, spec.qmin, spec.qmax), scale, None).astype(g.dtype), None


def _held(scale: jax.Array, dtype: Any) -> jax.Array:
    """The scale, or where gradients have 16 bits the power of two above it: what codes times it are then is a number of their dtype.

    Else the last rounding, to nearest, would move the mean.
    """
    if dtype == jnp.float32:
        return scale
    exponent = floor_log2(scale)
    return power_of_two(exponent + (scale > power_of_two(exponent)))


rounded_gradient.defvjp(_forward, _backward)
