"""Forward products of training on integers: which weights have them and which have not, and why; the codes of those that do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import IntSpec, PerChannel, PerTensor, QTensor
from qjax.program import Key
from qjax.ptq.products import product_row
from qjax.ptq.quantize import cache_notes, planned_row, program_notes
from qjax.report import Report, Row
from qjax.runtime.installed import runtime_of
from qjax.runtime.integer import why_not
from qjax.runtime.select import FLOAT, INTEGER
from qjax.training.estimator import RoundsToCodes
from qjax.training.planned import Planned, Trained
from qjax.training.side_state import whole_ranges
from qjax.training.state import Quant

Outcomes = dict[int, tuple[str, ...]]  # by the parameter's index, of each site why its product is of floats; "" if it is of integers


def why_not_integers(plan: Planned, trained: Trained) -> str:
    """Says why the products of a weight are of floats in training; "" if they can run on its codes.

    They can where the packed model's do and one product does it: whole rows share a scale, and nothing is left to a schedule or to chance.
    """
    act, train, spec, schedule = trained.act, trained.train, trained.spec, trained.train.schedule
    if all(site.op == "gather" for site in trained.leaf.sites):
        return "it is only looked up"
    if act is None:
        return "its activations stay float; give its rule an `activation`"
    moves = schedule.weights or schedule.activations or schedule.bits or schedule.activation_bits
    reasons = (
        (act.is_float, f"activations of {act.spec} are no integers"),
        (not isinstance(spec, IntSpec), f"weights of {spec} are no integers"),
        (act.outliers is not None, "columns of outliers have a product of their own"),
        (not isinstance(spec, IntSpec) or not isinstance(spec.granularity, PerChannel | PerTensor),
         f"weights of {spec} share scales in parts of a row, so that it would be a product for each"),
        (trained.rotation is not None, "its input is rotated on line"),
        (plan.folding is not None and trained.leaf.index in plan.folding.weights, "a batch norm is folded into it in every step"),
        (moves, "its schedule sets in later or has other bits first"),
        (train.weight.random, "its weights are rounded at random"),
        (act.static and train.activation.random, "its activations are rounded at random"),
        (not isinstance(train.weight, RoundsToCodes), f"{train.weight.name} has no integers before it is packed"),
    )  # fmt: skip
    of_sites = (why_not(site, spec) for site in trained.sites)
    return next((reason for holds, reason in reasons if holds), "") or next(filter(None, of_sites), "")


def integer_weight(w: Any, trained: Trained, quant: Quant) -> QTensor:
    """A weight's codes in 8 bits each, for the integer product of training, of one that `why_not_integers` has nothing against."""
    spec: Any = trained.spec
    act, train, estimator = trained.act, trained.train, trained.train.weight
    if act is None or not isinstance(estimator, RoundsToCodes):
        raise TypeError(f"{trained.leaf.path} has no codes: see `why_not_integers`")
    learned = jax.lax.stop_gradient(quant.get("weights", {}).get(trained.leaf.path, {}))
    found = estimator.codes(trained.problem(jax.lax.stop_gradient(jnp.asarray(w))), learned)
    signed = spec.signed or spec.bits < 8
    wide = dataclasses.replace(spec, bits=8, signed=signed, symmetric=spec.symmetric and spec.signed == signed, scale_dtype="float32",
                               scale_rule="half")  # fmt: skip
    code, zero_point = jnp.int8 if signed else jnp.uint8, found.zero_point
    if not wide.symmetric and zero_point is None:
        zero_point = jnp.zeros(found.scale.shape, jnp.int32)
    if zero_point is not None:
        zero_point = zero_point.astype(jnp.float32 if spec.float_zero else code)
    wide = dataclasses.replace(wide, zero_dtype="float32") if spec.float_zero else wide
    sizes = tuple(w.shape[a] for a in trained.axes)
    q = QTensor(found.codes.astype(code), found.scale, zero_point, None, wide, trained.axes, sizes, w.dtype,
                act=dataclasses.replace(act, observer=None))  # fmt: skip
    if not act.static:
        return q
    scale, zero_point = train.activation.params(jax.lax.stop_gradient(quant["activations"][trained.leaf.path]), act)
    return dataclasses.replace(q, act_scale=whole_ranges(scale, trained.leaf), act_zero_point=whole_ranges(zero_point, trained.leaf))


def integer_weights(plan: Planned, flat: Sequence[Any], quant: Quant) -> dict[int, QTensor]:
    """The codes of all weights that have integer products, by the parameter's index."""
    return {i: integer_weight(flat[i], t, quant) for i, t in plan.weights.items() if not why_not_integers(plan, t)}


def outcomes(plan: Planned, ran: Mapping[Key, str]) -> Outcomes:
    """What became of the products of each weight.

    Args:
      plan: what is rounded.
      ran: what the program noted of its sites while it was traced, see `rounding`.
    """
    untouched = "its equation is left as it is, inside a custom derivative rule or a program that is bound whole"
    found = {}
    for index, trained in plan.weights.items():
        reason = why_not_integers(plan, trained)
        found[index] = (reason,) if reason or not trained.sites else tuple(ran.get(site.key, untouched) for site in trained.sites)
    return found


def check_any(plan: Planned, found: Outcomes) -> None:
    """Refuses to call floats integers: where no product is of integers, the reason of each weight is named.

    Raises:
      ValueError: naming `forward`.
    """
    if any("" in reasons for reasons in found.values()):
        return
    named = [f"{plan.weights[i].leaf.path!r}: {reasons[0]}" for i, reasons in found.items()]
    more = f" (and {len(named) - 4} more)" if len(named) > 4 else ""
    raise ValueError(f"`forward`='integer' and no product of this policy runs on integers; {'; '.join(named[:4]) or 'it names no weight'}"
                     f"{more}. Leave `forward` out (integers where they are faster, else floats), or write 'float'")  # fmt: skip


def forward_report(plan: Planned, found: Outcomes, floats: str) -> Report:
    """A row for each parameter and each named product, whose `kernel` says on what its forward products run in training.

    Args:
      plan: what is rounded.
      found: what became of the products of each weight.
      floats: why all are of floats, whatever they could be; "" where they need not be.
    """
    runtime = runtime_of()
    rows = [_row(planned_row(c, runtime), plan.weights.get(c.leaf.index), found, floats) for c in plan.choices]
    why = "products of two activations are of floats in training"
    products = [dataclasses.replace(product_row(c), kernel=FLOAT, kernel_reasons=(why,), notes=(why,)) for c in plan.products]
    caches = cache_notes(plan.policy)
    return Report((*rows, *products), (*program_notes(plan.program), *caches, *filter(None, (floats,))))


def _row(row: Row, trained: Trained | None, found: Outcomes, floats: str) -> Row:
    if trained is None:
        return row
    reasons = (floats,) if floats else found[trained.leaf.index]
    named = tuple(dict.fromkeys(filter(None, reasons)))
    kernels = dict.fromkeys(FLOAT if reason else INTEGER for reason in reasons)
    notes = (*trained.notes, *(f"its forward product is of floats: {reason}" for reason in named if not floats))
    return dataclasses.replace(row, method=trained.train.weight.name, kernel=", ".join(kernels), kernel_reasons=named, notes=notes)
