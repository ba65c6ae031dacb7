"""What a solution means for a program with loops and residuals: one scale a layer, or one for all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from qjax.graph.relations import Equal
from qjax.graph.solve import Solution, System
from qjax.program import Key, Site, compat
from qjax.program.flatten import Graph, Lit

WHOLE = frozenset({"convert_element_type", "copy", "copy_p", "reduce_precision"})


def residual(system: System, solution: Solution) -> int:
    """Additions in which two or more activations are scaled."""
    fixed = set(system.graph.inputs[: len(system.program.leaves)])
    for var in system.graph.sliced:
        if system.graph.sliced[var].parent in fixed:
            fixed.add(var)
    for eqn in system.graph.eqns:
        if eqn.inputs and all(isinstance(a, Lit) or a in fixed for a in eqn.inputs):
            fixed.update(eqn.outputs)
    count = 0
    for position in solution.relations:
        relation = system.relations[position]
        if isinstance(relation, Equal) and relation.name in ("add", "add_any"):
            scaled = [t.atom for t in relation.terms[1:] if t.atom in solution.labels and t.atom not in fixed]
            count += len(scaled) > 1
    return count


def layers(system: System, group: Sequence[Site], solution: Solution, leaves: Sequence[int]) -> tuple[int, ...]:
    """Lengths of the scans around the group, if all that is scaled is layer by layer inside them."""
    scans = {key: length for key, length in _scans(system.program.jaxpr, ()) if group[0].key[: len(key)] == key}
    taken = _taken(system.graph, solution, {system.graph.inputs[leaf] for leaf in leaves})
    for eqn in system.graph.eqns:
        scaled = [v for v in (*eqn.inputs, *eqn.outputs) if not isinstance(v, Lit) and v in solution.labels]
        inside = all(eqn.key[: len(key)] == key for key in scans)
        if not inside and scaled and not (eqn.name in WHOLE and all(v in taken for v in scaled)):
            return ()
        if inside and any(taken.get(v, len(scans)) != len(scans) for v in scaled):
            return ()
    return tuple(scans[key] for key in sorted(scans, key=len))


def _taken(graph: Graph, solution: Solution, leaves: Collection[int]) -> dict[int, int]:
    """For each scaled value that is a leaf or a layer of it, how many scans took a layer."""
    made = {v: eqn for eqn in graph.eqns for v in eqn.outputs}
    out: dict[int, int] = {}
    for var in solution.labels:
        depth, at = 0, var
        while at in graph.sliced or (at in made and made[at].name in WHOLE):
            depth += at in graph.sliced
            at = graph.sliced[at].parent if at in graph.sliced else made[at].inputs[0]
        if at in leaves:
            out[var] = depth
    return out


def _scans(jaxpr: Any, prefix: Key) -> list[tuple[Key, int]]:
    """Keys and lengths of every scan, nested ones too."""
    body, _ = compat.parts(jaxpr)
    out: list[tuple[Key, int]] = []
    for index, eqn in enumerate(body.eqns):
        key = (*prefix, index)
        if eqn.primitive.name == "scan":
            out.append((key, eqn.params["length"]))
        for suffix, inner in compat.subprograms(eqn):
            out += _scans(inner, key + suffix)
    return out
