"""Rounds the gradient that comes back to a product, without bias, so that both products of the backward pass have few bits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import ActSpec, IntSpec, PerGroup, affine_decode, affine_params, divide, round_activation


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
    """`y`; backward g becomes floor(g / s + u) s with u uniform in 0 .. 1, whose mean over draws is g; floats round to nearest.

    s = max |g| / q_max whatever the `scale_rule` of the spec: nothing is clipped.

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
    2015, arXiv 1502.02551; E5M2 for gradients: Micikevicius et al. 2022, arXiv 2209.05433.
    """
    del key, act, axes
    return y


def _forward(y: jax.Array, key: jax.Array, act: ActSpec, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    del act, axes
    return y, key


def _backward(act: ActSpec, axes: tuple[int, ...], key: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    if act.is_float:
        return round_activation(g, act, axes), None
    # The whole range: ends half a step beyond the codes would be clipped, and what is clipped has another mean.
    spec: Any = dataclasses.replace(act.spec, scale_rule="full")  # pyright: ignore[reportArgumentType]  # integers, by `check_gradient`
    wide = g.astype(jnp.float32)
    moved = jnp.moveaxis(wide, axes, range(-len(axes), 0))
    scale, _ = affine_params(moved.reshape(*moved.shape[: g.ndim - len(axes)], -1), spec)
    scale = scale.reshape([1 if i in axes else n for i, n in enumerate(g.shape)])
    codes = jnp.floor(divide(wide, scale) + jax.random.uniform(key, g.shape))
    return affine_decode(jnp.clip(codes, spec.qmin, spec.qmax), scale, None).astype(g.dtype), None


rounded_gradient.defvjp(_forward, _backward)
