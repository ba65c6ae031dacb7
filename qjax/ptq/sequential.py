"""Sequential calibration: each site is quantized on the activations of the already quantized sites before it.

One pass over the program, cut at groups of sites that share an input. Memory is the live values between two cuts, the statistics of
one group, and the packed result; the float parameters belong to the caller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration import (
    Observer,
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
from qjax.ptq.input_scale import part_scale, quantize_scaled
from qjax.ptq.method import Method, Outcome
from qjax.ptq.parts import Layout, Part, join, layout_of, part_axes, part_of, problem_of, put, take

Progress = Callable[[int, int, str], None]


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
        return self.method.observer


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

    def __init__(self, program: Program, cutter: Cutter, inputs: Sequence[Any]):
        self.program, self.cutter = program, cutter
        first = len(program.leaves)
        self.live: dict[int, Any] = dict(zip(cutter.graph.inputs[first:], inputs, strict=True))
        self.inputs = list(inputs)

    def eqn(self, visit: Visit) -> FlatEqn:
        return self.cutter.graph.eqns[visit.position]

    def value(self, var: int) -> Any:
        graph = self.cutter.graph
        if var in self.live:
            return self.live[var]
        if var in graph.consts:
            return graph.consts[var]
        sliced = graph.sliced[var]
        parent = sliced.parent.value if isinstance(sliced.parent, Lit) else self.value(sliced.parent)
        return jax.lax.dynamic_index_in_dim(parent, jnp.int32(sliced.index), 0, keepdims=False)

    def advance(self, outputs: Sequence[int], values: Sequence[Any], stop: int) -> None:
        """Takes up what a segment gave and drops what nothing after `stop` reads."""
        live = {**self.live, **dict(zip(outputs, values, strict=True))}
        self.live = {v: x for v, x in live.items() if self.cutter.last_use.get(v, -1) >= stop}


class Run:
    """The state of one sequential run: current parameters, and how far each shape of program has come."""

    def __init__(self, params: Sequence[Any], tasks: dict[int, Task], progress: Progress | None):
        self.params, self.tasks = list(params), tasks
        self.parts: dict[int, dict[Part, Outcome]] = {i: {} for i in tasks}
        self.done: dict[int, tuple[QTensor, tuple[str, ...]]] = {}
        self.compiled = Compiled()
        self.updates: dict[Any, Any] = {}
        self.progress = progress

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
            if self.progress is not None:
                self.progress(len(self.done), len(self.tasks), task.leaf.path)


def quantize_sequential(
    params: Sequence[Any],
    tasks: dict[int, Task],
    batches: Sequence[tuple[Program, Sequence[Any]]],
    progress: Progress | None = None,
) -> dict[int, tuple[QTensor, tuple[str, ...]]]:
    """Quantizes parameters in data-flow order.

    Args:
      params: the flat parameters; those that are already `QTensor`s are part of the quantized prefix.
      tasks: what to do, by flat index.
      batches: for each batch the program traced for its shapes and its flat inputs.
      progress: called with (parameters done, all, path).

    Returns:
      For each task the packed parameter and remarks.

    Raises:
      ValueError: batches of different shapes that trace to programs with different sites.
    """
    run = Run(params, tasks, progress)
    streams = _streams(batches)
    by_graph = {id(stream.cutter): _visits(stream, tasks) for stream in streams}
    others = [by_graph[id(stream.cutter)] for stream in streams]
    visits = others[0]
    for other in by_graph.values():
        if [(v.site.key, v.part) for v in other] != [(v.site.key, v.part) for v in visits]:
            raise ValueError(
                "`calibration` holds batches whose shapes trace to programs with different sites; give batches of one shape"
            )
    flat = _flat_leaves(visits, tasks)
    positions = [0] * len(streams)
    solved: set[int] = set()
    for number, visit in enumerate(visits):
        if number in solved:
            continue
        group = [number]
        if visit.site.leaf in flat:
            group += [n for n in range(number + 1, len(visits)) if _together(visits[n], visit, flat) and n not in solved]
            stops = [mine[number].position for mine in others]
            _advance(run, streams, positions, stops)
            positions = stops
            _solve_flat(run, streams, others, group)
        elif visit.site.leaf not in run.done:
            _solve_pooled(run, streams, tasks[visit.site.leaf])
        solved.update(group)
    return run.done


def _streams(batches: Sequence[tuple[Program, Sequence[Any]]]) -> list[Batch]:
    cutters: dict[int, Cutter] = {}
    for program, _ in batches:
        if id(program) not in cutters:
            cutters[id(program)] = Cutter(flatten(program, unroll=True), len(program.leaves))
    return [Batch(program, cutters[id(program)], inputs) for program, inputs in batches]


def _visits(batch: Batch, tasks: dict[int, Task]) -> list[Visit]:
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


def _flat_leaves(visits: Sequence[Visit], tasks: dict[int, Task]) -> set[int]:
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


def _together(other: Visit, visit: Visit, flat: set[int]) -> bool:
    return other.site.leaf in flat and other.sources == visit.sources


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
        batch.advance(segment.outputs, run.compiled(segment, values), stop)


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


def _solve_flat(
    run: Run, streams: list[Batch], visits: list[list[Visit]], group: list[int]
) -> None:
    """Gathers the statistics of sites that share an input, over all batches, and quantizes their parameters."""
    shared: dict[Any, Any] = {}
    for number in group:
        site = visits[0][number].site
        task = run.tasks[site.leaf]
        equation = canonical(streams[0].eqn(visits[0][number]).eqn.params)
        signature = (task.observer, site.op, site.operand, site.pairs, site.batch, equation, _dims(site))
        if why_no_rows(site, task.leaf):
            state = None
        elif signature in shared:
            state = shared[signature]
        else:
            state = task.observer.init(stack_size(site, task.leaf), columns(site, task.leaf))
            for i, batch in enumerate(streams):
                state = _update(run, batch, visits[i][number], task.observer, state)
            shared[signature] = state
        layout, part = layout_of(task.leaf), visits[0][number].part or ()
        w = take(run.params[site.leaf], layout, part)
        problem = problem_of(task.leaf, site, task.spec, w, layout.axes)
        run.finish_part(task, layout, part, quantize_scaled(task.method, problem, state, part_scale(task.scale, layout, part)))


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


def _solve_pooled(run: Run, streams: list[Batch], task: Task) -> None:
    """Quantizes a parameter that several sites or turns of a loop share, from runs of the whole program as it is so far."""
    sites = [s for s in task.leaf.sites if not why_no_rows(s, task.leaf)]
    layout = Layout((), ())
    first = task.leaf.sites[0]
    params = [run.packed(i) for i in range(len(run.params))]
    total = None
    for batch in streams:
        local = [s for s in batch.program.leaves[task.leaf.index].sites if s.key in {x.key for x in sites}]
        observers = {s.key: task.observer for s in local}
        signature = ("pooled", id(batch.program), task.leaf.index)
        if signature not in run.updates:
            run.updates[signature] = jax.jit(observe_program(batch.program, observers))
        states = run.updates[signature](init_states(batch.program, observers), [*params, *batch.inputs])
        for site in local:
            state = _fold(states[site.key], len(site.scans), task.observer)
            total = state if total is None else task.observer.merge(total, state)
    problem = problem_of(task.leaf, first, task.spec, run.params[task.leaf.index])
    outcome = quantize_scaled(task.method, problem, total, task.scale)
    uses = f"its {len(sites)} uses" if len(sites) > 1 else "all turns of its loop"
    note = f"one set of statistics for {uses}" + (" and all its layers" if first.view.stacked else "")
    run.finish_part(task, layout, (), Outcome(outcome.q, (*outcome.notes, note)))


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
