"""Products of two activations that a rule names: their specs, the ranges of static ones, and their rows of the report."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import OperandObservers, minmax, observe_program, why_not_observed
from qjax.core import ActSpec, QProduct, params_from_range
from qjax.core.products import describe_pair
from qjax.policy import ProductChoice
from qjax.program import Product, Program
from qjax.ptq.data import check_numbers
from qjax.ptq.progress import Monitor, Phase
from qjax.ptq.work import forward
from qjax.report import Row
from qjax.runtime.select import INTEGER

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
    found = _observe(static, params, batches, phase) if static else {}
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
                made[choice.product.name] = QProduct(*lhs, *rhs, *specs)
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
        method="",
        bits_per_weight=0.0,
        nbytes=nbytes,
        float_nbytes=0,
        activation="" if pair is None else describe_pair(pair),
        kernel="" if pair is None else INTEGER,
        reason=choice.reason,
        what="product",
    )


def _has_zero_point(act: ActSpec) -> bool:
    return not act.spec.symmetric


def _observe(
    static: Mapping[str, tuple[ActSpec, ActSpec]], params: Sequence[Any], batches: Sequence[tuple[Program, Any]], phase: Phase
) -> dict[str, tuple[Range | None, Range | None]]:
    """Runs the data through; gives the range of each static operand, (turns...) each end."""
    observers = {
        name: OperandObservers(*((act.observer or minmax()) if act.static else None for act in pair))  # pyright: ignore[reportArgumentType]
        for name, pair in static.items()
    }
    total: dict[str, Any] = {}
    runs: dict[int, Callable[..., Any]] = {}
    merge, ranges = _folds(observers, static, {p.name: p for p in batches[0][0].products})
    for number, (program, inputs) in enumerate(batches):
        if id(program) not in runs:
            runs[id(program)] = _runner(program, observers, number)
        states = runs[id(program)]([*params, *inputs])
        _check_finite(ranges(states), number)
        total = merge(total, states) if total else states
        phase.step(f"batch {number}")
    return ranges(total)


def _runner(program: Program, observers: Mapping[str, OperandObservers], number: int) -> Callable[[list[Any]], dict[str, Any]]:
    """What runs the data of one batch through: flat arguments -> states by name."""
    products = {p.name: p for p in program.products if p.name in observers}
    for name in observers:
        if name not in products:
            raise ValueError(f"`calibration` batch {number} traces to a program without the product {name!r}: drop that batch")
        reason = why_not_observed(products[name])
        if reason:
            raise ValueError(f"the static ranges of {name!r} cannot be observed: {reason}; make them qjax.dynamic(...)")
    start = {p.key: observers[name].init(p) for name, p in products.items()}
    run = jax.jit(observe_program(program, {}, {p.key: observers[name] for name, p in products.items()}))

    def by_name(arguments: list[Any]) -> dict[str, Any]:
        states = run(start, arguments)
        return {name: states[p.key] for name, p in products.items()}

    return by_name


def _folds(
    observers: Mapping[str, OperandObservers], static: Mapping[str, tuple[ActSpec, ActSpec]], products: Mapping[str, Product]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What joins the states of two batches, and what reads all ranges; compiled once, not for every batch."""

    def over_turns(f: Callable[..., Any], name: str) -> Callable[..., Any]:
        for _ in products[name].turns:
            f = jax.vmap(f)
        return f

    def ends(name: str, side: int, state: Any) -> Range | None:
        observer, act = observers[name].pair[side], static[name][side]
        if observer is None:
            return None
        lo, hi = over_turns(functools.partial(observer.range, spec=act.spec), name)(state)  # pyright: ignore
        return lo[..., 0], hi[..., 0]

    def merge(total: dict[str, Any], states: dict[str, Any]) -> dict[str, Any]:
        return {name: over_turns(observers[name].merge, name)(total[name], states[name]) for name in states}

    def ranges(states: dict[str, Any]) -> dict[str, Any]:
        return {name: (ends(name, 0, pair[0]), ends(name, 1, pair[1])) for name, pair in states.items()}

    return jax.jit(merge), jax.jit(ranges)


def _check_finite(ranges: Mapping[str, tuple[Range | None, Range | None]], number: int) -> None:
    for name, pair in ranges.items():
        for side, ends in zip(("left", "right"), pair, strict=True):
            if ends is not None and not all(np.isfinite(end).all() for end in ends):
                raise ValueError(
                    f"`calibration` batch {number} gives the {side} operand of {name!r} NaN or infinity; look at that batch"
                )


def _scales(act: ActSpec, ends: Range | None, side: str) -> tuple[tuple[Any, Any], tuple[str, ...]] | None:
    """Scale and zero point of an operand, with remarks; None if nothing is known of its range."""
    if ends is None:
        return (None, None), ()
    lo, hi = (np.asarray(end) for end in ends)
    unseen = (lo == 0) & (hi == 0)
    if unseen.all():
        return None
    notes = ()
    if unseen.any():
        layers = ", ".join(map(str, np.flatnonzero(unseen)))
        notes = (f"no calibration data but zeros reached its {side} operand in layers {layers}: they have the widest range of the others",)
        lo, hi = np.where(unseen, lo.min(), lo), np.where(unseen, hi.max(), hi)
    return params_from_range(jnp.asarray(lo), jnp.asarray(hi), act.spec), notes
