"""Sequential calibration: each site is quantized on the activations of the already quantized sites before it.

One pass over the program, cut at groups of sites that share an input. Memory is the live values between two cuts, which can go
to disk above a limit, the statistics of one group, and the packed result; the float parameters belong to the caller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import (
    AllFinite,
    Observer,
    Together,
    init_states,
    observe_program,
    site_rows,
    stack_size,
    why_no_rows,
)
from qjax.calibration.rows import columns
from qjax.core import QTensor, Spec
from qjax.program import Leaf, Packed, Program, Site, compat
from qjax.program.flatten import FlatEqn, Graph, Lit, canonical, flatten
from qjax.program.packed import can_scan
from qjax.program.segments import Compiled, Cutter, Segment
from qjax.ptq.data import not_finite, other_program
from qjax.ptq.input_scale import part_scale, quantize_scaled, scaled_shapes
from qjax.ptq.method import Method, Outcome, Problem
from qjax.ptq.parts import Layout, Part, join, layout_of, part_axes, part_of, problem_of, put, take
from qjax.ptq.progress import Monitor
from qjax.ptq.resume import Kept
from qjax.ptq.spill import Live, OnDisk, Spill, opened
from qjax.ptq.work import Work, rows_seen, work_of


@dataclasses.dataclass(frozen=True)
class Task:
    """One parameter that a method quantizes on data."""

    leaf: Leaf
    spec: Spec
    method: Method
    scale: Any = None  # by which its input is divided, see `qjax.ptq.input_scale`

    @property
    def observer(self) -> Observer[Any]:
        if self.method.observer is None:
            raise ValueError(f"`method` {self.method.name} of {self.leaf.path!r} needs no data")
        # A batch that is not finite is named when it is seen, not when a solver fails on the sum of all.
        return Together((self.method.observer, AllFinite()))


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
    """One calibration batch on its way through the program: the graph for its shapes, and its live values."""

    def __init__(self, program: Program, cutter: Cutter, inputs: Sequence[Any], memory: Live):
        self.program, self.cutter, self.memory = program, cutter, memory
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


class Run:
    """The state of one sequential run: current parameters, and how far each shape of program has come."""

    def __init__(self, params: Sequence[Any], tasks: dict[int, Task], kept: Kept):
        self.params, self.tasks, self.kept = list(params), tasks, kept
        self.parts: dict[int, dict[Part, Outcome]] = {i: {} for i in tasks}
        self.done: dict[int, tuple[QTensor, tuple[str, ...]]] = {}
        self.compiled = Compiled()
        self.updates: dict[Any, Any] = {}

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
            notes = dict.fromkeys(
                f"{note} (layer {', '.join(map(str, p))})" if layout.axes else note for p, o in parts.items() for note in o.notes
            )
            joined = join(task.leaf, layout, {p: o.q for p, o in parts.items()})
            self.done[task.leaf.index] = (joined, tuple(notes))
            self.parts[task.leaf.index] = {}

    def solve(self, task: Task, part: Part, problem: Problem, scale: Any, state: Any) -> Outcome:
        """What the method makes of a problem and the state of `task.observer`; kept for a run that goes on after this one."""
        outcome = quantize_scaled(task.method, problem, None if state is None else state[0], scale)
        self.kept.keep_outcome(task.leaf.index, part, outcome)
        return outcome


def quantize_sequential(
    params: Sequence[Any],
    tasks: dict[int, Task],
    batches: Sequence[tuple[Program, Sequence[Any]]],
    monitor: Monitor,
    kept: Kept,
    spill: Spill | None = None,
) -> tuple[dict[int, tuple[QTensor, tuple[str, ...]]], dict[str, int]]:
    """Quantizes parameters in data-flow order.

    Args:
      params: the flat parameters; those that are already `QTensor`s are part of the quantized prefix.
      tasks: what to do, by flat index.
      batches: for each batch the program traced for its shapes and its flat inputs.
      monitor: is told of each visit of a site.
      kept: what was quantized before, and where what is quantized goes.
      spill: when live values go to disk.

    Returns:
      For each task the packed parameter and remarks; and bytes: the "live" values at their peak, those "spilled" in all.

    Raises:
      ValueError: batches of different shapes that trace to programs with different sites; data that are not finite.
    """
    run = Run(params, tasks, kept)
    with opened(spill) as memory:
        streams = streams_of(batches, memory)
        by_graph = {id(stream.cutter): visits_of(stream, tasks) for stream in streams}
        others = [by_graph[id(stream.cutter)] for stream in streams]
        visits = others[0]
        for number, other in enumerate(others):
            if other is not visits and [(v.site.key, v.part) for v in other] != [(v.site.key, v.part) for v in visits]:
                raise other_program(batches, number)
        flat = flat_leaves(visits, tasks)
        groups = grouped(visits, flat)
        phase = monitor.phase("calibrate", [visit_work(visits[n], streams, tasks, flat).weight for group in groups for n in group])
        positions = [0] * len(streams)
        for group in groups:
            visit = visits[group[0]]
            if visit.site.leaf in flat:
                stops = [mine[group[0]].position for mine in others]
                _advance(run, streams, positions, stops)
                positions = stops
                found = _solve_flat(run, streams, others, group)
            else:
                found = visit.site.leaf in run.done or _solve_pooled(run, streams, tasks[visit.site.leaf])
            for number in group:
                phase.step(visits[number].site.path, found)
    return run.done, {"live": memory.peak, "spilled": memory.spilled}


def grouped(visits: Sequence[Visit], flat: set[int]) -> list[list[int]]:
    """Numbers of the visits that are solved together, for they read the same: each group where its first one stands."""
    groups: dict[Any, list[int]] = {}
    for number, visit in enumerate(visits):
        reads = tuple(("literal", id(a)) if isinstance(a, Lit) else a for a in visit.sources)
        groups.setdefault(reads if visit.site.leaf in flat else ("pooled", number), []).append(number)
    return list(groups.values())


def visit_work(visit: Visit, streams: Sequence[Batch], tasks: dict[int, Task], flat: set[int]) -> Work:
    """What the statistics and the method compute at a visit, roughly: shapes alone are read."""
    site, task = visit.site, tasks[visit.site.leaf]
    removed = layout_of(task.leaf).axes if site.leaf in flat else ()
    shape = [n for i, n in enumerate(task.leaf.shape) if i not in removed]
    w = jax.ShapeDtypeStruct(tuple(shape), task.leaf.dtype)
    problem = problem_of(task.leaf, site, task.spec, w, removed)  # pyright: ignore[reportArgumentType]
    return observing(site, task.leaf, len(streams)).plus(work_of(task.method, problem))


def observing(site: Site, leaf: Leaf, batches: int) -> Work:
    """What a second moment of a site's inputs computes."""
    return Work(2.0 * rows_seen(site, leaf) * columns(site, leaf) ** 2 * batches)


def streams_of(batches: Sequence[tuple[Program, Sequence[Any]]], memory: Live) -> list[Batch]:
    cutters: dict[int, Cutter] = {}
    for program, _ in batches:
        if id(program) not in cutters:
            cutters[id(program)] = Cutter(flatten(program, unroll=True), len(program.leaves))
    return [Batch(program, cutters[id(program)], inputs, memory) for program, inputs in batches]


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


def _advance(run: Run, streams: list[Batch], starts: Sequence[int], stops: Sequence[int]) -> None:
    """Runs every batch from one cut to the next. What batches of one shape share is made once."""
    shared: dict[int, tuple[Segment, dict[int, Any]]] = {}
    for batch, start, stop in zip(streams, starts, stops, strict=True):
        if id(batch.cutter) not in shared:
            segment = batch.cutter.segment(start, stop)
            weights = {v: _weight(run, batch, v) for v in segment.inputs if batch.cutter.is_parameter(v)}
            shared[id(batch.cutter)] = segment, weights
        segment, weights = shared[id(batch.cutter)]
        values = [weights[v] if v in weights else batch.value(v) for v in segment.inputs]
        batch.advance(segment, run.compiled(segment, values), stop)


def _weight(run: Run, batch: Batch, var: int) -> Any:
    """The value, as quantized so far, of a parameter or of a layer of one."""
    graph = batch.cutter.graph
    where = {v: i for i, v in enumerate(graph.inputs[: len(batch.program.leaves)])}
    if var in where:
        return run.parameter(where[var])
    sliced = graph.sliced[var]
    if sliced.parent in where:
        return run.layer(where[sliced.parent], sliced.index or 0)
    parent = _view_value(run, batch, sliced.parent)
    return jax.lax.dynamic_index_in_dim(parent, jnp.int32(sliced.index), 0, keepdims=False)


def _view_value(run: Run, batch: Batch, var: int) -> Any:
    """The value of a view of a parameter: its chain of views, applied."""
    if var not in batch.cutter.views:
        return _weight(run, batch, var) if batch.cutter.is_parameter(var) else batch.value(var)
    eqn = batch.cutter.views[var]
    operands = [a.value if isinstance(a, Lit) else _view_value(run, batch, a) for a in eqn.inputs]
    return compat.bind(eqn.eqn, operands)[eqn.outputs.index(var)]


def _solve_flat(run: Run, streams: list[Batch], visits: list[list[Visit]], group: list[int]) -> bool:
    """Gathers the statistics of sites that share an input, over all batches, and quantizes their parameters.

    Returns whether all of them had been quantized by an earlier run.
    """
    shared: dict[Any, Any] = {}
    all_found = True
    for number in group:
        site = visits[0][number].site
        task = run.tasks[site.leaf]
        layout, part = layout_of(task.leaf), visits[0][number].part or ()
        w = take(run.params[site.leaf], layout, part)
        problem = problem_of(task.leaf, site, task.spec, w, layout.axes)
        scale = part_scale(task.scale, layout, part)
        outcome = run.kept.outcome(
            site.leaf, part, lambda task=task, problem=problem, scale=scale: scaled_shapes(task.method.shapes(problem), scale)
        )
        if outcome is None:
            all_found = False
            outcome = run.solve(task, part, problem, scale, _statistics(run, streams, visits, number, shared))
        run.finish_part(task, layout, part, outcome)
    return all_found


def _statistics(run: Run, streams: list[Batch], visits: list[list[Visit]], number: int, shared: dict[Any, Any]) -> Any:
    """The observer's state over all batches at a visit; that of an equal one in `shared`. None where a site has no rows."""
    site = visits[0][number].site
    task = run.tasks[site.leaf]
    if why_no_rows(site, task.leaf):
        return None
    equation = canonical(streams[0].eqn(visits[0][number]).eqn.params)
    signature = (task.observer, site.op, site.operand, site.pairs, site.batch, equation, _dims(site))
    if signature not in shared:
        state, finite = task.observer.init(stack_size(site, task.leaf), columns(site, task.leaf)), []
        for i, batch in enumerate(streams):
            state = _update(run, batch, visits[i][number], task.observer, state)
            finite.append(state[1])
        _check_finite(finite, site)
        shared[signature] = state
    return shared[signature]


def _check_finite(states: Sequence[jax.Array], site: Site) -> None:
    """Refuses the first batch after which a state of `AllFinite` is not; looked at once, so that batches need not wait."""
    bad = np.flatnonzero(np.isnan(np.stack(jax.device_get(list(states)))).reshape(len(states), -1).any(1))
    if bad.size:
        raise not_finite(site, int(bad[0]))


def _dims(site: Site) -> Any:
    """What decides, beside the equation, in which order a site's activations run over the parameter."""
    dims = range(len(site.view.dims)) if not site.pairs else [w for w, _ in (*site.pairs, *site.batch)]
    return tuple(site.view.dims[d] for d in dims)


def _update(run: Run, batch: Batch, visit: Visit, observer: Observer[Any], state: Any) -> Any:
    eqn = batch.eqn(visit)
    operands = [None if i == visit.site.operand else _operand(batch, a) for i, a in enumerate(eqn.inputs)]
    shapes = tuple((x.shape, str(x.dtype)) for x in operands if x is not None)
    site, raw = visit.site, eqn.eqn
    weight = raw.invars[site.operand].aval.shape
    # Equal for the repeated layers of a model, so that they share a compilation.
    key = (observer, site.op, site.operand, site.pairs, site.batch, site.view.dims, site.groups, canonical(raw.params), weight, shapes)
    if key not in run.updates:

        @jax.jit
        def update(state: Any, values: list[Any]) -> Any:
            return observer.update(state, site_rows(site, raw, values))

        run.updates[key] = update
    return run.updates[key](state, operands)


def _operand(batch: Batch, atom: Any) -> Any:
    return atom.value if isinstance(atom, Lit) else batch.value(atom)


def _solve_pooled(run: Run, streams: list[Batch], task: Task) -> bool:
    """Quantizes a parameter that several sites or turns of a loop share, from runs of the whole program as it is so far.

    Returns whether an earlier run had quantized it.
    """
    first = task.leaf.sites[0]
    problem = problem_of(task.leaf, first, task.spec, run.params[task.leaf.index])
    outcome = run.kept.outcome(task.leaf.index, (), lambda: scaled_shapes(task.method.shapes(problem), task.scale))
    found = outcome is not None
    if outcome is None:
        outcome = run.solve(task, (), problem, task.scale, _pooled_statistics(run, streams, task))
    uses = sum(not why_no_rows(s, task.leaf) for s in task.leaf.sites)
    note = f"one set of statistics for {f'its {uses} uses' if uses > 1 else 'all turns of its loop'}"
    note += " and all its layers" if first.view.stacked else ""
    run.finish_part(task, Layout((), ()), (), Outcome(outcome.q, (*outcome.notes, note)))
    return found


def _pooled_statistics(run: Run, streams: list[Batch], task: Task) -> Any:
    wanted = {s.key for s in task.leaf.sites if not why_no_rows(s, task.leaf)}
    params = [run.packed(i) for i in range(len(run.params))]
    total = None
    for number, batch in enumerate(streams):
        local = [s for s in batch.program.leaves[task.leaf.index].sites if s.key in wanted]
        observers = {s.key: task.observer for s in local}
        signature = ("pooled", id(batch.program), task.leaf.index)
        if signature not in run.updates:
            run.updates[signature] = jax.jit(observe_program(batch.program, observers))
        states = run.updates[signature](init_states(batch.program, observers), [*params, *batch.inputs])
        for site in local:
            state = _fold(states[site.key], len(site.scans), task.observer)
            if np.isnan(state[1]).any():
                raise not_finite(site, number)
            total = state if total is None else task.observer.merge(total, state)
    return total


def _fold(state: Any, scans: int, observer: Observer[Any]) -> Any:
    """Merges the states of the turns of the scans around a site."""
    for _ in range(scans):
        length = jax.tree.leaves(state)[0].shape[0]
        turns = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(length)]
        state = turns[0]
        for turn in turns[1:]:
            state = observer.merge(state, turn)
    return state


_dequantize = jax.jit(QTensor.dequantize)
