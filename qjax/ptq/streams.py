"""Streams: calibration batches on their way through a program, from cut to cut, and the parameters that they meet there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration import AllFinite, Observer, Together
from qjax.core import QTensor, Spec
from qjax.program import Leaf, Packed, Program, Site, compat
from qjax.program.flatten import FlatEqn, Graph, Lit, flatten
from qjax.program.packed import can_scan
from qjax.program.segments import Compiled, Cutter, Segment, following, telling
from qjax.ptq.method import Method, Outcome, needs_float
from qjax.ptq.notes import merged
from qjax.ptq.parts import Layout, Part, join, layout_of, part_axes, part_of, put, take
from qjax.ptq.spill import Live, OnDisk


@dataclasses.dataclass(frozen=True)
class Task:
    """One parameter that a method quantizes on data."""

    leaf: Leaf
    spec: Spec
    method: Method
    scale: Any = None  # by which its input is divided, see `qjax.ptq.input_scale`
    pruned: bool = False  # see `Problem`

    @property
    def needs_float(self) -> bool:
        return needs_float(self.method)

    @property
    def observer(self) -> Observer[Any]:
        if self.method.observer is None:
            raise ValueError(f"`method` {self.method.name} of {self.leaf.path!r} needs no data")
        # A batch that is not finite is named when it is seen, not when a solver fails on the sum of all.
        return Together((self.method.observer, AllFinite()))


class Weights:
    """The parameters as a run has them so far: those of the quantized model, or without tasks those of the float one."""

    def __init__(self, params: Sequence[Any], tasks: Mapping[int, Task]):
        self.params, self.tasks = list(params), tasks
        self.parts: dict[int, dict[Part, Outcome]] = {i: {} for i in tasks}
        self.done: dict[int, tuple[QTensor, tuple[str, ...]]] = {}

    def parameter(self, index: int) -> jax.Array:
        """A parameter as the quantized model has it so far, whole."""
        if index in self.done:
            return _dequantize(self.done[index][0])
        w = self.params[index]
        if isinstance(w, QTensor):
            return _dequantize(w)
        for part, outcome in self.parts.get(index, {}).items():
            w = put(w, layout_of(self.tasks[index].leaf), part, _dequantize(outcome.q))
        return w

    def packed(self, index: int) -> Any:
        """A parameter as the quantized model has it so far; packed once all of it is."""
        if index in self.done:
            return self.done[index][0]
        return self.params[index] if isinstance(self.params[index], QTensor) else self.parameter(index)

    def layer(self, index: int, turn: int) -> jax.Array:
        """Element `turn` of a parameter along its first axis, without building the whole where that can be helped."""
        w = self.done[index][0] if index in self.done else self.params[index]
        parts = self.parts.get(index, {})
        if parts and layout_of(self.tasks[index].leaf).axes == (0,):
            if (turn,) in parts:
                return _dequantize(parts[(turn,)].q)
        elif parts or (isinstance(w, QTensor) and not can_scan(Packed(w))):
            w = self.parameter(index)
        if isinstance(w, QTensor):
            return _dequantize(jax.tree.map(lambda x: take(x, Layout((0,), (1,)), (turn,)), w))
        return take(w, Layout((0,), (1,)), (turn,))

    def finish_part(self, task: Task, layout: Layout, part: Part, outcome: Outcome) -> None:
        parts = self.parts[task.leaf.index]
        parts[part] = outcome
        if len(parts) == len(layout.all):
            each = {p: o.notes for p, o in sorted(parts.items())}
            notes = merged(each) if layout.axes else tuple(dict.fromkeys(itertools.chain(*each.values())))
            self.done[task.leaf.index] = (join(task.leaf, layout, {p: o.q for p, o in parts.items()}), notes)
            self.parts[task.leaf.index] = {}


@dataclasses.dataclass(frozen=True)
class Visit:
    """One execution of a site in the flattened program.

    Attributes:
      site: the site.
      position: index of its equation.
      part: which part of its parameter it sees; None if it stands in a loop or branch that stays whole.
      sources: what the site reads beside its parameter.
    """

    site: Site
    position: int
    part: Part | None
    sources: tuple[Any, ...]


class Batch:
    """One calibration batch on its way through the program: the graph for its shapes, and its live values.

    At a visit, `batch.value(v)` is what the quantized program made of the graph's variable `v`, and `batch.twin.value(v)` what the
    float program made of it: both stand at the same cut. A method whose `needs_float` is true (`qjax.ptq.method.needs_float`) makes
    the run carry the twins; otherwise `twin` is None and nothing is computed or kept for it. Experts and orders are chosen by the
    quantized program for both (`advance_both`). What such a method's observer gets is
    `Rows.reference`: the rows of the float program, row for row beside those of the quantized one.

    Attributes:
      twin: the same batch in the float program, until the last visit that asks for it; or None.
    """

    def __init__(self, program: Program, cutter: Cutter, inputs: Sequence[Any], memory: Live, twin: Batch | None = None):
        self.program, self.cutter, self.memory, self.twin = program, cutter, memory, twin
        first = len(program.leaves)
        self.given: dict[int, Any] = dict(zip(cutter.graph.inputs[first:], inputs, strict=True))  # the caller's, not counted
        self.live: dict[int, Any] = {}
        self.inputs = list(inputs)

    def eqn(self, visit: Visit) -> FlatEqn:
        return self.cutter.graph.eqns[visit.position]

    def value(self, var: int) -> Any:
        graph = self.cutter.graph
        if var in self.live:
            value = self.live[var]
            return value.read() if isinstance(value, OnDisk) else value
        if var in self.given:
            return self.given[var]
        if var in graph.consts:
            return graph.consts[var]
        sliced = graph.sliced[var]
        parent = sliced.parent.value if isinstance(sliced.parent, Lit) else self.value(sliced.parent)
        return jax.lax.dynamic_index_in_dim(parent, jnp.int32(sliced.index), 0, keepdims=False)

    def advance(self, segment: Segment, values: Sequence[Any], stop: int) -> None:
        """Takes up what a segment gave, drops what nothing after `stop` reads, and writes away what there is no room for."""
        self.memory.pass_by(x for v in segment.inputs if isinstance(x := self.live.get(v), OnDisk))
        for var, value in zip(segment.outputs, values, strict=True):
            self.live[var] = value
            self.memory.take_up(value)
        for var in [v for v in self.live if self.cutter.last_use.get(v, -1) < stop]:
            self.memory.drop(self.live.pop(var))
        if self.memory.full:
            self.live = {v: x if isinstance(x, OnDisk) else self.memory.write(x) for v, x in self.live.items()}

    def drop_twin(self) -> None:
        """The float program is no longer needed."""
        if self.twin is not None:
            for value in self.twin.live.values():
                self.memory.drop(value)
            self.twin = None


def streams_of(batches: Sequence[tuple[Program, Sequence[Any]]], memory: Live, twins: bool = False) -> list[Batch]:
    """The batches at the start of their programs; with `twins`, each with the same batch in the float program."""
    cutters: dict[int, Cutter] = {}
    for program, _ in batches:
        if id(program) not in cutters:
            cutters[id(program)] = Cutter(flatten(program, unroll=True), len(program.leaves))

    def batch(program: Program, inputs: Sequence[Any], twin: Batch | None) -> Batch:
        return Batch(program, cutters[id(program)], inputs, memory, twin)

    return [batch(program, inputs, batch(program, inputs, None) if twins else None) for program, inputs in batches]


def visits_of(batch: Batch, tasks: dict[int, Task]) -> list[Visit]:
    """Every execution of a site of a task, in the order of the flattened program."""
    program, graph = batch.program, batch.cutter.graph
    sites = {site.key: site for site in program.sites if site.leaf in tasks}
    visits = []
    for position, eqn in enumerate(graph.eqns):
        site = sites.get(eqn.key)
        if site is not None and eqn.eqn is not None:
            sources = tuple(a for i, a in enumerate(eqn.inputs) if i != site.operand)
            visits.append(Visit(site, position, _part(site, eqn, graph), sources))
        visits += [Visit(sites[k], position, None, ()) for k in eqn.inside if k in sites]
    return visits


def _part(site: Site, eqn: FlatEqn, graph: Graph) -> Part:
    # The flattened program numbers the turns of every unrolled loop around an equation, outermost first. A scan that does not
    # slice this parameter is one of them too, so the keys tell which turn is whose.
    loops = [eqn.key[: i + 1] for i in range(len(eqn.key)) if eqn.key[: i + 1] in graph.unrolled]
    return part_of(site, dict(zip(loops, eqn.steps, strict=True)))


def flat_leaves(visits: Sequence[Visit], tasks: dict[int, Task]) -> set[int]:
    """Parameters of which every part is seen exactly once, by a site that is laid flat: solved where they stand."""
    flat = set()
    for index, task in tasks.items():
        mine = [v for v in visits if v.site.leaf == index]
        axes = {part_axes(v.site) for v in mine}
        if len(axes) == 1 and all(v.part is not None for v in mine):
            seen = [v.part for v in mine]
            if len(set(seen)) == len(seen) and set(seen) == set(layout_of(task.leaf).all):
                flat.add(index)
    return flat


def grouped(visits: Sequence[Visit], flat: set[int], apart: Mapping[int, Any] | None = None) -> list[list[int]]:
    """Numbers of the visits that are solved together, for they read the same: each group where its first one stands.

    Visits to which `apart` gives different objects are in different groups.
    """
    groups: dict[Any, list[int]] = {}
    for number, visit in enumerate(visits):
        reads = tuple(("literal", id(a)) if isinstance(a, Lit) else a for a in visit.sources)
        reads = (id((apart or {}).get(number)), *reads)
        groups.setdefault(reads if visit.site.leaf in flat else ("pooled", number), []).append(number)
    return list(groups.values())


def advance(compiled: Compiled, weights: Weights, streams: Sequence[Batch], starts: Sequence[int], stops: Sequence[int]) -> None:
    """Runs every batch from one cut to the next. What batches of one shape share is made once."""
    for batch, segment, values, stop in _each(weights, streams, starts, stops):
        batch.advance(segment, compiled(segment, values), stop)


def advance_both(
    compiled: Compiled, weights: Weights, floats: Weights, streams: Sequence[Batch], starts: Sequence[int], stops: Sequence[int]
) -> None:
    """Likewise, and every batch's twin in the float program, which goes the ways that the quantized program chooses.

    Places picked by the size of values (`qjax.program.segments.choices`: experts, orders) are those of the quantized program in both,
    so that row for row both read the same token. A choice inside a loop that stays whole is each program's own.
    """
    chosen = []
    for batch, segment, values, stop in _each(weights, streams, starts, stops):
        made = compiled(telling(segment), values)
        batch.advance(segment, made[: len(segment.outputs)], stop)
        chosen.append(made[len(segment.outputs) :])
    twins = [batch.twin for batch in streams if batch.twin is not None]
    for (twin, segment, values, stop), places in zip(_each(floats, twins, starts, stops), chosen, strict=True):
        twin.advance(segment, compiled(following(segment), [*values, *places]), stop)


def _each(
    weights: Weights, streams: Sequence[Batch], starts: Sequence[int], stops: Sequence[int]
) -> Iterator[tuple[Batch, Segment, list[Any], int]]:
    """Each batch with its segment between two cuts, and the segment's inputs."""
    shared: dict[int, tuple[Segment, dict[int, Any]]] = {}
    for batch, start, stop in zip(streams, starts, stops, strict=True):
        if id(batch.cutter) not in shared:
            segment = batch.cutter.segment(start, stop)
            values = {v: weight_of(weights, batch, v) for v in segment.inputs if batch.cutter.is_parameter(v)}
            shared[id(batch.cutter)] = segment, values
        segment, known = shared[id(batch.cutter)]
        yield batch, segment, [known[v] if v in known else batch.value(v) for v in segment.inputs], stop


def weight_of(weights: Weights, batch: Batch, var: int) -> Any:
    """The value, as a run has it so far, of a parameter or of a layer of one."""
    graph = batch.cutter.graph
    where = {v: i for i, v in enumerate(graph.inputs[: len(batch.program.leaves)])}
    if var in where:
        return weights.parameter(where[var])
    sliced = graph.sliced[var]
    if sliced.parent in where:
        return weights.layer(where[sliced.parent], sliced.index or 0)
    parent = _view_value(weights, batch, sliced.parent)
    return jax.lax.dynamic_index_in_dim(parent, jnp.int32(sliced.index), 0, keepdims=False)


def _view_value(weights: Weights, batch: Batch, var: int) -> Any:
    """The value of a view of a parameter: its chain of views, applied."""
    if var not in batch.cutter.views:
        return weight_of(weights, batch, var) if batch.cutter.is_parameter(var) else batch.value(var)
    eqn = batch.cutter.views[var]
    operands = [a.value if isinstance(a, Lit) else _view_value(weights, batch, a) for a in eqn.inputs]
    return compat.bind(eqn.eqn, operands)[eqn.outputs.index(var)]


_dequantize = jax.jit(QTensor.dequantize)
