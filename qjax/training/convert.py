"""`convert`: a model that was trained through rounding becomes a packed one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.core import ActSpec, OnlineRotation, QProduct, QTensor
from qjax.graph.batch_norm_folds import scaled
from qjax.policy import ProductChoice
from qjax.program import split_arguments
from qjax.ptq.products import product_row
from qjax.ptq.quantize import Result, cache_notes, describe
from qjax.runtime.rotation import rotate_axes
from qjax.training.arguments import check_trained
from qjax.training.fake_quant import FakeQuant
from qjax.training.freezing import standing
from qjax.training.planned import Planned, Trained
from qjax.training.qat import training_of
from qjax.training.qlora import QLoRA
from qjax.training.side_state import whole_ranges
from qjax.training.state import Quant, check


def convert(fq: FakeQuant, params: Any, *args: Any, quant: Quant | None = None, **kwargs: Any) -> Result:
    """Packs what was trained: the weights of the result are those that `fq` computes with, bit for bit.

    Learned scales and offsets become the scales and zero points of the packed weights; learned and static ranges of activations become
    those of their integer products; what a schedule has frozen is packed as it was then. Random rounding becomes rounding to nearest. No
    data is read.

    The weights of `folds` are folded first: packed is Q(f W), their batch norms multiply by one, and a bias, or beta, holds the shift. Run
    the result with the function in evaluation.

    Args:
      fq: what was trained, from `qjax.fake_quant`.
      params: the trained float parameters.
      *args: arguments of the function as `fq` takes them, to trace it with; shapes (`jax.ShapeDtypeStruct`) are enough.
      quant: the state of its quantizers, if it has one.
      **kwargs: keyword arguments of the function.

    Returns:
      A `Result` as `qjax.quantize` gives it.

    Raises:
      TypeError: `fq` is something else; numbers are traced; arguments of the function are missing.
      ValueError: the state is missing, of another policy, without ranges, or at a step before its schedule rounds everything; a weight
        or the state holds NaN or infinity, or a learned clipping level is negative; a channel that a batch norm multiplies by nothing
        is packed by a spec that has no zero.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fn = lambda p, x: x @ p["w"]
      >>> fq = qjax.fake_quant(fn, qjax.Policy([qjax.Rule("*", weight=qjax.int4(), train=qjax.lsq())]))
      >>> params, x = {"w": jnp.linspace(-1, 1, 8).reshape(4, 2)}, jnp.eye(4)
      >>> quant = fq.init(jax.random.key(0), params, x)
      >>> result = convert(fq, params, x, quant=quant)
      >>> bool((result.params["w"].dequantize() == fq(params, x, quant=quant)).all())
      True
      >>> jax.jit(qjax.quantized(fn))(result.params, x).shape
      (4, 2)
    """
    if not isinstance(fq, FakeQuant):
        raise TypeError(f"`fq` must be what qjax.fake_quant gave, got {type(fq).__name__}{_elsewhere(fq)}")
    started = time.perf_counter()
    arguments = split_arguments(params, args, kwargs)
    plan = fq.plan(params, *args, **kwargs)
    # What an update did to frozen numbers does not count, as in the function.
    state = standing(check(quant, plan, missing=fq.missing, unknown=fq.unknown))
    _check_numbers(plan, arguments.params, state)
    flat, notes = _folded(plan, arguments.params)
    done = {i: (_packed(flat[i], trained, state), (*trained.notes, *notes.get(i, ()))) for i, trained in plan.weights.items()}
    for index in notes:
        _check_zeros(flat[index], done[index][0], plan.program.leaves[index].path)
    products = {choice.product.name: _product(choice, state) for choice in plan.products}
    report = describe(plan.program, plan.choices, flat, done, {"convert": round(time.perf_counter() - started, 3)}, {})
    methods = {t.leaf.path: t.train.weight.name for t in plan.weights.values()}
    rows = tuple(dataclasses.replace(row, method=methods.get(row.path, row.method)) for row in report.rows)
    more = tuple(map(product_row, fq.policy.resolve_products(plan.program)))
    report = dataclasses.replace(report, rows=(*rows, *more), notes=(*report.notes, *cache_notes(fq.policy)))
    packed = [done[i][0] if i in done else w for i, w in enumerate(flat)]
    return Result(arguments.rebuild(packed, arguments.inputs)[0], report, fq.policy, sites=products)


def _elsewhere(model: Any) -> str:
    """What packs that which trains in another way; "" for anything else."""
    if isinstance(model, QLoRA):
        return ": adapters are ended by its .attach, .merge or .requantize"
    origins = {base.__module__.rpartition(".")[0] for base in type(model).__mro__ if base.__name__ == "Module"}
    verbs = {"flax.linen": "a Linen module is packed by qjax.linen.convert(model, variables, *args)",
             "flax.nnx": "an NNX module is packed by qjax.nnx.convert(model, *args)"}  # fmt: skip
    return next((f": {what}" for origin, what in verbs.items() if origin in origins), "")


def _check_numbers(plan: Planned, params: Any, quant: Quant) -> None:
    if any(isinstance(x, Tracer) for x in (*params, *jax.tree.leaves(quant))):
        raise TypeError("`params` or `quant` is traced: call convert outside jit, it needs numbers")
    for index in dict.fromkeys((*plan.weights, *(plan.folding.where.values() if plan.folding is not None else ()))):
        w, path = params[index], plan.program.leaves[index].path
        if isinstance(w, (QTensor, jax.ShapeDtypeStruct)):
            raise TypeError(f"`params` leaf {path!r} is packed or a shape, {w!r}: give the trained float parameters")
        check_trained(w, f"`params` leaf {path!r}")
    for path, leaf in jax.tree_util.tree_leaves_with_path({k: v for k, v in quant.items() if k not in ("step", "seed", "held")}):
        _check_learned(jax.tree_util.keystr(path), path[-1].key, np.asarray(leaf))
    trains = [t.train for t in plan.weights.values()] + [training_of(choice.rule) for choice in plan.products]
    last = max((train.ends for train in trains), default=0)
    if last and float(quant["step"]) < last:
        raise ValueError(f"`quant` is at step {float(quant['step']):g}, and its schedule rounds everything to the bits of the policy from "
                         f"step {last} on: train on (quant = fq.advance(quant) after each update)")  # fmt: skip


def _check_learned(name: str, kind: str, value: np.ndarray) -> None:
    """Training that ran away leaves numbers that no grid has."""
    wrong = ~np.isfinite(value) | ((kind == "alpha") & (value < 0))
    if wrong.any():
        raise ValueError(f"`quant`{name} holds {value[wrong].flat[0]:g} ({wrong.sum()} of {value.size}); a {kind} is a "
                         f"{'positive' if kind == 'alpha' else 'finite'} number: "
                         'train with a lower rate for what `fq.labels` calls "learned", or begin again with `init`')  # fmt: skip


def _folded(plan: Planned, leaves: Sequence[Any]) -> tuple[list[Any], dict[int, tuple[str, ...]]]:
    """Flat parameters with batch norms folded, weights in float32 where they are; and remarks."""
    flat = [jnp.asarray(w) if i in plan.weights else w for i, w in enumerate(leaves)]
    if plan.folding is None:
        return flat, {}
    read = {i: jnp.asarray(leaves[i]) for i in plan.folding.where.values()}
    factors = jax.jit(plan.factors)(read)  # compiled, as training is
    for index, w in plan.folding.moved(read).items():
        flat[index] = jnp.asarray(w)
    for index, factor in factors.items():
        if not bool(jnp.all(jnp.isfinite(factor))):
            path, reads = plan.folding.weights[index], ", ".join(map(repr, plan.folding.reads(index)))
            raise ValueError(f"the batch norm of {path!r} multiplies it by NaN or infinity: look at what it is made of, {reads}")
        flat[index] = scaled(flat[index], factor)
    return flat, {i: (plan.folding.note(i),) for i in factors}


def _check_zeros(w: jax.Array, q: QTensor, path: str) -> None:
    """Refuses a folded weight of which a channel is all zero and does not stay so: its batch norm, which multiplied by 0, does not now."""
    zeros = jnp.all(w == 0, axis=q.axes, keepdims=True)
    if bool(jnp.any(zeros & (q.dequantize() != 0))):
        raise ValueError(f"`params` leaf {path!r} has channels that its batch norm multiplies by nothing, and {q.spec} has no zero to fold "
                         "them to: take a symmetric spec of integers, or give each channel a scale of its own")  # fmt: skip


def _packed(w: jax.Array, trained: Trained, quant: Quant) -> QTensor:
    estimator = trained.train.weight
    learned = quant.get("weights", {}).get(trained.leaf.path, {})
    q = estimator.pack(trained.problem(w), learned) if trained.rotation is None else _rotated(w, trained, trained.rotation, learned)
    q = dataclasses.replace(q, dtype=np.dtype(trained.leaf.dtype))
    if trained.act is None:
        return q
    q = dataclasses.replace(q, act=dataclasses.replace(trained.act, observer=None))
    if not trained.act.static or not trained.sites:
        return q
    scale, zero_point = trained.train.activation.params(quant["activations"][trained.leaf.path], trained.act)
    return dataclasses.replace(q, act_scale=whole_ranges(scale, trained.leaf), act_zero_point=whole_ranges(zero_point, trained.leaf))


def _rotated(w: jax.Array, trained: Trained, rotation: OnlineRotation, learned: Any) -> QTensor:
    at = [a % w.ndim for a in trained.axes]
    turned = jax.jit(lambda w: rotate_axes(w.astype(jnp.float32), at, rotation))(w)
    q = trained.train.weight.pack(trained.problem(turned), learned)
    return dataclasses.replace(q, rotation=rotation, dtype=w.dtype)


def _product(choice: ProductChoice, quant: Quant) -> QProduct:
    estimator, sides, specs = training_of(choice.rule).activation, [], []
    stored = quant.get("products", {}).get(choice.product.name, {})
    for side, act in zip(("left", "right"), choice.operands or (), strict=True):
        sides += estimator.params(stored[side], act) if act.static else (None, None)
        specs.append(_plain(act))
    return QProduct(*sides, *specs, rotation=choice.rotation)


def _plain(act: ActSpec) -> ActSpec:
    return dataclasses.replace(act, observer=None)
