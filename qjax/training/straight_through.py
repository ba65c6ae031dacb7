"""The straight-through estimator: rounds forward, passes the gradient backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import ActSpec, Spec, in_range, round_inliers, round_trip


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def straight_through(w: Any, spec: Spec, axes: tuple[int, ...], stacked: tuple[int, ...], name: str) -> jax.Array:
    """Returns `dequantize(quantize(w))`, with the gradient of the identity where `w` lies in the range of the codes.

    d out / d w = 1 where q_min <= w / scale + zero_point <= q_max, else 0; the scale counts as a constant. Under
    `scale_rule="half"`, whose range ends half a step beyond the codes, the mask is wider by that half step (else the largest
    weight of most groups would never train); it is also wider by the rounding of the scale to its dtype.

    Args:
      w: float weight of any shape.
      spec: what it is rounded to.
      axes: its contracted axes, negative.
      stacked: its axes that hold independent weights, negative.
      name: what an error calls it.

    Returns:
      An array of the shape and dtype of `w`.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> straight_through(jnp.array([[0.2], [1.5]]), qjax.int2(scale_rule="full"), (-2,), (), "w").tolist()
      [[0.0], [1.5]]
    """
    return round_trip(w, spec, axes, stacked, name=name)


@straight_through.defjvp
def _straight_through_jvp(
    spec: Spec, axes: tuple[int, ...], stacked: tuple[int, ...], name: str, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (w,), (t,) = primals, tangents
    inside = in_range(w, spec, axes, stacked, name=name)
    return straight_through(w, spec, axes, stacked, name), jnp.where(inside, t, jnp.zeros_like(t))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def straight_through_activation(x: Any, act: ActSpec, axes: tuple[int, ...], rows: tuple[int, ...] = ()) -> jax.Array:
    """Returns activations rounded with ranges of their own, with the gradient of the identity: such ranges clip nothing.

    Args:
      x: floating, any shape.
      act: a dynamic `ActSpec`.
      axes: the axes that share a scale.
      rows: the axes over which a column runs, for the outlier columns of `act`, which are not rounded.

    Returns:
      An array of the shape and dtype of `x`.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> act = qjax.dynamic(qjax.int2(scale_rule="full"))
      >>> jax.grad(lambda x: straight_through_activation(x, act, (1,)).sum())(jnp.array([[1.0, -2.0]])).tolist()
      [[1.0, 1.0]]
    """
    return round_inliers(x, act, axes, rows)


@straight_through_activation.defjvp
def _straight_through_activation_jvp(
    act: ActSpec, axes: tuple[int, ...], rows: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    return straight_through_activation(primals[0], act, axes, rows), tangents[0]
