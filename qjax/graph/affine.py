"""Walks over a flattened program: what depends on parameters only, who reads a value, which affine equations follow it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp

from qjax.program.flatten import FlatEqn, Graph, Lit

VIEWS = frozenset({"reshape", "broadcast_in_dim", "convert_element_type", "squeeze", "copy"})
AFFINE = frozenset({"add", "sub", "mul", "div"})


def constant_values(graph: Graph, leaves: int) -> set[int]:
    """Values that depend on the first `leaves` inputs, the parameters, and on constants only."""
    layers: dict[Any, list[int]] = {}
    for var, sliced in graph.sliced.items():
        layers.setdefault(sliced.parent, []).append(var)
    out: set[int] = set()

    def add(values: Collection[int]) -> None:
        for var in values:
            out.add(var)
            add(layers.get(var, ()))

    add([*graph.inputs[:leaves], *graph.consts])
    for eqn in graph.eqns:
        if eqn.eqn is not None and eqn.inputs and all(isinstance(a, Lit) or a in out for a in eqn.inputs):
            add(eqn.outputs)
    return out


def readers_of(graph: Graph) -> dict[int, list[FlatEqn]]:
    """The equations that read each value; one that reads it twice stands there twice."""
    readers: dict[int, list[FlatEqn]] = {}
    for eqn in graph.eqns:
        for atom in eqn.inputs:
            if not isinstance(atom, Lit):
                readers.setdefault(atom, []).append(eqn)
    return readers


def affine_after(
    graph: Graph,
    readers: Mapping[int, list[FlatEqn]],
    at: int,
    takes: Callable[[FlatEqn, Any], bool],
    through: Collection[str] = (),
) -> tuple[tuple[FlatEqn, int, Any], ...]:
    """Follows a value through sums and products as long as nothing else reads it.

    Args:
      graph: the flattened program.
      readers: from `readers_of`.
      at: the value.
      takes: (equation, the other operand) -> whether to go on through it.
      through: names of equations that are passed without being counted, where they give floating numbers.

    Returns:
      (equation, the value that it reads, its other operand), in order; the first argument of a `sub` or `div` is the value.
    """
    outputs = {v for v in graph.outputs if not isinstance(v, Lit)}
    found: list[tuple[FlatEqn, int, Any]] = []
    while at not in outputs and len(readers.get(at, [])) == 1:
        eqn = readers[at][0]
        if eqn.name in through and jnp.issubdtype(graph.avals[eqn.outputs[0]].dtype, jnp.floating):
            at = eqn.outputs[0]
            continue
        if eqn.name not in AFFINE:
            break
        other = eqn.inputs[1] if eqn.inputs[0] == at else eqn.inputs[0]
        if (eqn.name in ("sub", "div") and eqn.inputs[0] != at) or not takes(eqn, other):
            break
        found.append((eqn, at, other))
        at = eqn.outputs[0]
    return tuple(found)
