"""Products of two activations that a rule names: their specs, the ranges of static ones, and their rows of the report."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import OperandObservers, minmax, why_not_observed
from qjax.core import ActSpec, OnlineRotation, QProduct, range_params
from qjax.core.products import describe_pair
from qjax.policy import ProductChoice
from qjax.program import Program
from qjax.ptq.data import check_numbers, with_unseen
from qjax.ptq.passes import observe_products
from qjax.ptq.progress import Monitor, Phase
from qjax.ptq.work import forward
from qjax.report import Row
from qjax.runtime.select import FP8, INTEGER

Range = tuple[jax.Array, jax.Array]


def quantize_products(
    choices: Sequence[ProductChoice], params: Sequence[Any], batches: Sequence[tuple[Program, Any]], monitor: Monitor
) -> tuple[dict[str, QProduct], tuple[Row, ...]]:
    """Finds what the named products need at run time.

    Static ranges come from one pass over the data in which every weight is quantized and activations are float.

    Args:
      choices: the policy's.
      params: flat parameters, packed where they are quantized.
      batches: (traced program, its inputs) for each calibration batch.
      monitor: is told of each batch.

    Returns:
      The products by name, and a row for each choice.

    Raises:
      ValueError: data that is not finite, naming the batch and the product; shapes in place of data; a product whose operands cannot
        be observed; a batch whose program lacks one.
    """
    wanted = {c.product.name: c.operands for c in choices if c.operands is not None}
    static = {name: pair for name, pair in wanted.items() if any(act.static for act in pair)}
    if static:
        check_numbers(batches, f"the static range of {next(iter(static))!r}")
    phase = monitor.phase("products", [forward(program) for program, _ in batches] if static else [])
    rotations = {c.product.name: c.rotation for c in choices}
    found = _observe(static, rotations, params, batches, phase) if static else {}
    made: dict[str, QProduct] = {}
    rows = []
    for choice in choices:
        pair, notes = wanted.get(choice.product.name), ()
        if pair is not None:
            ends = found.get(choice.product.name, (None, None))
            parts = [_scales(act, end, side) for act, end, side in zip(pair, ends, ("left", "right"), strict=True)]
            if any(part is None for part in parts):
                choice = dataclasses.replace(choice, reason="no calibration data but zeros reached it")
            else:
                (lhs, lhs_notes), (rhs, rhs_notes) = parts  # pyright: ignore[reportGeneralTypeIssues]
                specs = [dataclasses.replace(act, observer=None) for act in pair]
                made[choice.product.name] = QProduct(*lhs, *rhs, *specs, rotation=choice.rotation)
                notes = (*lhs_notes, *rhs_notes)
        rows.append(dataclasses.replace(product_row(choice), notes=notes))
    return made, tuple(rows)


def product_row(choice: ProductChoice) -> Row:
    """What would become of a product, without touching a number. Its bytes are those of its scales."""
    product, pair = choice.product, choice.operands
    count = math.prod(product.turns)
    nbytes = sum(4 * count * (1 + _has_zero_point(act)) for act in pair or () if act.static)
    return Row(
        path=product.name,
        shape=product.out_shape,
        dtype=str(product.out_dtype),
        ops=(product.op,),
        scopes=(product.scope,),
        spec="",
        method="" if pair is None or choice.rotation is None or choice.rule.method is None else choice.rule.method.name,
        bits_per_weight=0.0,
        nbytes=nbytes,
        float_nbytes=0,
        activation="" if pair is None else describe_pair(pair),
        kernel="" if pair is None else FP8 if pair[0].is_float else INTEGER,
        reason=choice.reason,
        what="product",
    )


def _has_zero_point(act: ActSpec) -> bool:
    return not act.spec.symmetric


def _observe(
    static: Mapping[str, tuple[ActSpec, ActSpec]],
    rotations: Mapping[str, OnlineRotation | None],
    params: Sequence[Any],
    batches: Sequence[tuple[Program, Any]],
    phase: Phase,
) -> dict[str, tuple[Range | None, Range | None]]:
    """Runs the data through; gives the range of each static operand, (turns...) each end."""
    observers = {
        name: OperandObservers(  # pyright: ignore[reportArgumentType]
            *((act.observer or minmax()) if act.static else None for act in pair),  # pyright: ignore[reportArgumentType]
            rotation=rotations[name],
        )
        for name, pair in static.items()
    }
    states = observe_products(observers, functools.partial(_refuse, static), params, batches, phase)
    turns = {product.name: product.turns for product in batches[0][0].products}

    def ends(name: str, side: int) -> Range | None:
        observer, act = observers[name].pair[side], static[name][side]
        if observer is None:
            return None
        f: Callable[..., Any] = functools.partial(observer.range, spec=act.spec)  # pyright: ignore[reportAttributeAccessIssue]
        for _ in turns[name]:
            f = jax.vmap(f)
        lo, hi = jax.jit(f)(states[name][side])
        return lo[..., 0], hi[..., 0]

    return {name: (ends(name, 0), ends(name, 1)) for name in states}


def _refuse(names: Iterable[str], program: Program, number: int) -> None:
    products = {p.name: p for p in program.products}
    for name in names:
        if name not in products:
            raise ValueError(f"`calibration` batch {number} traces to a program without the product {name!r}: drop that batch")
        reason = why_not_observed(products[name])
        if reason:
            raise ValueError(f"the static ranges of {name!r} cannot be observed: {reason}; make them qjax.dynamic(...)")


def _scales(act: ActSpec, ends: Range | None, side: str) -> tuple[tuple[Any, Any], tuple[str, ...]] | None:
    """Scale and zero point of an operand, with remarks; None if nothing is known of its range."""
    if ends is None:
        return (None, None), ()
    lo, hi = (np.asarray(end) for end in ends)
    if not (lo.any() or hi.any()):
        return None
    lo, hi, notes = with_unseen(lo, hi, f"its {side} operand")
    return range_params(jnp.asarray(lo), jnp.asarray(hi), act.spec), notes
