"""Blocks: stretches of a program that few values enter and leave, found by data flow; what is tuned together is tuned on one."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from qjax.program import Key, compat
from qjax.program.flatten import STACK, FlatEqn, Lit, Rule
from qjax.program.segments import Cutter

MOST = 16  # weights of a block: where more lie between two cuts, there are more cuts, where the fewest values cross


class Block(NamedTuple):
    """A stretch of a flattened program.

    Attributes:
      members: positions of the equations whose weights are tuned together, ascending.
      start: position of its first equation.
      stop: position after its last.
      first: positions of its equations that depend on no parameter. What layers share (a mask, tables) stands in the block of the first
        layer only: computed apart, that block is the same program as the others.
      outputs: variables that it makes and that say how good it is: what is read behind it, else what the program returns.
      from_parameters: the program's variables that depend on a parameter. The others (masks, tables, the data) may be infinite.
      from_data: those that depend on the data. The others (masks, tables) are the same for all batches of one shape.
      rules: calls within it that have a derivative of their own, through which a gradient passes: applied whole.
    """

    members: tuple[int, ...]
    start: int
    stop: int
    first: tuple[int, ...]
    outputs: tuple[int, ...]
    from_parameters: Collection[int]
    from_data: Collection[int]
    rules: tuple[Rule, ...]


class Flow:
    """Which values cross where, in one flattened program."""

    def __init__(self, cutter: Cutter, sites: Collection[Key]):
        self.cutter, self.graph = cutter, cutter.graph
        eqns = self.graph.eqns
        self.sites = [p for p, eqn in enumerate(eqns) if _is_site(eqn, sites)]
        self.reach = self._reach(set(self.sites))
        self.from_parameters = self.dependent(self.graph.inputs[: len(cutter.params)])
        self.from_data = self.dependent(self.graph.inputs[len(cutter.params) :])
        self.crossing = self._crossing()
        # Outer calls stand behind those within them. What holds no weight is never cut.
        rules = self.graph.rules
        self.rules = [r for i, r in enumerate(rules) if not any(o.start <= r.start and r.stop <= o.stop for o in rules[i + 1 :])]
        self.uncut = {p for rule in self.rules if not self.sites_in(rule) for p in range(rule.start + 1, rule.stop)}

    def sites_in(self, rule: Rule) -> list[int]:
        return [p for p in self.sites if rule.start <= p < rule.stop]

    def _reach(self, sites: set[int]) -> dict[int, int]:
        """For each variable the last equation that reads it on the way to a site or a result; what only collects turns reads nothing."""
        reach: dict[int, int] = {}

        def read(atom: Any, position: int) -> None:
            if isinstance(atom, Lit):
                return
            reach[atom] = max(position, reach.get(atom, -1))
            if atom in self.graph.sliced:
                read(self.graph.sliced[atom].parent, position)

        results = {atom for atom in self.graph.outputs if not isinstance(atom, Lit)}
        for position in reversed(range(len(self.graph.eqns))):
            eqn = self.graph.eqns[position]
            returned = eqn.name != STACK and any(v in results for v in eqn.outputs)
            if position in sites or returned or any(v in reach for v in eqn.outputs):
                for atom in eqn.inputs:
                    read(atom, position)
        return reach

    def dependent(self, roots: Collection[int]) -> set[int]:
        """The variables that depend on some, themselves included."""
        found = set(roots)

        def depends(atom: Any) -> bool:
            if isinstance(atom, Lit):
                return False
            return atom in found or (atom in self.graph.sliced and depends(self.graph.sliced[atom].parent))

        for eqn in self.graph.eqns:
            if any(map(depends, eqn.inputs)):
                found.update(eqn.outputs)
        return found

    def _crossing(self) -> list[int]:
        """For each position how many values cross it that depend on the data and on a parameter and that are read behind it.

        Masks and tables of positions depend on no parameter, and what depends on parameters alone is the same for every batch: they cross
        freely.
        """
        counted = self.from_parameters & self.from_data
        steps = [0] * (len(self.graph.eqns) + 2)
        for position, eqn in enumerate(self.graph.eqns):
            for v in eqn.outputs:
                if v in counted and self.reach.get(v, -1) > position:
                    steps[position + 1] += 1
                    steps[self.reach[v] + 1] -= 1
        total, crossing = 0, []
        for step in steps[:-1]:
            total += step
            crossing.append(total)
        return crossing

    def cut(self, after: int, upto: int) -> tuple[int, int]:
        """(values that cross, position) of the last best cut behind the equation `after` and not behind `upto`; none is as good as one."""
        places = (p for p in range(after + 1, upto + 1) if p not in self.uncut)
        return min(((max(self.crossing[p], 1), p) for p in places), key=lambda cut: (cut[0], -cut[1]))

    def free(self, start: int, stop: int) -> tuple[int, ...]:
        """The equations of a stretch that depend on no parameter."""
        eqns = self.graph.eqns
        return tuple(p for p in range(start, stop) if not any(v in self.from_parameters for v in eqns[p].outputs))

    def outputs(self, members: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
        """What a stretch makes of its members that is read behind it; if there is nothing, what of it the program returns."""
        eqns = self.graph.eqns[start:stop]
        touched = self.touched(members)
        made = [v for eqn in eqns for v in eqn.outputs if v in touched and jnp.issubdtype(self.graph.avals[v].dtype, jnp.floating)]
        later = tuple(v for v in made if self.reach.get(v, -1) >= stop)
        return later or tuple(v for v in made if self.cutter.last_use.get(v, -1) >= stop)


    def touched(self, members: Sequence[int]) -> set[int]:
        """The variables that depend on what some equations make."""
        return self.dependent([v for p in members for v in self.graph.eqns[p].outputs])

    def rules_within(self, members: Sequence[int], start: int, stop: int) -> tuple[Rule, ...]:
        """The calls of a stretch that have a derivative of their own and read what depends on some equations."""
        touched = self.touched(members)
        near = (r for r in self.rules if start <= r.start < stop or r.start < start < r.stop)
        return tuple(r for r in near if any(not isinstance(a, Lit) and a in touched for a in r.inputs))


def _is_site(eqn: FlatEqn, sites: Collection[Key]) -> bool:
    return (eqn.eqn is not None and eqn.key in sites) or bool(eqn.inside)


def find_blocks(flow: Flow, members: Sequence[int], span: int) -> list[Block]:
    """Cuts a program where one value crosses between weights that are to be tuned.

    Between two weights that follow each other a cut goes where the fewest values cross, and the last such place: behind the function
    that is not linear, and not in front of it. It holds where that is one value: in a residual network, between its branches. A block
    of more than `MOST` weights is cut where the fewest cross within it (layers that all read one more value).

    Args:
      flow: of the program.
      members: positions of the equations whose weights are to be tuned, ascending.
      span: how many neighbours become one block: of a transformer, whose halves (attention, feed-forward) are joined by one value each,
        two are a layer.

    Returns:
      The blocks, in order; each member is in one.
    """
    members = list(dict.fromkeys(members))
    if not members:
        return []
    before = max([p for p in flow.sites if p < members[0]], default=-1)
    behind = min([p for p in flow.sites if p > members[-1]], default=len(flow.graph.eqns))
    cuts = [flow.cut(a, b) for a, b in itertools.pairwise(members)]
    pieces = _split(list(range(len(members))), cuts, 1)
    pieces = [[i for piece in pieces[at : at + span] for i in piece] for at in range(0, len(pieces), span)]
    blocks = []
    for piece in pieces:
        first, last = piece[0], piece[-1]
        start = cuts[first - 1][1] if first else flow.cut(before, members[0])[1]
        stop = cuts[last][1] if last < len(cuts) else flow.cut(members[-1], behind)[1]
        mine = tuple(members[i] for i in piece)
        outputs, rules = flow.outputs(mine, start, stop), flow.rules_within(mine, start, stop)
        blocks.append(Block(mine, start, stop, flow.free(start, stop), outputs, flow.from_parameters, flow.from_data, rules))
    return blocks


def _split(piece: list[int], cuts: Sequence[tuple[int, int]], fewest: int) -> list[list[int]]:
    """Splits consecutive members where `fewest` values cross between two of them, and what is too long at its own fewest."""
    pieces: list[list[int]] = [[]]
    for i in piece:
        pieces[-1].append(i)
        if i != piece[-1] and cuts[i][0] == fewest:
            pieces.append([])
    return [small for part in pieces for small in (_split(part, cuts, _fewest(part, cuts)) if len(part) > MOST else [part])]


def _fewest(piece: list[int], cuts: Sequence[tuple[int, int]]) -> int:
    return min(cuts[i][0] for i in piece[:-1])


def why_not_tuned(flow: Flow, block: Block) -> str:
    """Says why no gradient passes through a block; "" if one does."""
    if not block.outputs:
        return "nothing that the program returns depends on it"
    touched = flow.touched(block.members)
    if any(set(flow.sites_in(rule)) & set(block.members) for rule in flow.rules):
        return "it stands in a call with a derivative of its own (custom_vjp), which would be lost"
    for rule in block.rules:
        if why := _why_not_whole(flow, block, rule, touched):
            return f"its block holds a call with a derivative of its own (custom_vjp) that would be lost: {why}"
    whole = {p for rule in block.rules for p in range(rule.start, rule.stop)}
    for position, eqn in enumerate(flow.graph.eqns[block.start : block.stop], block.start):
        if position in whole or eqn.eqn is None or not any(not isinstance(a, Lit) and a in touched for a in eqn.inputs):
            continue
        name = _no_gradient(eqn.eqn)
        if name:
            return f"its block holds a `{name}`, through which no gradient passes"
    return ""


def _why_not_whole(flow: Flow, block: Block, rule: Rule, touched: set[int]) -> str:
    """Says why a call that was laid flat cannot be applied whole within a block; "" if it can."""
    if flow.sites_in(rule):
        return "a weight stands in it"
    eqns = flow.graph.eqns
    made = {v for r in flow.rules for eqn in eqns[r.start : r.stop] for v in eqn.outputs}
    outputs = [v for v in rule.outputs if not isinstance(v, Lit) and v in touched]
    if any(v not in made and jnp.issubdtype(flow.graph.avals[v].dtype, jnp.floating) for v in outputs):
        return "it hands on a value that others read, too"
    before = {v for eqn in eqns[: block.start] for v in eqn.outputs}
    if any(not isinstance(a, Lit) and a in before and flow.cutter.last_use.get(a, -1) < block.start for a in rule.inputs):
        return "it reads a value that its result does not depend on"
    return ""


NO_GRADIENT = frozenset({"while", "pure_callback", "io_callback", "pallas_call", "ffi_call"})


def _no_gradient(eqn: Any) -> str:
    name = eqn.primitive.name
    if name in NO_GRADIENT:
        return name
    inner = (e for _, program in compat.subprograms(eqn) for e in compat.parts(program)[0].eqns)
    return next((found for e in inner if (found := _no_gradient(e))), "")
