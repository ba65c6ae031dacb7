"""Questions of data flow about sites: who shares an input with whom, and what produced it."""

from __future__ import annotations

import dataclasses
from typing import Literal as OneOf

from qjax.program.flatten import OPEN, FlatEqn, Graph, flatten
from qjax.program.primitives import PARTIAL_VIEWS, VIEWS
from qjax.program.sites import Site
from qjax.program.trace import Program


@dataclasses.dataclass(frozen=True)
class Producer:
    """What made the activation that a site reads.

    Attributes:
      kind: "site" (a linear layer), "scale" (a product with a parameter, as in a norm), "operation" (any other primitive),
        "input" (an argument of the function), "carry" (the turn before of a loop).
      name: the site's or parameter's path, or the primitive's name.
      biases: paths of parameters added on the way.
    """

    kind: OneOf["site", "scale", "operation", "input", "carry"]
    name: str
    biases: tuple[str, ...] = ()


def shared_inputs(program: Program, exactly: bool = False) -> tuple[tuple[Site, ...], ...]:
    """Groups the sites that read the same value (q, k and v; gate and up), in data-flow order.

    Args:
      program: from `trace`.
      exactly: whether a value that was only rearranged or cast is another.

    Returns:
      Tuples of sites; a site that shares its input with none stands alone.

    Example:
      >>> import jax.numpy as jnp
      >>> from qjax.program import trace
      >>> p = {"q": jnp.ones((4, 4)), "k": jnp.ones((4, 2)), "o": jnp.ones((2, 4))}
      >>> program = trace(lambda p, x: (x @ p["q"])[:, :2] * (x @ p["k"]) @ p["o"], p, jnp.ones((3, 4)))
      >>> [[site.path for site in group] for group in shared_inputs(program)]
      [['q', 'k'], ['o']]
    """
    graph = flatten(program, unroll=False)
    sites = {site.key: site for site in program.sites}
    made = _makers(graph)
    groups: dict[object, list[Site]] = {}
    for eqn in graph.eqns:
        site = sites.get(eqn.key)
        if site is not None and eqn.eqn is not None:
            atom = eqn.inputs[1 - site.operand]
            groups.setdefault(atom if exactly else _root(atom, made), []).append(site)
    return tuple(tuple(group) for group in groups.values())


def producer(program: Program, site: Site) -> Producer:
    """Says what produced the activation that a site reads.

    Walks back over casts, reshapes, transposes and added biases.

    Args:
      program: the program of the site.
      site: one of `program.sites`.

    Returns:
      A `Producer`.
    """
    graph = flatten(program, unroll=False)
    sites = {s.key: s for s in program.sites}
    made = _makers(graph)
    paths = {graph.inputs[leaf.index]: leaf.path for leaf in program.leaves}
    at = next(eqn for eqn in graph.eqns if eqn.key == site.key and eqn.eqn is not None)
    atom, biases = at.inputs[1 - site.operand], []
    while True:
        atom = _root(atom, made)
        eqn = made.get(atom)
        if eqn is None:
            return Producer("carry" if atom in graph.carries else "input", "", tuple(biases))
        if eqn.key in sites and eqn.name != OPEN:
            return Producer("site", sites[eqn.key].path, tuple(biases))
        if eqn.name == "mul":
            scale = next((p for f in _factors(atom, made) if (p := _parameter(f, graph, made, paths))), None)
            return Producer("scale", scale, tuple(biases)) if scale else Producer("operation", "mul", tuple(biases))
        bias = [_parameter(a, graph, made, paths) for a in eqn.inputs] if eqn.name == "add" else []
        if sum(b is not None for b in bias) != 1:
            return Producer("operation", eqn.name, tuple(biases))
        biases.append(next(b for b in bias if b))
        atom = next(a for a, b in zip(eqn.inputs, bias, strict=True) if b is None)


def _makers(graph: Graph) -> dict[object, FlatEqn]:
    return {var: eqn for eqn in graph.eqns for var in eqn.outputs}


def _root(atom: object, made: dict[object, FlatEqn]) -> object:
    """Walks back over equations that only rearrange or cast."""
    while atom in made and made[atom].name in VIEWS - PARTIAL_VIEWS:
        atom = made[atom].inputs[0]
    return atom


def _factors(atom: object, made: dict[object, FlatEqn]) -> list[object]:
    """The factors of a product of products: a norm is x * (rsqrt(...) * scale) as often as (x * rsqrt(...)) * scale."""
    eqn = made.get(_root(atom, made))
    if eqn is None or eqn.name != "mul":
        return [atom]
    return [factor for a in eqn.inputs for factor in _factors(a, made)]


def _parameter(atom: object, graph: Graph, made: dict[object, FlatEqn], paths: dict[int, str]) -> str | None:
    """The path of the parameter that a value is a view of, if it is one."""
    atom = _root(atom, made)
    while isinstance(atom, int) and atom in graph.sliced:
        atom = _root(graph.sliced[atom].parent, made)
    return paths.get(atom) if isinstance(atom, int) else None
