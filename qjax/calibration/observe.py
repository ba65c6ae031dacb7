"""Runs a program with observers at its sites, wherever they stand: in loops over time, branches, shared weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration.observers import Observer
from qjax.calibration.products import OperandObservers, operand_rows
from qjax.calibration.rows import columns, site_rows, stack_size
from qjax.program import Interpreter, Key, Product, Program, Site, compat, materialize


def init_states(program: Program, observers: Mapping[Key, Observer[Any]]) -> dict[Key, Any]:
    """Returns the state before any data of every observed site, with a leading axis for each scan that slices its weight."""
    lengths = _scan_lengths(program)
    states = {}
    for site in program.sites:
        if site.key in observers:
            leaf = program.leaves[site.leaf]
            state = observers[site.key].init(stack_size(site, leaf), columns(site, leaf))
            lead = tuple(lengths[scan] for scan in site.scans)
            states[site.key] = jax.tree.map(lambda x, lead=lead: jnp.broadcast_to(x, (*lead, *x.shape)), state)
    return states


def observe_program(
    program: Program, observers: Mapping[Key, Observer[Any]], products: Mapping[Key, OperandObservers] | None = None
) -> Callable[[dict[Key, Any], list[Any]], dict[Key, Any]]:
    """Returns a pure function (states, flat arguments) -> states that runs a program and observes its sites and products.

    Args:
      program: from `qjax.trace`.
      observers: an observer for each site key to watch.
      products: observers for each key of a product of two activations to watch.

    Returns:
      A function to be jitted by the caller; packed parameters are dequantized at their sites.
    """
    sites = {site.key: site for site in program.sites}

    def rule(site: Site, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
        if state is not None:
            state = observers[site.key].update(state, site_rows(site, eqn, operands))
        return compat.bind(eqn, [materialize(v) for v in operands]), state

    pairs = products or {}

    def product_rule(product: Product, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
        if state is not None:
            state = pairs[product.key].update(state, operand_rows(product, operands))
        return compat.bind(eqn, operands), state

    watched = {product.key: product for product in program.products if product.key in pairs}
    interpreter = Interpreter(sites, rule, frozenset(observers), inline_custom=True, products=watched, product_rule=product_rule)

    def run(states: dict[Key, Any], arguments: list[Any]) -> dict[Key, Any]:
        _, states = interpreter(program.jaxpr, arguments, states)
        return states

    return run


def _scan_lengths(program: Program) -> dict[Key, int]:
    found: dict[Key, int] = {}

    def walk(jaxpr: Any, prefix: Key) -> None:
        for index, eqn in enumerate(compat.parts(jaxpr)[0].eqns):
            if eqn.primitive.name == "scan":
                found[(*prefix, index)] = eqn.params["length"]
            for suffix, inner in compat.subprograms(eqn):
                walk(inner, (*prefix, index, *suffix))

    walk(program.jaxpr, ())
    return found
