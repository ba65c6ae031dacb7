"""Training that begins with what a method after training found: its codes and scales, not those of plain rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import IntSpec, PerGroup, QTensor, divide, logical_blocks
from qjax.ptq.method import Problem
from qjax.training.estimator import BeginsPacked, Learned
from qjax.training.planned import Planned, Trained


def adopted(plan: Planned, packed: Sequence[Any], near: Sequence[Any]) -> tuple[list[Any], dict[str, Learned]]:
    """Float parameters that round to packed ones, and what their estimators have learned then.

    Args:
      plan: what is rounded.
      packed: the flat parameters of a method's result.
      near: flat float parameters of the same shapes; the new ones are the nearest to them that round to the codes.

    Returns:
      (flat parameters: floats in place of what was packed, the other leaves of `packed` as they are; what is learned, by path).

    Raises:
      ValueError: naming the leaf, what it is, and the remedy.
    """
    new, learned = list(packed), {}
    for index, leaf in enumerate(packed):
        if not isinstance(leaf, QTensor):
            continue
        path, trained = plan.program.leaves[index].path, plan.weights.get(index)
        if trained is None:
            raise ValueError(f"`packed` leaf {path!r} is {leaf.spec}, and the policy leaves it float: give it a rule with that spec, or "
                             "put its dequantize() in its place")  # fmt: skip
        if near[index].shape != leaf.shape:
            raise ValueError(f"`params` leaf {path!r} is {near[index].shape} and that of `packed` {leaf.shape}: give what was quantized")
        q = leaf.plain()
        reason = _why_not(q, trained)
        if reason:
            raise ValueError(f"`packed` leaf {path!r} is nothing to begin with: {reason}")
        new[index], learned[path] = _begun(jnp.asarray(near[index]), q, trained)
    return new, learned


def _why_not(q: QTensor, trained: Trained) -> str:
    """Why an estimator cannot take over a packed weight, and what to do; "" if it can."""
    spec, estimator, schedule = trained.spec, trained.train.weight, trained.train.schedule
    grouped = isinstance(spec, IntSpec) and isinstance(spec.granularity, PerGroup)
    reasons = (
        (q.spec != spec, f"it is {q.spec}, the policy trains {spec}; give both the same spec"),
        (bool(schedule.weights or schedule.bits), "its schedule begins with float weights or other bits; begin without one"),
        (not isinstance(estimator, BeginsPacked), f"{estimator.name} takes its range from the weights; train with qjax.lsq()"),
        (q.perm is not None and grouped, "its groups are of reordered columns; use static_groups=True, or no act_order"),
        (q.rotation is not None or trained.rotation is not None, "it is rotated on line; begin without online_rotation"),
        (q.input_scale is not None, "its input is rescaled on line; begin from a method that does not rescale"),
        (q.adapter_left is not None, "it has a low-rank part; train that with qjax.qlora, or begin without low_rank"),
        (q.nested_scale is not None, "its scales are quantized; take a spec without double_quant"),
    )
    return next((reason for holds, reason in reasons if holds), "")


def _begun(w: jax.Array, q: QTensor, trained: Trained) -> tuple[jax.Array, Learned]:
    estimator: Any = trained.train.weight
    learned = estimator.adopt(q.scale.astype(jnp.float32), None if q.zero_point is None else q.zero_point.astype(jnp.float32))
    problem = trained.problem(w)
    new = nearest(problem, q)
    if bool(jnp.any(_codes(estimator.pack(problem._replace(w=new), learned)) != _codes(q))):
        raise ValueError(f"`packed` leaf {trained.leaf.path!r}: numbers of {w.dtype} are too coarse to round to its codes; give `params` "
                         "in float32")  # fmt: skip
    return new, learned


def _codes(q: QTensor) -> jax.Array:
    """The codes as float32, of the logical shape."""
    ones = jnp.ones(q.scale.shape, jnp.float32)
    zero = None if q.zero_point is None else 0 * ones
    return dataclasses.replace(q, scale=ones, zero_point=zero, dtype=np.dtype(np.float32), act=None).dequantize()


def nearest(problem: Problem, q: QTensor) -> jax.Array:
    """The numbers nearest to w that round to given codes.

    w' = (clip(w / s + z, c - 1/2 + e, c + 1/2 - e) - z) s, within the range of the codes, so that the gradient of w' passes;
    e is a hundredth of a step, or what the dtype of w needs.

    Args:
      problem: the float weight and its geometry.
      q: the packed weight, without a permutation of groups.

    Returns:
      An array of the shape and dtype of `problem.w`.

    Example:
      >>> import qjax
      >>> w, q = jnp.float32([[3.9], [0.0]]), qjax.core.quantize(jnp.float32([[3.0], [-7.5]]), qjax.int4(), axes=(0,))
      >>> [round(v, 2) for v in nearest(Problem(w, qjax.int4(), (-2,), (), 1, "w"), q).ravel().tolist()]
      [3.49, -7.51]
    """
    spec: Any = problem.spec
    blocks = lambda w: logical_blocks(w.astype(jnp.float32), spec, problem.axes, problem.stacked)  # noqa: E731
    (w, _, to_logical), codes = blocks(problem.w), blocks(_codes(q))[0]
    scale = q.scale.astype(jnp.float32)[..., None]
    zero = 0.0 if q.zero_point is None else q.zero_point.astype(jnp.float32)[..., None]
    edge = jnp.minimum(0.5, jnp.maximum(0.01, 2 * jnp.finfo(problem.w.dtype).eps * (jnp.abs(codes - zero) + 0.5)))
    inside = jnp.minimum(edge, 0.5 - edge)  # of the range; nothing where the dtype knows the codes alone
    low, high = jnp.maximum(codes - 0.5 + edge, spec.qmin + inside), jnp.minimum(codes + 0.5 - edge, spec.qmax - inside)
    steps = jnp.clip(divide(w, scale) + zero, low, high) - zero
    return to_logical(steps * scale).astype(problem.w.dtype)
