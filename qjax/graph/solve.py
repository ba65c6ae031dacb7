"""Finds labels that satisfy every relation of a program at once, starting from the labels that are wanted.

Before any search, what can never be scaled (inputs, outputs, operands of non-homogeneous functions, and all that these force) is found
once for the program. The rest is propagation; where a product leaves open which factor takes the scale, each is tried.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.labels import Conflict, Label, Ties, Window, constant, nonzero, same
from qjax.graph.relations import Equal, Fixed, Product, Relation, Term, atoms_of, free_values, is_floating
from qjax.graph.rules import relations
from qjax.program import Program
from qjax.program.flatten import OPEN, Graph, Lit, flatten

BRANCHES = 400  # alternatives tried before a search gives up
SOLUTIONS = 24  # and found


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """A program as relations between labels. Built once, used for every group of sites.

    Attributes:
      program: the traced program.
      graph: the same, flattened, loops opened once.
      relations: what its equations demand.
      readers: for each value the positions of the relations it is in.
      fixed: the values that can never be scaled, each with the reason.
    """

    program: Program
    graph: Graph
    relations: Sequence[Relation]
    readers: Mapping[int, Sequence[int]]
    fixed: Mapping[int, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """Labels that satisfy the relations.

    Attributes:
      labels: of every scaled value.
      representative: for each channel the one whose scale it has.
      relations: positions of the relations that a scaled value is in.
    """

    labels: Mapping[int, Label]
    representative: np.ndarray
    relations: tuple[int, ...]


def build(program: Program) -> System:
    """Writes a program as relations between labels.

    Args:
      program: from `trace`.

    Returns:
      A `System`.
    """
    graph = flatten(program, unroll=False)
    found = relations(graph)
    readers = index_readers(found)
    return System(program, graph, found, readers, _never_scaled(_roots(program, graph, found), found, readers))


def index_readers(found: Sequence[Relation]) -> dict[int, list[int]]:
    """For each value the positions of the relations it is in."""
    readers: dict[int, list[int]] = collections.defaultdict(list)
    for position, relation in enumerate(found):
        for atom in {a for a in atoms_of(relation) if not isinstance(a, Lit)}:
            readers[atom].append(position)
    return readers


def _roots(program: Program, graph: Graph, found: Sequence[Relation]) -> dict[int, str]:
    """Values that may not be scaled for what they are."""
    fixed: dict[int, str] = {}

    def fix(atoms: Sequence[Any], reason: str) -> None:
        fixed.update({a: reason for a in atoms if not isinstance(a, Lit) and a not in fixed})

    fix(graph.inputs[len(program.leaves) :], "an input of the program")
    fix(graph.outputs, "an output of the program")
    fix(sorted({*graph.carries, *graph.entries}), "a value that a loop carries")
    for relation in found:
        if isinstance(relation, Fixed):
            loop = relation.name == OPEN
            fix(relation.atoms, "what a loop or branch gives" if loop else f"`{relation.name}`, which passes no scale on")
    fix([v for v, aval in enumerate(graph.avals) if not is_floating(aval.dtype)], "a value that is no real number")
    fix([*graph.consts, *free_values(graph)], "a constant")
    return fixed


def _never_scaled(roots: Mapping[int, str], found: Sequence[Relation], readers: Mapping[int, Sequence[int]]) -> dict[int, str]:
    """Closes the roots under the relations: what equals a fixed value is fixed, and so is the third of a product with two."""
    fixed = dict(roots)
    queue = collections.deque(range(len(found)))
    queued = [True] * len(found)
    while queue:
        position = queue.popleft()
        queued[position] = False
        for var, reason in _implied(found[position], fixed).items():
            fixed[var] = reason
            for reader in readers[var]:
                if not queued[reader]:
                    queued[reader] = True
                    queue.append(reader)
    return fixed


def _implied(relation: Relation, fixed: Mapping[int, str]) -> dict[int, str]:
    if isinstance(relation, Fixed):
        return {}
    still = [isinstance(t.atom, Lit) or t.atom in fixed for t in relation.terms]
    if isinstance(relation, Product):
        enough = sum(still) == 2
        reasons = [fixed[t.atom] for t in relation.terms if not isinstance(t.atom, Lit) and t.atom in fixed]
        return {t.atom: reasons[0] for t, s in zip(relation.terms, still, strict=True) if enough and not s and reasons}
    if not any(still) or all(still):
        return {}
    source = next(t.atom for t, s in zip(relation.terms, still, strict=True) if s)
    reason = f"`{relation.name}` with the constant {np.ravel(source.value)[0]:g}" if isinstance(source, Lit) else fixed[source]
    # A value of which the relation sees a part only may still be scaled elsewhere.
    partial = [any(isinstance(step, Window) for step in t.steps) for t in relation.terms]
    return {t.atom: reason for t, s, p in zip(relation.terms, still, partial, strict=True) if not s and not p}


class _State:
    """The labels of one branch of a search; changed in place by it and copied where it forks."""

    def __init__(self, system: System, kept: Collection[int], labels: dict[int, Label], ties: Ties):
        self.system, self.kept, self.labels, self.ties = system, kept, labels, ties
        self.queue: collections.deque[int] = collections.deque()
        self.pending: dict[int, None] = {}
        self.closed = False  # once closed, what is not labelled is not scaled

    def fork(self) -> _State:
        new = _State(self.system, self.kept, dict(self.labels), self.ties.copy())
        new.pending = dict(self.pending)
        return new

    def label(self, atom: Any) -> Label:
        ndim = np.ndim(atom.value) if isinstance(atom, Lit) else len(self.system.graph.avals[atom].shape)
        if isinstance(atom, Lit) or atom in self.system.fixed or atom in self.kept:
            return constant(ndim, 0.0)
        return self.labels.get(atom, constant(ndim, 0.0 if self.closed else np.nan))

    def refusal(self, atom: Any) -> str | None:
        """Why a value cannot be scaled, if it never can."""
        if isinstance(atom, Lit):
            return None
        if atom in self.kept:
            return "the scale would reach a parameter that is to be kept"
        return f"the scale would reach {self.system.fixed[atom]}" if atom in self.system.fixed else None

    def is_scaled(self, atom: Any) -> bool:
        return not isinstance(atom, Lit) and atom in self.labels and bool(nonzero(self.labels[atom]).any())

    def set(self, atom: Any, label: Label) -> None:
        """Adds what is known of a value's label."""
        if nonzero(label).any():
            if isinstance(atom, Lit):
                raise Conflict(f"the scale would reach the constant {np.ravel(atom.value)[0]:g}")
            if reason := self.refusal(atom):
                raise Conflict(reason)
        elif isinstance(atom, Lit) or atom in self.system.fixed or atom in self.kept:
            return
        old = self.label(atom)
        new = self.ties.compact(self.ties.merge(old, label))
        if atom not in self.labels or not same(self.ties.compact(old), new):
            self.labels[atom] = new
            self.queue.extend(self.system.readers[atom])

    def read(self, term: Term) -> Label:
        label = self.label(term.atom)
        for step in term.steps:
            label = step.read(label, self.ties)
        return Label(label.power * term.factor, label.channel)

    def write(self, term: Term, label: Label) -> None:
        label = Label(label.power / term.factor, label.channel)
        for step in reversed(term.steps):
            label = step.write(label, self.ties)
        self.set(term.atom, label)

    def satisfy(self, relation: Relation) -> list[tuple[Term, Label]]:
        """Draws every conclusion; returns the ways to go on if a factor has to be chosen."""
        if isinstance(relation, Equal):
            joint = self.read(relation.terms[0])
            for term in relation.terms[1:]:
                joint = self.ties.merge(joint, self.read(term))
            for term in relation.terms:
                self.write(term, joint)
        return self.product(relation) if isinstance(relation, Product) else []

    def product(self, relation: Product) -> list[tuple[Term, Label]]:
        out, a, b = (self.read(term) for term in relation.terms)
        out = self.ties.merge(out, self.ties.times(a, b, 1))
        a = self.ties.merge(a, self.ties.times(out, b, -1))
        b = self.ties.merge(b, self.ties.times(out, a, -1))
        labels = [Label(*map(np.atleast_1d, label)) if not label.power.shape else label for label in (out, a, b)]
        for term, label in zip(relation.terms, (out, a, b), strict=True):
            self.write(term, label)
        unknown = np.broadcast_arrays(*(np.isnan(label.power) for label in labels))
        scaled = np.broadcast_arrays(*(nonzero(label) for label in labels))
        open_ = (sum(u.astype(int) for u in unknown) == 2) & (scaled[0] | scaled[1] | scaled[2])
        if not open_.any():
            return []
        zero = np.where(open_, 0.0, np.nan).reshape(np.broadcast_shapes(out.power.shape, a.power.shape, b.power.shape))
        choices = [term for term, u in zip(relation.terms, unknown, strict=True) if (u & open_).any()]
        return [(term, Label(zero, np.zeros(zero.shape, np.int64))) for term in choices]

    def run(self) -> list[tuple[Term, Label]]:
        """Propagates until nothing follows any more; returns the alternatives of one open product, if one is left."""
        while True:
            while self.queue:
                self.visit(self.queue.popleft())
            for position in list(self.pending):
                alternatives = self.visit(position)
                if self.queue:
                    break
                if alternatives:
                    return alternatives
            else:
                return []

    def visit(self, position: int) -> list[tuple[Term, Label]]:
        relation = self.system.relations[position]
        if not any(self.is_scaled(atom) for atom in atoms_of(relation)):
            return []
        try:
            alternatives = self.satisfy(relation)
        except Conflict as conflict:
            # Where one side can never be scaled, that is the reason, not that the sides differ.
            root = next((text for a in atoms_of(relation) if (text := self.refusal(a))), None)
            raise Conflict(f"{root or conflict}, at `{relation.name}`") from None
        if alternatives:
            self.pending[position] = None
        else:
            self.pending.pop(position, None)
        return alternatives

    def close(self) -> Solution:
        """Takes all that is undecided for unscaled and checks every relation once more."""
        zeroed = {v: Label(np.nan_to_num(label.power), label.channel) for v, label in self.labels.items()}
        self.labels = {v: label for v, label in zeroed.items() if nonzero(label).any()}
        self.closed = True
        touched = sorted({position for var in self.labels for position in self.system.readers[var]})
        for position in touched:
            self.visit(position)
        scaled = {v: self.ties.compact(label) for v, label in self.labels.items() if nonzero(label).any()}
        return Solution(scaled, self.ties.representative, tuple(touched))


def solve(
    system: System, wanted: Sequence[tuple[int, Label]], channels: int, kept: Collection[int] = ()
) -> tuple[list[Solution], list[str]]:
    """Finds the ways to extend given labels to all of a program.

    Args:
      system: from `build`.
      wanted: values and their labels.
      channels: number of channels that the labels name.
      kept: values that must stay unscaled.

    Returns:
      Solutions, and the reasons for which branches of the search failed, without repeats.
    """
    solutions: list[Solution] = []
    reasons: dict[str, None] = {}
    state = _State(system, frozenset(kept), {}, Ties(np.arange(channels)))
    branches: list[tuple[_State, Sequence[tuple[Any, Label]]]] = [(state, [(Term(var), label) for var, label in wanted])]
    tried = 0
    while branches and tried < BRANCHES and len(solutions) < SOLUTIONS:
        state, assumed = branches.pop()
        tried += 1
        try:
            for term, label in assumed:
                state.write(term, label)
            alternatives = state.run()
            if not alternatives:
                solutions.append(state.close())
        except Conflict as conflict:
            reasons.setdefault(str(conflict))
            continue
        branches.extend((state.fork(), [choice]) for choice in reversed(alternatives))
    if branches and not solutions:
        reasons.setdefault(f"no answer among the first {BRANCHES} tried")
    return solutions, list(reasons)
