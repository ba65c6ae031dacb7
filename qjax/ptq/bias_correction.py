"""Bias correction: rounding moves the mean of a layer's result; what it moved is taken off the bias that follows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import QProduct, QTensor
from qjax.graph.affine import VIEWS, affine_after, constant_values, readers_of
from qjax.graph.relations import is_floating
from qjax.program import Interpreter, Key, Packed, Product, Program, ProgramCache, Site, compat, materialize, plain_rule, split_arguments
from qjax.program.flatten import STACK, FlatEqn, Graph, Lit, canonical, flatten
from qjax.program.packed import can_scan
from qjax.program.segments import Cutter, Segment
from qjax.ptq.data import check_numbers
from qjax.ptq.quantize import Result, as_batches
from qjax.ptq.reference import float_reference
from qjax.ptq.spill import Live, Spill, opened
from qjax.ptq.streams import Batch
from qjax.runtime.products import product_rule
from qjax.runtime.quantized import checked_products, named_products
from qjax.runtime.select import packed_rule

PASSED = VIEWS | {"transpose"}
CASTS = frozenset({"convert_element_type", "copy", "reduce_precision"})

# What the report's notes begin with, so that a second correction replaces what the first one said.
MOVED = "bias correction: "
MEANS = "its mean is corrected in "
NONE = "no bias correction: "
UNSEEN = "no data reached a part of it: not corrected there"
OWN = (MOVED, MEANS, NONE, UNSEEN)


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where a bias is added to what quantized weights made, in the flattened program.

    Attributes:
      leaf: the flat index of the bias.
      turn: which element of a stacked bias: one index for each scan around it.
      position: of the equation that adds it.
      value: the variable that it is added to.
      sign: -1 where it is subtracted.
      start: the variable that is the bias, or the layer of it.
      chain: the equations that bring it into the shape of the value.
      weights: flat indices of the weights.
    """

    leaf: int
    turn: tuple[int, ...]
    position: int
    value: int
    sign: int
    start: int
    chain: tuple[FlatEqn, ...]
    weights: tuple[int, ...]

    @property
    def others(self) -> tuple[int, ...]:
        """The variables, beside the bias, that the chain reads: the indices of a lookup."""
        made = {self.start, *(v for eqn in self.chain for v in eqn.outputs)}
        return tuple(a for eqn in self.chain for a in eqn.inputs if not isinstance(a, Lit) and a not in made)


def correct_bias(
    fn: Callable[..., Any], params: Any, result: Result, calibration: Iterable[Any], *, spill: Spill | None = None
) -> Result:
    """Takes the mean that rounding adds to each layer's result off the bias that is added to it.

    b <- b - (E[z_q] - E[z])
    where z is what the bias is added to in the float program, z_q the same in the quantized one, and E the mean over the
    calibration data and all positions that share an element of the bias. Where `qjax.quantize` rescaled inputs, the parameters
    of the float program are rescaled likewise (z / s, not z); products of two activations in `result.sites` multiply integers. The
    layers are taken in data-flow order, and z_q is that of the program whose earlier biases are corrected already, with its
    activations rounded as they will be: behind a function that is not linear the mean depends on that, so one pass with the
    uncorrected program would not do. Both programs walk through the data side by side, cut at the biases, so all of it costs one run of
    either.

    Which bias belongs to a weight is found by data flow: a parameter with nothing else to read it that is added to (or subtracted from)
    the weight's result, in front of which sums, casts, changes of shape and products with parameters may stand: a batch norm's shift is
    one if the layer has none. Layers of a scan, experts and heads have each their own.

    Args:
      fn: the function that was quantized.
      params: its float parameters, as `qjax.quantize` was given them.
      result: from `qjax.quantize`. One that was corrected before is corrected anew.
      calibration: batches, as for `qjax.quantize`.
      spill: keeps the live values of both programs below a limit, the rest on disk; None keeps all in memory.

    Returns:
      A new `Result`: `result` with other biases. The report says for each weight which bias was corrected, or why none was.

    Raises:
      TypeError: `result` is no `Result`, or `params` holds quantized parameters.
      ValueError: `result` has no quantized parameter or is not of `params` (it was made of others, or was saved and loaded after inputs
        were rescaled, of which a file keeps nothing); `calibration` holds shapes, or data that is not finite.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> params = {"w": jnp.array([[1.0], [0.3]]), "b": jnp.zeros(1)}
      >>> x = jnp.array([[1.0, 2.0], [1.0, 4.0]])
      >>> result = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=qjax.int2())]), calibration=[x])
      >>> shift = fn({**params, "w": result.params["w"].dequantize()}, x).mean() - fn(params, x).mean()
      >>> bool(jnp.isclose(correct_bias(fn, params, result, [x]).params["b"][0], -shift))
      True

    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2 and appendix D (the empirical one, in topological order). Theirs corrects the
    bias of the layer itself; here any that is found after it.
    """
    if not isinstance(result, Result):
        raise TypeError(f"`result` must be what `qjax.quantize` returned, a Result and not its params, got {type(result).__name__}")
    batches = as_batches(calibration)
    programs = ProgramCache(fn)
    arguments = [split_arguments(params, batch, {}) for batch in batches]
    packed = split_arguments(result.params, batches[0], {})
    for path, w in zip(arguments[0].paths, arguments[0].params, strict=True):
        if isinstance(w, QTensor):
            raise TypeError(f"`params` leaf {path!r} is quantized ({w.spec}): give the float parameters")
    if packed.paths != arguments[0].paths:
        raise ValueError("`result` is not of `params`: their trees have other paths; give the parameters that were quantized")
    quantized = {i for i, w in enumerate(packed.params) if isinstance(w, QTensor)}
    if not quantized:
        raise ValueError("`result` has no quantized parameter: there is nothing to correct")
    streams = [(programs(a), a.inputs) for a in arguments]
    check_numbers(streams, "a bias correction")
    before = {row.path: tuple(note for note in row.notes if not note.startswith(OWN)) for row in result.report.rows}
    again = {row.path for row in result.report.rows if any(note.startswith(MOVED) for note in row.notes)}
    leaves = float_reference(streams[0][0], arguments[0].params, packed.params, result, again)
    # What an earlier correction took off is not in z_q: it starts anew from the bias that was quantized with.
    start = [b if path in again else w for path, b, w in zip(packed.paths, leaves, packed.params, strict=True)]
    with opened(spill) as memory:
        walk = _Walk(streams, leaves, start, quantized, checked_products(result.sites), memory)
        notes = walk.run()
    rows = [dataclasses.replace(row, notes=(*before[row.path], *notes.get(row.path, ()))) for row in result.report.rows]
    new, _, _ = packed.rebuild([jnp.asarray(w) if i in walk.corrected else w for i, w in enumerate(walk.quantized)], packed.inputs)
    return dataclasses.replace(result, params=new, report=dataclasses.replace(result.report, rows=tuple(rows)))


def spots(program: Program, graph: Graph, quantized: set[int]) -> tuple[list[Spot], dict[int, tuple[str, ...]]]:
    """Finds the bias of every quantized weight.

    Args:
      program: the traced program.
      graph: it, flattened with its scans laid out.
      quantized: flat indices of the weights.

    Returns:
      The spots in data-flow order, and for the weights without one the reasons.
    """
    sites = {site.key: site for site in program.sites if site.leaf in quantized}
    readers, constant = readers_of(graph), constant_values(graph, len(program.leaves))
    biases = _Biases(program, graph, readers, quantized)
    position = {id(eqn): i for i, eqn in enumerate(graph.eqns)}
    found: dict[int, Spot] = {}
    reasons: dict[int, dict[str, None]] = {}

    def takes(eqn: FlatEqn, other: Any) -> bool:
        return eqn.name in ("add", "sub") or isinstance(other, Lit) or other in constant

    def refuse(leaf: int, reason: str) -> None:
        reasons.setdefault(leaf, {})[reason] = None

    for eqn in graph.eqns:
        for key in eqn.inside:
            if key in sites:
                refuse(sites[key].leaf, f"it stands in a `{eqn.name}` that runs as a whole")
        site = sites.get(eqn.key)
        if site is None or eqn.eqn is None:
            continue
        if site.op == "gather":
            refuse(site.leaf, "it is looked up")
            continue
        at = [(e, value, biases.of(other)) for e, value, other in affine_after(graph, readers, eqn.outputs[0], takes, PASSED)]
        first = next(((e, value, bias) for e, value, bias in at if isinstance(bias, tuple)), None)
        if first is None:
            why = [bias for _, _, bias in at if isinstance(bias, str)]
            refuse(site.leaf, why[0] if why else _next(graph, readers, at[-1][0] if at else eqn))
            continue
        adds, value, (leaf, turn, start, chain) = first
        place = position[id(adds)]
        before = found[place].weights if place in found else ()
        sign = -1 if adds.name == "sub" else 1
        found[place] = Spot(leaf, turn, place, value, sign, start, chain, tuple(dict.fromkeys((*before, site.leaf))))
    return [found[place] for place in sorted(found)], {leaf: tuple(texts) for leaf, texts in reasons.items()}


def _next(graph: Graph, readers: Mapping[int, Sequence[FlatEqn]], eqn: FlatEqn) -> str:
    names = list(dict.fromkeys(reader.name for v in eqn.outputs for reader in readers.get(v, ())))
    more = f" in front of {', '.join(f'`{name}`' for name in names[:2])}" if names else ""
    return f"no bias is added to its result{more}"


class _Biases:
    """Says of a value whether it is a bias: a parameter, seen through changes of shape or a lookup, that nothing else reads."""

    def __init__(self, program: Program, graph: Graph, readers: Mapping[int, Sequence[FlatEqn]], quantized: set[int]):
        self.program, self.graph, self.readers, self.quantized = program, graph, readers, quantized
        self.made = {v: eqn for eqn in graph.eqns for v in eqn.outputs}
        self.where = {v: i for i, v in enumerate(graph.inputs[: len(program.leaves)])}
        self.outputs = {v for v in graph.outputs if not isinstance(v, Lit)}
        self.uses: dict[tuple[int, tuple[int, ...]], int] = {}
        for var in [*self.where, *graph.sliced]:
            if readers.get(var) and (element := self.element(var)) is not None:
                self.uses[element] = self.uses.get(element, 0) + len(readers[var])

    def element(self, var: int) -> tuple[int, tuple[int, ...]] | None:
        """The parameter, and which element of a stack, that a variable is."""
        turn: tuple[int, ...] = ()
        while var in self.graph.sliced:
            sliced = self.graph.sliced[var]
            if sliced.index is None or isinstance(sliced.parent, Lit):
                return None
            var, turn = sliced.parent, (sliced.index, *turn)
        return (self.where[var], turn) if var in self.where else None

    def of(self, atom: Any) -> tuple[int, tuple[int, ...], int, tuple[FlatEqn, ...]] | str | None:
        """(parameter, element, variable, equations from it); a reason if it is one but cannot be used; None if it is none."""
        chain: list[FlatEqn] = []
        alone = True
        while not isinstance(atom, Lit) and atom in self.made and self.made[atom].name in PASSED | {"gather"}:
            chain.append(self.made[atom])
            alone &= len(self.readers[atom]) == 1
            atom = chain[-1].inputs[0]
        if isinstance(atom, Lit) or (element := self.element(atom)) is None:
            return None
        leaf = self.program.leaves[element[0]]
        if not is_floating(leaf.dtype) or element[0] in self.quantized:
            return None
        whole = {(i, turn) for i, turn in self.uses if i == element[0]}
        shared = self.uses[element] != 1 or not alone or atom in self.outputs or self.graph.inputs[element[0]] in self.outputs
        if shared or any(len(turn) != len(element[1]) for _, turn in whole):
            return f"its bias {leaf.path} is also read elsewhere"
        return (*element, atom, tuple(reversed(chain)))


class _Walk:
    """Both programs on their way through the data. Lives for one call of `correct_bias`."""

    def __init__(
        self, batches: Sequence[tuple[Program, Sequence[Any]]], float_params: Sequence[Any], packed: Sequence[Any], which: set[int],
        products: Mapping[str, QProduct], memory: Live,
    ):  # fmt: skip
        self.program = batches[0][0]
        self.leaves, self.quantized = list(float_params), list(packed)
        self.products = products
        self.corrected: set[int] = set()
        self.compiled: dict[Hashable, Any] = {}
        cutters: dict[int, tuple[Cutter, list[Spot]]] = {}
        self.reasons: dict[int, tuple[str, ...]] = {}
        for program, _ in batches:
            if id(program) not in cutters:
                graph = flatten(program, unroll=True)
                found, self.reasons = spots(program, graph, which)
                cutter = Cutter(graph, len(program.leaves))
                for spot in found:
                    cutter.use([spot.value, *spot.others], spot.position)
                cutters[id(program)] = cutter, found
        self.spots = [cutters[id(program)][1] for program, _ in batches]
        if len({tuple((s.leaf, s.turn) for s in found) for found in self.spots}) > 1:
            raise ValueError("`calibration` holds batches whose shapes trace to programs with different biases; give batches of one shape")
        # For each batch the float program and the quantized one.
        self.sides = [[Batch(p, cutters[id(p)][0], inputs, memory) for p, inputs in batches] for _ in range(2)]

    def run(self) -> dict[str, tuple[str, ...]]:
        """Corrects every bias in turn; returns remarks for the report."""
        paths = [leaf.path for leaf in self.program.leaves]
        notes: dict[str, dict[str, None]] = {}
        moved: dict[int, list[np.ndarray]] = {}
        at = [0] * len(self.spots)
        for number, spot in enumerate(self.spots[0]):
            stops = [found[number].position for found in self.spots]
            both = zip(self.sides, (self.leaves, self.quantized), ({}, self.products), strict=True)
            means = [self.mean(*side, at, stops, number) for side in both]
            at = stops
            shift = np.where(np.isnan(means[0]) | np.isnan(means[1]), 0, means[1] - means[0])
            if np.isnan(means).any():
                notes.setdefault(paths[spot.leaf], {})[UNSEEN] = None
            self.move(spot, shift)
            for found, batch in zip(self.spots, self.sides[1], strict=True):
                _take_up(batch, found[number], self.quantized[spot.leaf])
            old, new = (np.asarray(leaves[spot.leaf], np.float64)[spot.turn] for leaves in (self.leaves, self.quantized))
            moved.setdefault(spot.leaf, []).append(new - old)
            for weight in spot.weights:
                notes.setdefault(paths[weight], {})[f"{MEANS}{paths[spot.leaf]}"] = None
        for leaf, parts in moved.items():
            size = np.sqrt(np.mean(np.square(np.concatenate([p.ravel() for p in parts]))))
            notes.setdefault(paths[leaf], {})[f"{MOVED}{size:.3g} root mean square"] = None
        for weight, texts in self.reasons.items():
            notes.setdefault(paths[weight], {}).update(dict.fromkeys(f"{NONE}{text}" for text in texts))
        return {path: tuple(texts) for path, texts in notes.items()}

    def move(self, spot: Spot, shift: np.ndarray) -> None:
        old = self.quantized[spot.leaf]
        new = np.array(old, np.float64)
        new[spot.turn] -= spot.sign * shift
        self.quantized[spot.leaf] = jnp.asarray(new.astype(old.dtype))
        self.corrected.add(spot.leaf)

    def mean(
        self, side: Sequence[Batch], leaves: Sequence[Any], products: Mapping[str, QProduct],
        starts: Sequence[int], stops: Sequence[int], number: int,
    ) -> np.ndarray:  # fmt: skip
        """Runs one program to the next bias; returns the mean of what it is added to, in the shape of the bias, NaN without data."""
        total = count = np.zeros(())
        for which, (batch, start, stop) in enumerate(zip(side, starts, stops, strict=True)):
            segment = batch.cutter.segment(start, stop)
            values = [_value(batch, leaves, var) for var in segment.inputs]
            batch.advance(segment, self.execute(segment, batch, products)(values), stop)
            spot = self.spots[which][number]
            shape = np.shape(leaves[spot.leaf])[len(spot.turn) :]
            operands = [batch.value(spot.value), [batch.value(v) for v in spot.others]]
            summed, rows = (np.asarray(x, np.float64) for x in self.sums(spot, shape)(*operands))
            if not np.isfinite(summed).all():
                paths = ", ".join(self.program.leaves[w].path for w in spot.weights)
                raise ValueError(f"`calibration` batch {which} gives the result of {paths} NaN or infinity; look at that batch")
            total, count = total + summed, count + rows
        return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)

    def execute(self, segment: Segment, batch: Batch, products: Mapping[str, QProduct]) -> Callable[[list[Any]], list[Any]]:
        sites = {site.key: site for site in batch.program.sites}
        named = named_products(batch.program, products)
        inside = [tuple(k for k in sorted(named) if e.eqn is not None and k[: len(e.key)] == e.key) for e in segment.eqns]
        graph, each = batch.cutter.graph, list(zip(segment.eqns, inside, strict=True))
        states = [[_turn(products[named[key].name], named[key], e, graph) for key in keys] for e, keys in each]
        # Segments that are equal stand in other places: what is told apart is where in an equation the products are.
        places = tuple(tuple(key[len(e.key) :] for key in keys) for e, keys in each)
        key = (segment.key, tuple((e.key in sites, e.key in sites and sites[e.key].custom_rule) for e in segment.eqns), places)
        if key not in self.compiled:
            self.compiled[key] = jax.jit(functools.partial(_execute, segment, sites, named, inside))
        return functools.partial(self.compiled[key], states)

    def sums(self, spot: Spot, shape: tuple[int, ...]) -> Callable[..., tuple[jax.Array, jax.Array]]:
        inner = {v: i for i, v in enumerate((spot.start, *spot.others, *(v for e in spot.chain for v in e.outputs)))}

        def ref(atom: Any) -> Hashable:
            return canonical(np.asarray(atom.value)) if isinstance(atom, Lit) else inner[atom]

        wiring = tuple(tuple(map(ref, e.inputs)) for e in spot.chain)
        key = ("sums", shape, tuple((e.name, canonical(e.eqn.params)) for e in spot.chain), wiring)
        if key not in self.compiled:
            self.compiled[key] = jax.jit(functools.partial(_sums, spot, shape))
        return self.compiled[key]


def _rule(site: Site, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
    return (plain_rule if site.custom_rule else packed_rule)(site, eqn, operands, state)


def _turn(how: QProduct, product: Product, eqn: FlatEqn, graph: Graph) -> QProduct:
    """A product's static scales in the turns of the loops that were laid out around an equation."""
    loops = [eqn.key[: i + 1] for i in range(len(eqn.key)) if eqn.key[: i + 1] in graph.unrolled]
    steps = dict(zip(loops, eqn.steps, strict=True))
    turn = tuple(steps[key] for key in product.scans if key in steps)
    return jax.tree.map(lambda a: a[turn], how)


def _execute(
    segment: Segment, sites: Mapping[Any, Site], products: Mapping[Key, Product], inside: Sequence[tuple[Key, ...]],
    states: list[list[QProduct]], values: list[Any],
) -> list[Any]:  # fmt: skip
    """Computes a segment's outputs with packed weights, and with products of activations on integers, as `quantized` does."""
    interpreter = Interpreter(sites, rule=_rule, products=products, product_rule=product_rule)
    env = {v: Packed(x) if isinstance(x, QTensor) else x for v, x in zip(segment.inputs, values, strict=True)}
    for eqn, keys, state in zip(segment.eqns, inside, states, strict=True):
        operands = [a.value if isinstance(a, Lit) else env[a] for a in eqn.inputs]
        if eqn.name == STACK:
            outs = [jnp.stack(list(map(materialize, operands)))]
        else:
            outs = interpreter.equation(eqn.eqn, operands, eqn.key, dict(zip(keys, state, strict=True)))
        env.update(zip(eqn.outputs, outs, strict=True))
    return [materialize(env[v]) for v in segment.outputs]


def _sums(spot: Spot, shape: tuple[int, ...], value: jax.Array, others: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The sum of a value over the positions that share an element of the bias, and their number, both as a share of the average number."""

    def spread(bias: jax.Array) -> jax.Array:
        env: dict[Any, Any] = {spot.start: bias, **dict(zip(spot.others, others, strict=True))}
        for eqn in spot.chain:
            operands = [a.value if isinstance(a, Lit) else env[a] for a in eqn.inputs]
            outs = operands[:1] if eqn.name in CASTS else compat.bind(eqn.eqn, operands)
            env.update(zip(eqn.outputs, outs, strict=True))
        return jnp.broadcast_to(env[spot.chain[-1].outputs[0]] if spot.chain else bias, value.shape)

    _, back = jax.vjp(spread, jnp.zeros(shape, jnp.float32))
    share = max(math.prod(shape), 1) / max(value.size, 1)
    return back(value.astype(jnp.float32) * share)[0], back(jnp.full(value.shape, share, jnp.float32))[0]


def _take_up(batch: Batch, spot: Spot, bias: Any) -> None:
    """Puts the new bias in place of what was made of the old one already: rows that were looked up."""
    if not any(v in batch.live for eqn in spot.chain for v in eqn.outputs):
        return
    env: dict[Any, Any] = {spot.start: bias[spot.turn], **{v: batch.value(v) for v in spot.others}}
    for eqn in spot.chain:
        operands = [a.value if isinstance(a, Lit) else env[a] for a in eqn.inputs]
        env.update(zip(eqn.outputs, compat.bind(eqn.eqn, operands), strict=True))
    for var in [v for eqn in spot.chain for v in eqn.outputs if v in batch.live]:
        batch.memory.drop(batch.live[var])
        batch.live[var] = env[var]
        batch.memory.take_up(env[var])


def _value(batch: Batch, leaves: Sequence[Any], var: int) -> Any:
    """The value of a segment's input: a parameter, a layer of one, packed where it can stay so, or what is alive."""
    graph = batch.cutter.graph
    if not batch.cutter.is_parameter(var):
        return batch.value(var)
    where = {v: i for i, v in enumerate(graph.inputs[: len(batch.program.leaves)])}
    if var in where:
        return leaves[where[var]]
    if var in batch.cutter.views:
        eqn = batch.cutter.views[var]
        operands = [a.value if isinstance(a, Lit) else materialize(_value(batch, leaves, a)) for a in eqn.inputs]
        return compat.bind(eqn.eqn, operands)[eqn.outputs.index(var)]
    sliced = graph.sliced[var]
    whole = _value(batch, leaves, sliced.parent)
    if isinstance(whole, QTensor) and not can_scan(Packed(whole)):
        whole = whole.dequantize()
    return jax.tree.map(lambda x: x[sliced.index], whole)
