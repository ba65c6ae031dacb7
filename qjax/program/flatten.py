"""The flattened graph: one list of equations, with calls inlined and loops over layers unrolled or opened once.

The evaluator (`interpret`) keeps a program's structure; this graph gives it up, so that questions of data flow and cuts into
segments need not know about nesting. Equations that are the same computation on the same values are one (so the
three casts of a norm's output in front of q, k and v are one value).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from qjax.program import compat
from qjax.program.passing import passed_on
from qjax.program.primitives import BARRIER
from qjax.program.sites import Key
from qjax.program.trace import Program

# No primitives: jax has a `stack` of its own.
STACK = "(turns stacked)"  # joins what the steps of an unrolled loop gave
OPEN = "(loop opened)"  # the result of a loop or branch whose body was opened once


@dataclasses.dataclass(frozen=True)
class Lit:
    """A literal operand."""

    value: Any
    aval: Any


@dataclasses.dataclass(frozen=True)
class Sliced:
    """Where a variable is element `index` of another along its first axis; index is None where the loop was opened once."""

    parent: Any
    index: int | None


@dataclasses.dataclass(frozen=True)
class FlatEqn:
    """One equation over variable numbers.

    Attributes:
      name: the primitive's name, or `STACK`, or `OPEN`.
      eqn: the jaxpr's equation; None for `STACK` and `OPEN`.
      inputs: variable numbers or `Lit`s.
      outputs: variable numbers.
      key: the equation's key in the program.
      steps: which turn of each unrolled loop around it, outermost first.
      inside: keys of the sites inside it, if it was left as one (a loop over time, a branch).
    """

    name: str
    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]
    key: Key
    steps: tuple[int, ...]
    inside: tuple[Key, ...] = ()


@dataclasses.dataclass(frozen=True)
class Loop:
    """What runs along the turns of a loop, or through the branches of a choice, that was opened once.

    Attributes:
      kind: the primitive, `scan`, `while`, `cond` or `shard_map`.
      passed: for each value that is carried: what it is before the first turn, within a turn, after a turn, and in the end; for each
        result of a `cond` what every branch gives, and the result. Variable numbers or `Lit`s.
      stacked: (value of one turn, all turns stacked along a new first axis).
    """

    kind: str
    passed: tuple[tuple[Any, ...], ...]
    stacked: tuple[tuple[Any, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Rule:
    """A call with a derivative of its own that was laid flat: where its equations are, and how to apply it whole.

    Attributes:
      eqn: the call.
      inputs: what it reads, variable numbers or `Lit`s.
      outputs: what it gives; one that it hands on, or that is computed elsewhere too, is not made by its equations.
      start: position of its first equation.
      stop: position after its last.
    """

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    start: int
    stop: int


@dataclasses.dataclass
class Graph:
    """A flattened program. Built once by `flatten`, then only read.

    Attributes:
      eqns: the equations in an order that respects data flow.
      inputs: variable numbers of the program's inputs, parameters first.
      outputs: variable numbers or literals of its results.
      avals: shape and dtype of every variable.
      consts: values of variables that are constants.
      sliced: variables that are one element of another.
      carries: variables that a loop opened once carries in.
      unrolled: keys of the scans that were laid out turn by turn.
      entries: variables that loops opened once start from; no equation reads them.
      loops: what is handed on inside the loops and branches that were opened once.
      rules: calls with a derivative of their own, inner ones first.
    """

    eqns: list[FlatEqn]
    inputs: list[int]
    outputs: list[Any]
    avals: list[Any]
    consts: dict[int, Any]
    sliced: dict[int, Sliced]
    carries: set[int]
    unrolled: set[Key]
    entries: set[int]
    loops: list[Loop]
    rules: list[Rule] = dataclasses.field(default_factory=list)


def flatten(program: Program, unroll: bool) -> Graph:
    """Flattens a traced program.

    Args:
      program: from `trace`.
      unroll: True lays every turn of a scan over stacked parameters out (for stepping through layers); loops over time and
        branches stay whole. False opens each loop and branch once (for questions of data flow).

    Returns:
      The graph.
    """
    builder = _Builder(program, unroll)
    body, _ = compat.parts(program.jaxpr)
    builder.graph.inputs.extend(builder.new(v.aval) for v in body.invars)
    builder.graph.outputs.extend(builder.program(program.jaxpr, builder.graph.inputs, (), ()))
    return builder.graph


def canonical(value: Any) -> Hashable:
    """Returns a hashable stand-in for a primitive's parameter that is equal only for equal computations."""
    if isinstance(value, (jax.Array, np.ndarray)):
        array = np.asarray(value)
        return ("array", array.shape, str(array.dtype), array.tobytes())
    if isinstance(value, dict):
        return ("dict", tuple((str(k), canonical(v)) for k, v in sorted(value.items(), key=lambda item: str(item[0]))))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, tuple(canonical(v) for v in value))
    if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
        return canonical_jaxpr(value)
    return (type(value), value) if isinstance(value, Hashable) else ("id", id(value))


def canonical_jaxpr(jaxpr: Any) -> Hashable:
    """A program with its variables renumbered; two programs are equal if they compute the same."""
    body, consts = compat.parts(jaxpr)
    numbers: dict[Any, int] = {}

    def ref(atom: Any) -> Hashable:
        if isinstance(atom, compat.Literal):
            return ("lit", canonical(np.asarray(atom.val)), str(atom.aval))
        return numbers.setdefault(atom, len(numbers))

    inputs = tuple((ref(v), str(v.aval)) for v in (*body.constvars, *body.invars))
    eqns = tuple(
        (
            e.primitive.name,
            canonical(e.params),
            tuple(ref(a) for a in e.invars),
            tuple((ref(v), str(v.aval)) for v in e.outvars),
        )
        for e in body.eqns
    )
    return ("jaxpr", canonical(list(consts)), inputs, eqns, tuple(ref(a) for a in body.outvars))


class _Builder:
    def __init__(self, program: Program, unroll: bool):
        self.unroll = unroll
        self.graph = Graph([], [], [], [], {}, {}, set(), set(), set(), [])
        self.known: dict[Hashable, tuple[int, ...]] = {}
        self.sites = {site.key: site for site in program.sites}
        self.stepped = {scan for site in program.sites if not site.opaque for scan in site.scans}

    def new(self, aval: Any) -> int:
        self.graph.avals.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return len(self.graph.avals) - 1

    def emit(self, name: str, eqn: Any, inputs: Sequence[Any], avals: Sequence[Any], key: Key, steps: Any, inside: Any = ()) -> list[int]:
        outputs = tuple(self.new(aval) for aval in avals)
        self.graph.eqns.append(FlatEqn(name, eqn, tuple(inputs), outputs, key, steps, tuple(inside)))
        return list(outputs)

    def program(self, jaxpr: Any, inputs: Sequence[Any], prefix: Key, steps: tuple[int, ...]) -> list[Any]:
        body, consts = compat.parts(jaxpr)
        env: dict[Any, Any] = {}
        for var, value in zip(body.constvars, consts, strict=True):
            env[var] = self.new(var.aval)
            self.graph.consts[env[var]] = value
        env.update(zip(body.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            return Lit(atom.val, atom.aval) if isinstance(atom, compat.Literal) else env[atom]

        for index, eqn in enumerate(body.eqns):
            outs = self.equation(eqn, [read(a) for a in eqn.invars], (*prefix, index), steps)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in body.outvars]

    def equation(self, eqn: Any, inputs: list[Any], key: Key, steps: tuple[int, ...]) -> list[Any]:
        name = eqn.primitive.name
        if name in compat.INLINE or name in compat.REMAT or name in compat.CUSTOM_RULES:
            start = len(self.graph.eqns)
            outs = self.program(eqn.params[compat.CALLS[name]], inputs, (*key, 0), steps)
            if name in compat.CUSTOM_RULES:
                self.graph.rules.append(Rule(eqn, tuple(inputs), tuple(outs), start, len(self.graph.eqns)))
            return outs
        if name == BARRIER:
            return inputs
        inside = [k for k in self.sites if k[: len(key)] == key and k != key]
        if name == "scan" and self.unroll and key in self.stepped and eqn.params["length"]:
            return self.steps_of(eqn, inputs, key, steps)
        if not self.unroll and inside:
            return self.opened(eqn, inputs, key, steps)
        avals = [v.aval for v in eqn.outvars]
        if key in self.sites or compat.subprograms(eqn) or eqn.effects:
            return self.emit(name, eqn, inputs, avals, key, steps, inside)
        same = (name, canonical(eqn.params), tuple(_input_key(i) for i in inputs), tuple(map(str, avals)))
        if same not in self.known:
            self.known[same] = tuple(self.emit(name, eqn, inputs, avals, key, steps))
        return list(self.known[same])

    def steps_of(self, eqn: Any, inputs: list[Any], key: Key, steps: tuple[int, ...]) -> list[Any]:
        """Lays out every turn of a scan."""
        n_consts, n_carry = compat.scan_counts(eqn)
        consts, carry, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
        body, _ = compat.parts(eqn.params["jaxpr"])
        length = eqn.params["length"]
        self.graph.unrolled.add(key)
        ys: list[list[Any]] = []
        for index in range(length)[:: -1 if eqn.params["reverse"] else 1]:
            taken = [self.slice(x, v.aval, index) for x, v in zip(xs, body.invars[n_consts + n_carry :], strict=True)]
            outs = self.program(eqn.params["jaxpr"], consts + carry + taken, (*key, 0), (*steps, index))
            carry = outs[:n_carry]
            ys.append(outs[n_carry:])
        if eqn.params["reverse"]:
            ys.reverse()
        stacked, passed = [], passed_on(eqn)
        for i, var in enumerate(eqn.outvars[n_carry:]):
            whole = inputs[passed[n_carry + i]] if n_carry + i in passed else None
            stacked += [whole] if whole is not None else self.emit(STACK, None, [y[i] for y in ys], [var.aval], key, steps)
        return carry + stacked

    def slice(self, parent: Any, aval: Any, index: int | None) -> int:
        var = self.new(aval)
        self.graph.sliced[var] = Sliced(parent, index)
        return var

    def opened(self, eqn: Any, inputs: list[Any], key: Key, steps: tuple[int, ...]) -> list[Any]:
        """Opens a loop or branch once; what comes out of it is a new value of unknown origin."""
        name, first, carry, handed = eqn.primitive.name, [], [], {}
        if name == "scan":
            n_consts, n_carry = compat.scan_counts(eqn)
            handed = {i: at for i, at in passed_on(eqn).items() if i >= n_carry}
            body, _ = compat.parts(eqn.params["jaxpr"])
            first = inputs[n_consts : n_consts + n_carry]
            carry = [self.carried(v.aval) for v in body.invars[n_consts : n_consts + n_carry]]
            inner = inputs[:n_consts] + carry
            rest = zip(inputs[n_consts + n_carry :], body.invars[n_consts + n_carry :], strict=True)
            inner += [self.slice(x, v.aval, None) for x, v in rest]
            outs = self.program(eqn.params["jaxpr"], inner, (*key, 0), steps)
        elif name == "while":
            n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            first = inputs[n_cond + n_body :]
            carry = [self.carried(v.aval) for v in eqn.outvars]
            self.program(eqn.params["cond_jaxpr"], inputs[:n_cond] + carry, (*key, 0), steps)
            outs = self.program(eqn.params["body_jaxpr"], inputs[n_cond : n_cond + n_body] + carry, (*key, 1), steps)
        elif name == "cond":
            branches = [self.program(b, inputs[1:], key + suffix, steps) for suffix, b in compat.subprograms(eqn)]
            outs = [out for branch in branches for out in branch]
        else:
            outs = self.program(eqn.params[compat.CALLS[name]], inputs, (*key, 0), steps)
        self.graph.entries.update(a for a in first if not isinstance(a, Lit))
        made = [i for i in range(len(eqn.outvars)) if i not in handed]
        inner = outs if name == "cond" else [outs[i] for i in made]
        fresh = dict(zip(made, self.emit(OPEN, None, inner, [eqn.outvars[i].aval for i in made], key, steps), strict=True))
        results = [inputs[handed[i]] if i in handed else fresh[i] for i in range(len(eqn.outvars))]
        count = len(results)
        passed = zip(first, carry, outs, results, strict=False)
        if name == "cond":
            passed = zip(*(outs[i : i + count] for i in range(0, len(outs), count)), results, strict=True) if count else ()
        stacked = [(outs[i], fresh[i]) for i in made[len(carry) :]] if name == "scan" else []
        self.graph.loops.append(Loop(name, tuple(passed), tuple(stacked)))
        return results

    def carried(self, aval: Any) -> int:
        var = self.new(aval)
        self.graph.carries.add(var)
        return var


def _input_key(atom: Any) -> Hashable:
    return ("lit", canonical(np.asarray(atom.value)), str(atom.aval)) if isinstance(atom, Lit) else atom
