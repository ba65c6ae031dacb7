"""Sequential calibration: each site is quantized on the activations of the already quantized sites before it.

One pass over the program, cut at groups of sites that share an input. Memory is the live values between two cuts, which can go
to disk above a limit, the statistics of one group, and the packed result; the float parameters belong to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qjax.calibration import Observer, init_states, observe_program, site_rows, stack_size, why_no_rows
from qjax.calibration.rows import columns
from qjax.core import QTensor
from qjax.program import Leaf, Program, Site
from qjax.program.flatten import Lit, canonical
from qjax.program.segments import Compiled
from qjax.ptq.autoround import blockwise
from qjax.ptq.block_tuning import Tuner
from qjax.ptq.blockwise import Joint, Joints, find_joints, member_of, tune_joint
from qjax.ptq.data import not_finite, other_program
from qjax.ptq.input_scale import part_scale, quantize_scaled, scaled_shapes
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.parts import Layout, Part, layout_of, problem_of, take
from qjax.ptq.progress import Monitor
from qjax.ptq.resume import Kept
from qjax.ptq.spill import Spill, opened
from qjax.ptq.streams import Batch, Task, Visit, Weights, advance, advance_both, flat_leaves, grouped, streams_of, visits_of
from qjax.ptq.work import Work, rows_seen, work_of


class Run:
    """The state of one sequential run: current parameters, those of the float program, and what was compiled."""

    def __init__(self, params: Sequence[Any], floats: Sequence[Any], tasks: dict[int, Task], kept: Kept):
        self.tasks, self.kept = tasks, kept
        self.weights, self.floats = Weights(params, tasks), Weights(floats, {})
        self.compiled = Compiled()
        self.updates: dict[Any, Any] = {}
        self.tuner = Tuner(self.compiled)
        # What a block's tuning found and no site has taken yet; and whether an earlier run did.
        self.tuned: dict[tuple[int, Part], tuple[Outcome, bool]] = {}
        self.joined: set[tuple[int, ...]] = set()  # blocks that were tuned, by the numbers of their visits

    def advance(self, streams: Sequence[Batch], starts: Sequence[int], stops: Sequence[int]) -> None:
        """Runs every batch from one cut to the next, and its twin in the float program, where there is one."""
        if streams[0].twin is None:
            advance(self.compiled, self.weights, streams, starts, stops)
        else:
            advance_both(self.compiled, self.weights, self.floats, streams, starts, stops)

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
    floats: Sequence[Any] = (),
) -> tuple[dict[int, tuple[QTensor, tuple[str, ...]]], dict[str, int]]:
    """Quantizes parameters in data-flow order.

    Args:
      params: the flat parameters; those that are already `QTensor`s are part of the quantized prefix.
      tasks: what to do, by flat index.
      batches: for each batch the program traced for its shapes and its flat inputs.
      monitor: is told of each visit of a site.
      kept: what was quantized before, and where what is quantized goes.
      spill: when live values go to disk.
      floats: the flat parameters before any was rounded, for methods that compare with the float program (`needs_float`): then every
        batch goes through that one, too, up to the last site of such a method.

    Returns:
      For each task the packed parameter and remarks; and bytes: the "live" values at their peak, those "spilled" in all.

    Raises:
      ValueError: batches of different shapes that trace to programs with different sites; data that are not finite; a block
        tuned within a method that makes more of a weight.
    """
    for task in tasks.values():
        blockwise(task.method)  # refused before anything is computed
    run = Run(params, floats, tasks, kept)
    comparing = {index for index, task in tasks.items() if task.needs_float}
    with opened(spill) as memory:
        streams = streams_of(batches, memory, twins=bool(comparing))
        by_graph = {id(stream.cutter): visits_of(stream, tasks) for stream in streams}
        others = [by_graph[id(stream.cutter)] for stream in streams]
        visits = others[0]
        for number, other in enumerate(others):
            if other is not visits and [(v.site.key, v.part) for v in other] != [(v.site.key, v.part) for v in visits]:
                raise other_program(batches, number)
        flat = flat_leaves(visits, tasks)
        joints = find_joints(streams, others, tasks, flat)
        groups = grouped(visits, flat, joints.joints)
        phase = monitor.phase("calibrate", [visit_work(visits[n], streams, tasks, flat).weight for group in groups for n in group])
        positions = [0] * len(streams)
        last = max([i for i, group in enumerate(groups) if any(visits[n].site.leaf in comparing & flat for n in group)], default=-1)
        for turn, group in enumerate(groups):
            visit = visits[group[0]]
            if turn == last + 1:
                for stream in streams:
                    stream.drop_twin()
            if visit.site.leaf in flat:
                positions = _tune(run, streams, positions, others, joints.joints.get(group[0]))
                stops = [mine[group[0]].position for mine in others]
                run.advance(streams, positions, stops)
                positions = stops
                found = _solve_flat(run, streams, others, group, joints)
            else:
                found = visit.site.leaf in run.weights.done or _solve_pooled(run, streams, tasks[visit.site.leaf])
            for number in group:
                phase.step(visits[number].site.path, found)
    return run.weights.done, {"live": memory.peak, "spilled": memory.spilled}


def visit_work(visit: Visit, streams: Sequence[Batch], tasks: dict[int, Task], flat: set[int]) -> Work:
    """What the statistics and the method compute at a visit, roughly: no number is read."""
    site, task = visit.site, tasks[visit.site.leaf]
    removed = layout_of(task.leaf).axes if site.leaf in flat else ()
    shape = [n for i, n in enumerate(task.leaf.shape) if i not in removed]
    w = jax.ShapeDtypeStruct(tuple(shape), task.leaf.dtype)
    problem = problem_of(task.leaf, site, task.spec, w, removed)._replace(pruned=task.pruned)  # pyright: ignore[reportArgumentType]
    method = blockwise(task.method)
    if method is not None and site.leaf in flat:  # three products a step, forward and backward; one a check
        uses = 3 * method.steps * method.batch_size + (method.checks + 2) * len(streams)
        each = Work(2.0 * rows_seen(site, task.leaf) * math.prod(shape)).times(uses)
        return each.plus(Work(steps=2.0 * math.prod(shape) * method.steps)).plus(method.searching(problem))
    return observing(site, task.leaf, len(streams)).plus(work_of(task.method, problem))


def observing(site: Site, leaf: Leaf, batches: int) -> Work:
    """What a second moment of a site's inputs computes."""
    return Work(2.0 * rows_seen(site, leaf) * columns(site, leaf) ** 2 * batches)


def _tune(run: Run, streams: list[Batch], positions: list[int], visits: list[list[Visit]], joint: Joint | None) -> list[int]:
    """Tunes the weights of a block when its first one is reached: `_solve_flat` finds their outcomes. Returns where the streams stand."""
    if joint is None or joint.numbers in run.joined:
        return positions
    run.joined.add(joint.numbers)
    mine = [visits[0][n] for n in joint.numbers]
    members = [member_of(visit, run.tasks[visit.site.leaf], run.weights) for visit in mine]
    kept = [_kept(run, run.tasks[m.index], m.part, m.problem, m.scale) for m in members]
    outcomes = [outcome for outcome in kept if outcome is not None]
    earlier = len(outcomes) == len(members)
    if not earlier:
        starts = [max(at, block.start) for at, block in zip(positions, joint.blocks, strict=True)]
        run.advance(streams, positions, starts)
        positions = starts
        outcomes = tune_joint(run.tuner, joint, members, mine[0], streams, positions, run.weights, run.floats)
        for member, outcome in zip(members, outcomes, strict=True):
            run.kept.keep_outcome(member.index, member.part, outcome)
    run.tuned |= {(m.index, m.part): (outcome, earlier) for m, outcome in zip(members, outcomes, strict=True)}
    return positions


def _kept(run: Run, task: Task, part: Part, problem: Problem, scale: Any) -> Outcome | None:
    """What an earlier run made of a part."""
    return run.kept.outcome(task.leaf.index, part, lambda: scaled_shapes(task.method.shapes(problem), scale))


def _solve_flat(run: Run, streams: list[Batch], visits: list[list[Visit]], group: list[int], joints: Joints) -> bool:
    """Gathers the statistics of sites that share an input, over all batches, and quantizes their parameters.

    Returns whether all of them had been quantized by an earlier run.
    """
    shared: dict[Any, Any] = {}
    all_found = True
    for number in group:
        site = visits[0][number].site
        task = run.tasks[site.leaf]
        layout, part = layout_of(task.leaf), visits[0][number].part or ()
        w = take(run.weights.params[site.leaf], layout, part)
        problem = problem_of(task.leaf, site, task.spec, w, layout.axes)
        scale = part_scale(task.scale, layout, part)
        outcome, earlier = run.tuned.pop((site.leaf, part), (None, False))
        if outcome is None:
            outcome = _kept(run, task, part, problem, scale)
            earlier = outcome is not None
        all_found &= earlier
        if outcome is None:
            outcome = run.solve(task, part, problem, scale, _statistics(run, streams, visits, number, shared))
        why = (joints.reasons[number],) if number in joints.reasons else ()
        run.weights.finish_part(task, layout, part, outcome._replace(notes=(*outcome.notes, *why)))
    return all_found


def _statistics(run: Run, streams: list[Batch], visits: list[list[Visit]], number: int, shared: dict[Any, Any]) -> Any:
    """The observer's state over all batches at a visit; that of an equal one in `shared`. None where a site has no rows."""
    site = visits[0][number].site
    task = run.tasks[site.leaf]
    if why_no_rows(site, task.leaf):
        return None
    equation = canonical(streams[0].eqn(visits[0][number]).eqn.params)
    signature = (task.observer, task.needs_float, site.op, site.operand, site.pairs, site.batch, equation, _dims(site))
    if signature not in shared:
        state, finite = task.observer.init(stack_size(site, task.leaf), columns(site, task.leaf)), []
        for i, batch in enumerate(streams):
            state = _update(run, batch, visits[i][number], task, state)
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


def _update(run: Run, batch: Batch, visit: Visit, task: Task, state: Any) -> Any:
    eqn, observer = batch.eqn(visit), task.observer
    sides = [batch, batch.twin] if task.needs_float else [batch]
    both = [[None if i == visit.site.operand else _operand(side, a) for i, a in enumerate(eqn.inputs)] for side in sides]
    shapes = tuple((x.shape, str(x.dtype)) for x in both[0] if x is not None)
    site, raw = visit.site, eqn.eqn
    weight = raw.invars[site.operand].aval.shape
    # Equal for the repeated layers of a model, so that they share a compilation.
    place = (site.op, site.operand, site.pairs, site.batch, site.view.dims, site.groups, canonical(raw.params))
    key = (observer, len(both), *place, weight, shapes)
    if key not in run.updates:

        @jax.jit
        def update(state: Any, both: list[list[Any]]) -> Any:
            rows, *others = (site_rows(site, raw, values) for values in both)
            return observer.update(state, rows._replace(reference=others[0].x) if others else rows)

        run.updates[key] = update
    return run.updates[key](state, both)


def _operand(batch: Batch, atom: Any) -> Any:
    return atom.value if isinstance(atom, Lit) else batch.value(atom)


def _solve_pooled(run: Run, streams: list[Batch], task: Task) -> bool:
    """Quantizes a parameter that several sites or turns of a loop share, from runs of the whole program as it is so far.

    Returns whether an earlier run had quantized it.
    """
    first = task.leaf.sites[0]
    problem = problem_of(task.leaf, first, task.spec, run.weights.params[task.leaf.index])
    outcome = run.kept.outcome(task.leaf.index, (), lambda: scaled_shapes(task.method.shapes(problem), task.scale))
    found = outcome is not None
    if outcome is None:
        outcome = run.solve(task, (), problem, task.scale, _pooled_statistics(run, streams, task))
    uses = sum(not why_no_rows(s, task.leaf) for s in task.leaf.sites)
    note = f"one set of statistics for {f'its {uses} uses' if uses > 1 else 'all turns of its loop'}"
    note += " and all its layers" if first.view.stacked else ""
    run.weights.finish_part(task, Layout((), ()), (), Outcome(outcome.q, (*outcome.notes, note)))
    return found


def _pooled_statistics(run: Run, streams: list[Batch], task: Task) -> Any:
    wanted = {s.key for s in task.leaf.sites if not why_no_rows(s, task.leaf)}
    params = [run.weights.packed(i) for i in range(len(run.weights.params))]
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
