"""Tunes the weights of a block together, on what the block makes of the data; a compiled loop for each kind of block."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.core import IntSpec, assemble, canonicalize, divide, logical_blocks
from qjax.program import compat
from qjax.program.flatten import FlatEqn, Graph, Lit
from qjax.program.merged import bind_merged
from qjax.program.segments import Compiled, Cutter, Segment, execute
from qjax.ptq.blocks import Block
from qjax.ptq.data import unseen_note
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.parts import Layout, Part, put
from qjax.ptq.signed_descent import Descent, Found, Offsets, Rounded, decode, descend, round_with, start, stored
from qjax.ptq.streams import Batch, Weights, weight_of


class Member(NamedTuple):
    """One weight of a block.

    Attributes:
      index: its parameter.
      layout: how that falls into parts.
      part: which one this is.
      problem: the part, float.
      scale: by which its input is divided (`qjax.ptq.input_scale`), or None.
    """

    index: int
    layout: Layout
    part: Part
    problem: Problem
    scale: Any

    @property
    def kind(self) -> Hashable:
        """What decides how it is rounded, beside numbers."""
        problem = self.problem
        shape = problem.w.shape, str(problem.w.dtype), None if self.scale is None else self.scale.shape
        return (problem.spec, problem.axes, problem.stacked, self.layout, *shape)


class Choice(NamedTuple):
    """How the tuning goes: the descent, calibration batches of a step, and the seed of their choice."""

    descent: Descent
    batch_size: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """A block in the program of one shape of batches.

    Attributes:
      segment: what it computes.
      sources: for each input of the segment ("weight", member), where that is a weight as it is tuned; ("whole", var), where it must be
        worked out of parameters that hold one; ("same", number) of what all batches share; ("own", number) of a batch's own.
      cutter: of the program, for "whole".
      roots: for "whole" the variable of each parameter: (variable, number of what is shared).
    """

    segment: Segment
    sources: tuple[tuple[str, int], ...]
    cutter: Cutter
    roots: tuple[tuple[int, int], ...]

    @property
    def key(self) -> Hashable:
        whole = id(self.cutter) if any(kind == "whole" for kind, _ in self.sources) else None
        return (self.segment.key, self.sources, whole, self.roots)


class Tuner:
    """Tunes blocks, and remembers what it compiled.

    While a block is tuned, what enters it and what it should make is in memory for all batches, for the loop takes them in any order:
    beside the live values, counted with them, and not spilled.
    """

    def __init__(self, compiled: Compiled):
        self.compiled = compiled
        self.loops: dict[Hashable, Callable[..., Any]] = {}

    def tune(
        self, members: Sequence[Member], blocks: Sequence[Block], streams: Sequence[Batch], weights: Weights, floats: Weights,
        choice: Choice, blame: Callable[[int, str], ValueError],
    ) -> list[Outcome]:  # fmt: skip
        """Chooses the codes of a block's weights.

        Args:
          members: the weights.
          blocks: for each stream where the block lies; the streams stand at its start.
          streams: the batches.
          weights: the parameters of the quantized program, so far.
          floats: those of the float one.
          choice: how.
          blame: the error for a batch, by its number, and what of it is not finite.

        Returns:
          An outcome for each member.
        """
        programs = list({id(b.cutter): (b.cutter, block) for b, block in zip(streams, blocks, strict=True)}.values())
        mine = [[b for b in streams if b.cutter is cutter] for cutter, _ in programs]
        known = [[self.known(b, block) for b in batches] for (_, block), batches in zip(programs, mine, strict=True)]
        built = [_shape(members, *program, batches, own, weights) for program, batches, own in zip(programs, mine, known, strict=True)]
        shapes, shared, own = (list(x) for x in zip(*built, strict=True))
        targets = [[self.target(shape, *pair, floats) for pair in zip(batches, values, strict=True)]
                   for shape, batches, values in zip(shapes, mine, known, strict=True)]  # fmt: skip
        numbers = [[i for i, b in enumerate(streams) if b.cutter is cutter] for cutter, _ in programs]
        for shape, (_, block), which, inputs, wanted in zip(shapes, programs, numbers, own, targets, strict=True):
            for number, *values in zip(which, inputs, wanted, strict=True):
                if what := _not_finite(shape, block, *values):
                    raise blame(number, what)
        data = [(same, _stack(inputs), _stack(wanted)) for same, inputs, wanted in zip(shared, own, targets, strict=True)]
        del known, own, targets
        held, memory = [x for _, inputs, wanted in data for x in (*inputs, *wanted)], streams[0].memory
        for x in held:
            memory.take_up(x)
        order = _order(choice, [(p, i) for p, which in enumerate(numbers) for i in range(len(which))])
        arrays = [(m.problem.w, m.scale) for m in members]
        begin = [_begin(m.problem.w, m.scale, m.problem._replace(w=None, name=""), choice.descent.mse) for m in members]  # pyright: ignore
        found = self.loop(members, shapes, choice)(arrays, begin, data, order)
        for x in held:
            memory.drop(x)
        return _outcomes(members, choice.descent, jax.device_get(found[1]), found[0])

    def known(self, batch: Batch, block: Block) -> dict[int, Any]:
        """What of a block depends on no parameter, for one batch."""
        eqns = [batch.cutter.graph.eqns[p] for p in block.first if p >= block.start]
        segment = batch.cutter.segment(block.start, block.stop, [v for eqn in eqns for v in eqn.outputs], eqns)
        return dict(zip(segment.outputs, self.compiled(segment, [batch.value(v) for v in segment.inputs]), strict=True))

    def target(self, shape: Shape, batch: Batch, known: dict[int, Any], floats: Weights) -> list[jax.Array]:
        """What the float block makes of the float program's values."""
        twin = batch.twin or batch

        def value(v: int) -> Any:
            if batch.cutter.is_parameter(v):
                return weight_of(floats, twin, v)
            return known[v] if v in known else twin.value(v)

        return self.compiled(shape.segment, [value(v) for v in shape.segment.inputs])

    def loop(self, members: Sequence[Member], shapes: Sequence[Shape], choice: Choice) -> Callable[..., Any]:
        kinds = tuple(m.kind for m in members)
        parts = tuple(m.part for m in members) if any(kind == "whole" for shape in shapes for kind, _ in shape.sources) else None
        key = (kinds, parts, tuple(shape.key for shape in shapes), choice.descent)
        if key not in self.loops:
            plain = [m._replace(problem=m.problem._replace(w=None), scale=None) for m in members]  # holds no array
            self.loops[key] = jax.jit(functools.partial(_loop, plain, tuple(shapes), choice.descent))
        return self.loops[key]


def _shape(
    members: Sequence[Member], cutter: Cutter, block: Block, batches: Sequence[Batch], known: Sequence[dict[int, Any]], weights: Weights
) -> tuple[Shape, list[Any], list[list[Any]]]:
    """The block in one program, what all its batches share, and what each has of its own."""
    graph = cutter.graph
    leaves = {v: i for i, v in enumerate(graph.inputs[: len(batches[0].program.leaves)])}
    tuned = {m.index for m in members}
    segment = cutter.segment(block.start, block.stop, block.outputs, _equations(cutter.graph, block))
    sources: list[tuple[str, int]] = []
    shared: list[Any] = []
    own: list[list[Any]] = [[] for _ in batches]
    roots: dict[int, int] = {}

    def share(value: Any) -> int:
        shared.append(value)
        return len(shared) - 1

    for v in segment.inputs:
        needs = _roots(cutter, v, leaves) if cutter.is_parameter(v) else {}
        if tuned & set(needs.values()):
            direct = _direct(members, cutter, v, leaves)
            sources.append(("whole", v) if direct is None else ("weight", direct))
            if direct is None:
                for root, index in needs.items():
                    if root not in roots:
                        roots[root] = share(weights.parameter(index))
        elif cutter.is_parameter(v):
            sources.append(("same", share(weight_of(weights, batches[0], v))))
        elif v in graph.consts:
            sources.append(("same", share(graph.consts[v])))
        elif v not in block.from_data:
            sources.append(("same", share(known[0][v] if v in known[0] else batches[0].value(v))))
        else:
            sources.append(("own", len(own[0])))
            for values, batch, made in zip(own, batches, known, strict=True):
                values.append(made[v] if v in made else batch.value(v))
    return Shape(segment, tuple(sources), cutter, tuple(roots.items())), shared, own


def held_bytes(cutter: Cutter, block: Block) -> int:
    """Bytes of what `Tuner.tune` holds of a batch: what enters its block and what it should make, from shapes alone."""
    segment = cutter.segment(block.start, block.stop, block.outputs, _equations(cutter.graph, block))
    own = [v for v in segment.inputs if not cutter.is_parameter(v) and v in block.from_data]
    avals = [cutter.graph.avals[v] for v in (*own, *segment.outputs)]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)


def _equations(graph: Graph, block: Block) -> list[FlatEqn]:
    """What is computed of a block for each batch. Behind the equations of a call with a derivative of its own stands the call, whole:
    what reads its results reads these, and the equations that were only for them fall away when the loop is compiled."""
    first, eqns = set(block.first), []
    calls = {rule.stop: rule for rule in block.rules if block.start <= rule.start < rule.stop}
    for position in range(block.start, block.stop):
        if position not in first:
            eqns.append(graph.eqns[position])
        if (rule := calls.get(position + 1)) is not None:
            made = {v for eqn in graph.eqns[rule.start : rule.stop] for v in eqn.outputs}
            outputs = tuple(v if not isinstance(v, Lit) and v in made else -1 - i for i, v in enumerate(rule.outputs))  # < 0: read by none
            eqns.append(FlatEqn(rule.eqn.primitive.name, rule.eqn, rule.inputs, outputs, (), ()))
    return eqns


def _roots(cutter: Cutter, var: int, leaves: dict[int, int]) -> dict[int, int]:
    """The parameters that a variable is a view of: their index by their variable."""
    if var in leaves:
        return {var: leaves[var]}
    inputs = cutter.views[var].inputs if var in cutter.views else [cutter.graph.sliced[var].parent] if var in cutter.graph.sliced else []
    return {root: i for a in inputs if not isinstance(a, Lit) for root, i in _roots(cutter, a, leaves).items()}


def _direct(members: Sequence[Member], cutter: Cutter, var: int, leaves: dict[int, int]) -> int | None:
    """The member whose weight a variable is, as it is: a whole parameter, or the layer of one that a scan takes."""
    sliced = cutter.graph.sliced.get(var)
    index = leaves.get(var if sliced is None else sliced.parent)
    where = ((), ()) if sliced is None else ((0,), (sliced.index,))
    return next((i for i, m in enumerate(members) if m.index == index and (m.layout.axes, m.part) == where), None)


def _whole(shape: Shape, members: Sequence[Member], tuned: Sequence[jax.Array], shared: Sequence[Any], var: int) -> Any:
    """The value of a variable that is a view of a parameter, with the tuned parts put in."""
    roots, cutter = dict(shape.roots), shape.cutter
    if var in roots:
        w = shared[roots[var]]
        place = cutter.graph.inputs.index(var)
        for member, part in zip(members, tuned, strict=True):
            if member.index == place:
                w = put(w, member.layout, member.part, part)
        return w
    if var in cutter.views:
        eqn = cutter.views[var]
        operands = [a.value if isinstance(a, Lit) else _whole(shape, members, tuned, shared, a) for a in eqn.inputs]
        return compat.bind(eqn.eqn, operands)[eqn.outputs.index(var)]
    sliced = cutter.graph.sliced[var]
    return lax.index_in_dim(_whole(shape, members, tuned, shared, sliced.parent), sliced.index or 0, 0, keepdims=False)


def _blocked(problem: Problem, w: jax.Array, scale: Any) -> tuple[jax.Array, Callable[..., Any], Callable[..., Any]]:
    w = w.astype(jnp.float32)
    return logical_blocks(w if scale is None else w * scale, problem.spec, problem.axes, problem.stacked)  # pyright: ignore


# Apart from the loop: the search of ranges is compiled once for weights of one shape.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _begin(w: jax.Array, scale: Any, problem: Problem, mse: bool) -> Offsets:
    return start(_blocked(problem, w, scale)[0], problem.spec, mse)  # pyright: ignore[reportArgumentType]


def _loop(
    members: Sequence[Member], shapes: Sequence[Shape], descent: Descent, arrays: list[Any], begin: list[Offsets],
    data: list[Any], order: Any,
) -> tuple[list[Any], Found]:  # fmt: skip
    """The whole tuning of a block: codes and grids, and what was found beside them."""
    specs: list[IntSpec] = [m.problem.spec for m in members]  # pyright: ignore[reportAssignmentType]
    views = [_blocked(m.problem, w, s) for m, (w, s) in zip(members, arrays, strict=True)]
    energy = [[jnp.sum(jnp.square(t.astype(jnp.float32))) for t in wanted] for _, _, wanted in data]
    total = [jnp.maximum(sum(each), 1e-30) for each in zip(*energy, strict=True)]

    def weights(offsets: Sequence[Offsets]) -> list[jax.Array]:
        out = []
        for spec, (x, _, logical), (w, s), o in zip(specs, views, arrays, offsets, strict=True):
            fake = logical(decode(round_with(x, o, spec)))
            out.append((fake if s is None else divide(fake, jnp.broadcast_to(s, fake.shape))).astype(w.dtype))
        return out

    def error(program: int, tuned: Sequence[jax.Array], number: jax.Array) -> jax.Array:
        shared, inputs, wanted = data[program]
        made = _run(shapes[program], members, tuned, shared, [x[number] for x in inputs])
        parts = [jnp.sum(jnp.square(y.astype(jnp.float32) - t[number].astype(jnp.float32))) for y, t in zip(made, wanted, strict=True)]
        return sum(part / whole for part, whole in zip(parts, total, strict=True))  # pyright: ignore[reportReturnType]

    branches = [functools.partial(error, i) for i in range(len(shapes))]

    def loss(offsets: Sequence[Offsets], t: jax.Array) -> jax.Array:
        tuned = weights(offsets)
        errors = lax.map(lambda at: lax.switch(at[0], branches, tuned, at[1]), order[t]) if order.shape[1] > 1 else \
            lax.switch(order[t, 0, 0], branches, tuned, order[t, 0, 1])  # fmt: skip
        return jnp.sum(errors)

    def judge(offsets: Sequence[Offsets]) -> jax.Array:
        tuned = weights(offsets)
        each = [lax.map(functools.partial(f, tuned), jnp.arange(d[2][0].shape[0])) for f, d in zip(branches, data, strict=True)]
        return sum(jnp.sum(x) for x in each)  # pyright: ignore[reportReturnType]

    def reached(slopes: Sequence[Offsets]) -> list[jax.Array]:
        """For each member which of its parts (experts) have a gradient."""
        return [_parts_with(logical(slope.v), m.problem) for m, (_, _, logical), slope in zip(members, views, slopes, strict=True)]

    plain = [start(x, spec, False) for (x, *_), spec in zip(views, specs, strict=True)]
    found = descend(loss, judge, plain, begin if descent.mse else plain, descent, reached)
    codes = [_codes(x, o, spec, canonical) for (x, canonical, _), o, spec in zip(views, found.best, specs, strict=True)]
    return codes, found._replace(best=())


def _parts_with(slope: jax.Array, problem: Problem) -> jax.Array:
    """Which independent parts of a weight hold a number that is not zero."""
    within = [a for a in range(slope.ndim) if a - slope.ndim not in problem.stacked]
    return jnp.any(slope != 0, axis=within)


def _run(shape: Shape, members: Sequence[Member], tuned: Sequence[jax.Array], shared: Sequence[Any], own: Sequence[Any]) -> list[Any]:
    take: dict[str, Callable[[int], Any]] = {
        "weight": tuned.__getitem__,
        "whole": functools.partial(_whole, shape, members, tuned, shared),
        "same": shared.__getitem__,
        "own": own.__getitem__,
    }
    return execute(shape.segment, *(take[kind](number) for kind, number in shape.sources), bind=bind_merged)


def _codes(x: jax.Array, offsets: Offsets, spec: IntSpec, canonical: Callable[[jax.Array], jax.Array]) -> Rounded:
    return stored(round_with(x, offsets, spec), spec, canonical)


def _outcomes(members: Sequence[Member], descent: Descent, found: Found, codes: Sequence[Rounded]) -> list[Outcome]:
    first, rounding = float(found.first), float(found.rounding)
    began = "" if first == rounding else f", {first:.3g} where it began"
    note = f"tuned with {len(members)} weights: {found.least:.3g} of its block's output is error, {rounding:.3g} when rounded{began}"
    checks, between = descent.turns
    lost = [(found.skipped, "its block's error is not finite: left out"),
            (found.holes, "some of its block's gradient is NaN or infinite: what has none stands still")]  # fmt: skip
    notes = (note, *(f"in {count} of {checks * between} steps {what}" for count, what in lost if count))
    # Data may have come to a weight without a gradient: one that is on its grid already, or whose output the block multiplies by zero.
    unseen = [unseen_note(np.atleast_1d(seen), "rounded", "gradient of its block's error reached it") for seen in found.reached]
    return [Outcome(pack_rounded(m.problem, rounded, m.scale), (*notes, *([unreached] if unreached else [])))
            for m, rounded, unreached in zip(members, codes, unseen, strict=True)]  # fmt: skip


def pack_rounded(problem: Problem, found: Rounded, scale: Any) -> Any:
    """The packed weight of codes (kept..., Kpad)."""
    sizes = [problem.w.shape[a] for a in problem.axes]
    q = assemble(*found, problem.spec, problem.axes, sizes, problem.w.dtype, name=problem.name)
    return q if scale is None else dataclasses.replace(q, input_scale=canonicalize(jnp.asarray(scale), problem.axes))


def _order(choice: Choice, batches: Sequence[tuple[int, int]]) -> jax.Array:
    """(steps, batch_size, 2): the program and the number of each batch, in random order, none twice before all came once."""
    checks, between = choice.descent.turns
    wanted = checks * between * choice.batch_size
    generator = np.random.default_rng(choice.seed)
    drawn = [generator.permutation(len(batches)) for _ in range(-(-wanted // len(batches)))]
    picked = np.concatenate(drawn)[:wanted]
    return jnp.asarray(np.asarray(batches, np.int32)[picked].reshape(-1, choice.batch_size, 2))


def _stack(rows: Sequence[Sequence[Any]]) -> list[jax.Array]:
    return [jnp.stack([jnp.asarray(x) for x in column]) for column in zip(*rows, strict=True)]


def _not_finite(shape: Shape, block: Block, inputs: Sequence[Any], targets: Sequence[Any]) -> str:
    """What of a batch is not finite; "" if all is. What depends on no parameter may be infinite (a mask that is added), not NaN."""
    own = [v for v, (kind, _) in zip(shape.segment.inputs, shape.sources, strict=True) if kind == "own"]
    for v, x in zip(own, inputs, strict=True):
        enters = f"a value {jnp.shape(x)} that enters it"
        if v in block.from_parameters and not all_hold(jnp.isfinite, x):
            return f"{enters} holds NaN or infinity"
        if v not in block.from_parameters and not all_hold(lambda x: ~jnp.isnan(x), x):
            return f"{enters} and depends on no parameter (a mask, a table, a batch itself) holds NaN"
    bad = next((y for y in targets if not all_hold(jnp.isfinite, y)), None)
    return "" if bad is None else f"what it makes {jnp.shape(bad)} in the float program holds NaN or infinity"


def all_hold(holds: Callable[[Any], Any], x: Any) -> bool:
    """Whether something holds of every number of an array; of one that is not floating it does."""
    x = jnp.asarray(x)
    return not jnp.issubdtype(x.dtype, jnp.floating) or bool(jnp.all(holds(x)))
