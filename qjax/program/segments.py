"""Cuts a flattened program into segments that are compiled once and run batch by batch.

Sequential work never re-runs a program from its start: between two cuts only the values that are still needed stay. Segments that are
the same program (the repeated layers of a model) share one compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.program import compat
from qjax.program.flatten import STACK, FlatEqn, Graph, Lit, canonical
from qjax.program.primitives import VIEWS


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a flattened program.

    Attributes:
      eqns: its equations, with the views of parameters that they need.
      inputs: variable numbers it reads.
      outputs: variable numbers it makes that are needed after it.
      key: equal for segments that compute the same.
      given: variables among its inputs that an equation of it would make, see `following`.
    """

    eqns: tuple[FlatEqn, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    key: Hashable
    given: frozenset[int] = frozenset()


class Cutter:
    """Answers, for one graph, what a stretch of equations reads and what must stay alive after it."""

    def __init__(self, graph: Graph, n_params: int):
        self.graph = graph
        self.params = set(graph.inputs[:n_params])
        self.views: dict[int, FlatEqn] = {}  # variables that are a view of a parameter, with the equation that makes them
        self.last_use: dict[int, int] = {}
        for eqn in graph.eqns:
            if eqn.name in VIEWS and self.is_parameter(eqn.inputs[0]):
                self.views |= dict.fromkeys(eqn.outputs, eqn)
        for position, eqn in enumerate(graph.eqns):
            if not self.is_view(eqn):
                self.use(eqn.inputs, position)
        self.use(graph.outputs, len(graph.eqns))

    def is_parameter(self, atom: Any) -> bool:
        """Whether a variable is a parameter, a view of one, or a layer of one."""
        if isinstance(atom, Lit):
            return False
        sliced = self.graph.sliced.get(atom)
        return atom in self.params or atom in self.views or (sliced is not None and self.is_parameter(sliced.parent))

    def is_view(self, eqn: FlatEqn) -> bool:
        return bool(eqn.outputs) and self.views.get(eqn.outputs[0]) is eqn

    def use(self, atoms: Sequence[Any], position: int) -> None:
        for atom in atoms:
            if isinstance(atom, Lit):
                continue
            self.last_use[atom] = max(position, self.last_use.get(atom, -1))
            if atom in self.views:
                self.use(self.views[atom].inputs, position)
            elif atom in self.graph.sliced:
                self.use([self.graph.sliced[atom].parent], position)

    def segment(
        self, start: int, stop: int, outputs: Sequence[int] | None = None, eqns: Sequence[FlatEqn] | None = None
    ) -> Segment:
        """Builds the segment of equations `start` to `stop` (excluded).

        With `outputs` it gives those, else what is needed after it; with `eqns` it holds only those, and reads what the others make.
        """
        within = self.graph.eqns[start:stop] if eqns is None else eqns
        taken: dict[int, FlatEqn] = {}
        made: set[int] = set()
        inputs: dict[int, None] = {}

        def add(eqn: FlatEqn) -> None:
            for atom in eqn.inputs:
                if isinstance(atom, Lit) or atom in made:
                    continue
                if atom in self.views:
                    add(self.views[atom])
                else:
                    inputs[atom] = None
            taken[id(eqn)] = eqn
            made.update(eqn.outputs)

        for eqn in within:
            if not self.is_view(eqn):
                add(eqn)
        if outputs is None:
            outputs = [v for v in sorted(made) if v not in self.views and self.last_use.get(v, -1) >= stop]
        ordered = tuple(taken.values())
        return Segment(ordered, tuple(inputs), tuple(outputs), self._key(ordered, tuple(inputs), tuple(outputs)))

    def live_bytes(self, cuts: Sequence[int]) -> list[int]:
        """Bytes that stay alive across each cut, beside the program's inputs and constants, from shapes alone."""
        at = {v: position for position, eqn in enumerate(self.graph.eqns) for v in eqn.outputs if v not in self.views}
        sizes = {v: math.prod(self.graph.avals[v].shape) * self.graph.avals[v].dtype.itemsize for v in at}
        return [sum(sizes[v] for v, made in at.items() if made < cut <= self.last_use.get(v, -1)) for cut in cuts]

    def _key(self, eqns: Sequence[FlatEqn], inputs: Sequence[int], outputs: Sequence[int]) -> Hashable:
        numbers: dict[Any, int] = {}

        def ref(atom: Any) -> Hashable:
            if isinstance(atom, Lit):
                return ("lit", canonical(np.asarray(atom.value)), str(atom.aval))
            return numbers.setdefault(atom, len(numbers))

        avals = tuple((ref(v), self.graph.avals[v].shape, str(self.graph.avals[v].dtype)) for v in inputs)
        body = tuple(
            (e.name, canonical(e.eqn.params) if e.eqn is not None else None, *map(ref, e.inputs), len(e.outputs), *map(ref, e.outputs))
            for e in eqns
        )
        return (avals, body, tuple(map(ref, outputs)))


def execute(segment: Segment, *values: Any, bind: Callable[[Any, Sequence[Any]], list[Any]] = compat.bind) -> list[Any]:
    """Computes a segment's outputs from its inputs; `bind` applies an equation."""
    env = dict(zip(segment.inputs, values, strict=True))
    for eqn in segment.eqns:
        operands = [a.value if isinstance(a, Lit) else env[a] for a in eqn.inputs]
        outs = [jnp.stack(operands)] if eqn.name == STACK else bind(eqn.eqn, operands)
        if not segment.given.isdisjoint(eqn.outputs):
            outs = _followed(eqn, operands, outs, {v: env[v] for v in segment.given.intersection(eqn.outputs)})
        env.update(zip(eqn.outputs, outs, strict=True))
    return [env[v] for v in segment.outputs]


# What picks places by the size of floating values: an expert for a token, the order of rows.
CHOICES = frozenset({"argmax", "argmin", "top_k", "approx_top_k", "sort"})


def choices(segment: Segment) -> tuple[int, ...]:
    """The variables of a segment that are places picked by the size of floating values, in its order."""
    found = []
    for eqn in segment.eqns:
        if eqn.name in CHOICES and any(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.eqn.invars):
            pairs = zip(eqn.outputs, eqn.eqn.outvars, strict=True)
            found += [v for v, raw in pairs if jnp.issubdtype(raw.aval.dtype, jnp.integer)]
    return tuple(found)


def telling(segment: Segment) -> Segment:
    """The segment that also gives its `choices`, after its own outputs."""
    chosen = choices(segment)
    return dataclasses.replace(segment, outputs=(*segment.outputs, *chosen), key=("telling", segment.key)) if chosen else segment


def following(segment: Segment) -> Segment:
    """The segment that takes its `choices` after its own inputs: another run of the same program goes the ways of the first one.

    Without that, two runs whose values differ a little send a token to different experts, or sort rows differently, and nothing
    behind that corresponds.
    """
    chosen = choices(segment)
    if not chosen:
        return segment
    return dataclasses.replace(segment, inputs=(*segment.inputs, *chosen), key=("following", segment.key), given=frozenset(chosen))


def _followed(eqn: FlatEqn, operands: Sequence[Any], outs: Sequence[Any], given: dict[int, Any]) -> list[Any]:
    outs = [given.get(v, out) for v, out in zip(eqn.outputs, outs, strict=True)]
    if eqn.name == "top_k":  # the values are those at the places
        outs[0] = jnp.take_along_axis(operands[0], outs[1], axis=eqn.eqn.params.get("axis", -1))
    return outs


class Compiled:
    """Compiled segments, by key: the same program is compiled once however often it stands in a model."""

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Callable[..., list[Any]]] = {}

    def __call__(self, segment: Segment, values: Sequence[Any]) -> list[Any]:
        run = self._compiled.get(segment.key)
        if run is None:
            run = self._compiled[segment.key] = jax.jit(functools.partial(execute, segment))
        return run(*values)

    def __len__(self) -> int:
        return len(self._compiled)
