"""Which axes of which values must be rotated together, if one of them is: x -> x R along an axis, R orthogonal.

An orthogonal matrix is its own dual: the product of two values that are both rotated along the axis over which it sums is what it was.
So an axis of a value is rotated or it is not, and every equation says which axes are the same one. The answer is a partition of all
axes of all values, and a class of it can be rotated if no member may not be: there is nothing to search.

An axis can be rotated in two ways. *Linear*: the value itself is x R. *Square*: it is a product of two rotated values, of which only
the sum along the axis may be used, because it is what it was (the mean of squares of a norm). Along an axis where a value is *even*,
all its elements equal, it may be a factor of a rotated value; it may be added to one only if R keeps the vector of ones.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.graph.affine import constant_values
from qjax.graph.labels import Place, Reshape, Window, runs
from qjax.graph.relations import Equal, Fixed, Lowering, Product, Relation, Term, is_floating
from qjax.graph.rules import POWERS, of_equation, of_layers
from qjax.program import Key, Program
from qjax.program.flatten import OPEN, FlatEqn, Graph, Lit, flatten

# Of their relations every one holds for a rotation as for a scale.
LINEAR = frozenset(
    {
        "neg", "copy", "copy_p", "convert_element_type", "reduce_precision", "stop_gradient", "name", "pvary", "pbroadcast",
        "sharding_constraint", "add", "sub", "add_any", "reduce_sum", "cumsum", "reduce_window_sum", "scatter", "scatter-add",
        "reshape", "squeeze", "transpose", "broadcast_in_dim", "tile", "rev", "slice", "split", "concatenate", "stack", "pad",
        "dynamic_slice", "dynamic_update_slice", "gather", "select_n", "dot_general", "ragged_dot_general", "conv_general_dilated",
    }
)
SUMS = frozenset({"add", "add_any", "sub"})
# Element by element: even where all their operands are.
FUNCTIONS = POWERS.keys() | {
    "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "sin", "cos", "pow", "abs", "sign", "max", "min",
    "clamp", "floor", "round", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not",
}
EVEN, LOST = -1, -2
LINE, SQUARE = 0, 1
ZEROS_PASS = frozenset({"broadcast_in_dim", "reshape", "convert_element_type", "copy", "transpose", "squeeze", "neg"})

Axis = tuple[Any, int]  # (value, axis)
Evenness = Mapping[int, Mapping[int, frozenset[int]]]  # of parameters: axis -> the parameters that this relies on


@dataclasses.dataclass(frozen=True)
class Rotatable:
    """Axes that are one: all are rotated by the same matrix, or none is.

    Attributes:
      size: length of the axes.
      leaves: (flat index of a parameter, its axes that are rotated).
      keeps_ones: whether the matrix must keep the vector of ones.
      even: flat indices of parameters that must have equal elements along the axis: scales of norms that moved into what reads them.
      sums: additions of two activations along these axes; a residual stream has some.
      readers: keys of the equations that contract these axes.
      reasons: why they cannot be rotated; () if they can.
      factors: flat indices of parameters that stand in the way because they are a factor that varies along the axis.
    """

    size: int
    leaves: tuple[tuple[int, tuple[int, ...]], ...]
    keeps_ones: bool
    even: tuple[int, ...]
    sums: int
    readers: frozenset[Key]
    reasons: tuple[str, ...]
    factors: tuple[int, ...]


def rotatable(program: Program, even: Evenness | None = None) -> tuple[Rotatable, ...]:
    """Finds the axes of a program's values that an orthogonal matrix could rotate, and says of the others why not.

    Args:
      program: from `trace`.
      even: of which parameters all elements along an axis are, or will be, equal: {flat index: {axis: flat indices that are to be
        kept unrotated for that}}.

    Returns:
      One `Rotatable` for each class of axes with a parameter in it, in the order of their first parameter.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from qjax.program import trace
      >>> def fn(p, tokens):
      ...     x = p["embed"][tokens]
      ...     return (x + jnp.tanh(x @ p["in"]) @ p["out"]) @ p["head"]
      >>> p = {"embed": jnp.ones((7, 4)), "head": jnp.ones((4, 5)), "in": jnp.ones((4, 6)), "out": jnp.ones((6, 4))}
      >>> [(r.size, r.leaves, r.sums) for r in rotatable(trace(fn, p, jnp.arange(3))) if not r.reasons]
      [(4, ((0, (1,)), (1, (0,)), (2, (0,)), (3, (1,))), 1)]
    """
    walk = _Walk(program, even or {})
    return walk.classes()


class _Zeros(Lowering):
    """Zeros only are free: an infinity that is rotated is none."""

    def is_free(self, atom: Any) -> bool:
        return not np.any(atom.value) if isinstance(atom, Lit) else atom in self.free

    def may_fill(self, value: Any) -> bool:
        """A row of NaN is one after a rotation, too: what `nn.Embed` and `jnp.take` give for an index out of range."""
        return value is None or value == 0 or bool(np.isnan(value))


class _Walk:
    """The partition while it is made. Lives for one call of `rotatable`."""

    def __init__(self, program: Program, even: Evenness):
        self.program, self.graph = program, flatten(program, unroll=False)
        graph = self.graph
        self.low = _Zeros(graph, _zero_values(graph))
        self.start = np.concatenate([[0], np.cumsum([2 * len(aval.shape) for aval in graph.avals])]).tolist()
        self.parent = list(range(self.start[-1]))
        self.fixed: dict[int, str] = {}
        self.ones: set[int] = set()
        self.relies: dict[int, set[int]] = collections.defaultdict(set)
        self.added: list[int] = []
        self.readers: list[tuple[int, Key]] = []
        self.squares: list[tuple[int, int]] = []
        self.even_axes: dict[Axis, frozenset[int]] = {}
        self.constant = constant_values(graph, len(program.leaves))
        self.roots(even)
        for eqn in graph.eqns:
            self.equation(eqn)
        for relation in of_layers(graph):
            self.relation(relation, ())
        for loop in graph.loops:
            self.loop(loop.kind, loop.passed, loop.stacked)

    # What is known of a value along an axis.

    def shape(self, atom: Any) -> tuple[int, ...]:
        return self.low.shape(atom)

    def even(self, atom: Any, axis: int) -> frozenset[int] | None:
        """The parameters on which it relies that all elements along an axis are equal; None where they are not."""
        if isinstance(atom, Lit):
            return frozenset() if np.ndim(atom.value) == 0 or all_equal(atom.value, axis) else None
        if self.shape(atom)[axis] == 1:
            return frozenset()
        sliced = self.graph.sliced.get(atom)
        return self.even(sliced.parent, axis + 1) if sliced is not None else self.even_axes.get((atom, axis))

    def node(self, atom: Any, axis: int, kind: int) -> int | None:
        """The number of an axis in one of its two ways; None for what has one element or is a literal."""
        if isinstance(atom, Lit) or self.shape(atom)[axis] == 1:
            return None
        return self.start[atom] + 2 * axis + kind

    # What is found out.

    def find(self, node: int) -> int:
        while self.parent[node] != node:
            self.parent[node] = node = self.parent[self.parent[node]]
        return node

    def join(self, nodes: Iterable[int | None]) -> None:
        roots = sorted({self.find(n) for n in nodes if n is not None})
        for root in roots[1:]:
            self.parent[root] = roots[0]

    def fix(self, atom: Any, axis: int, reason: str, kinds: Sequence[int] = (LINE, SQUARE)) -> None:
        for kind in kinds:
            node = self.node(atom, axis, kind)
            if node is not None:
                self.fixed.setdefault(node, reason)

    def fix_all(self, atoms: Iterable[Any], reason: str) -> None:
        for atom in atoms:
            for axis in range(len(self.shape(atom))):
                self.fix(atom, axis, reason)

    def set_even(self, atom: Any, axis: int, on: frozenset[int]) -> None:
        """An even axis is what it was under a matrix that keeps the ones, and under any where only its sum is used."""
        if not isinstance(atom, Lit) and self.shape(atom)[axis] != 1:
            self.even_axes[atom, axis] = on

    def needs_ones(self, atom: Any, axis: int) -> None:
        node = self.node(atom, axis, LINE)
        if node is not None:
            self.ones.add(node)

    def rely(self, atom: Any, axis: int, on: frozenset[int]) -> None:
        for kind in (LINE, SQUARE):
            node = self.node(atom, axis, kind)
            if node is not None:
                self.relies[node] |= on

    # What the program says.

    def roots(self, even: Evenness) -> None:
        graph, count = self.graph, len(self.program.leaves)
        for var, aval in enumerate(graph.avals):
            if not is_floating(aval.dtype):
                self.fix_all([var], "a value that is no real number")
        for leaf, var in enumerate(graph.inputs[:count]):
            for axis in range(len(self.shape(var))):
                self.fix(var, axis, "a parameter", (SQUARE,))
                if axis in even.get(leaf, {}):
                    self.set_even(var, axis, even[leaf][axis])
        self.fix_all(graph.inputs[count:], "an input of the program")
        self.fix_all([v for v in graph.outputs if not isinstance(v, Lit)], "an output of the program")
        for var, value in graph.consts.items():
            for axis in range(np.ndim(value)):
                if all_equal(value, axis):
                    self.set_even(var, axis, frozenset())
                    if var not in self.low.free:
                        self.needs_ones(var, axis)
                else:
                    self.fix(var, axis, "a constant")

    def equation(self, eqn: FlatEqn) -> None:
        name = eqn.name
        if name == OPEN:
            return
        if eqn.eqn is None or not self.low.as_traced(eqn):
            self.fix_all((*eqn.inputs, *eqn.outputs), f"`{name}`")
        elif name in ("mul", "div"):
            self.factors(eqn)
        elif name == "square" or (name == "integer_pow" and eqn.eqn.params["y"] == 2):
            self.squared(eqn)
        elif name in LINEAR:
            self.linear(eqn)
        else:
            self.function(eqn)

    def function(self, eqn: FlatEqn) -> None:
        """No rotation passes; along an even axis there is nothing to rotate."""
        out = eqn.outputs[0]
        rank = len(self.shape(out))
        if eqn.name not in FUNCTIONS or any(len(self.shape(a)) not in (0, rank) for a in eqn.inputs):
            self.fix_all((*eqn.inputs, *eqn.outputs), f"`{eqn.name}`")
            return
        for axis in range(rank):
            on = [self.even(a, axis) if self.shape(a) else frozenset() for a in eqn.inputs]
            self.even_or_fixed(eqn, axis, on)

    def even_or_fixed(self, eqn: FlatEqn, axis: int, on: Sequence[frozenset[int] | None]) -> None:
        known = [o for o in on if o is not None]
        if len(known) == len(on):
            both = frozenset[int]().union(*known)
            self.set_even(eqn.outputs[0], axis, both)
            self.rely(eqn.outputs[0], axis, both)
            self.needs_ones(eqn.outputs[0], axis)
            return
        for atom in (*eqn.inputs, *eqn.outputs):
            if self.shape(atom):
                self.fix(atom, axis, f"`{eqn.name}`")

    def squared(self, eqn: FlatEqn) -> None:
        x, out = eqn.inputs[0], eqn.outputs[0]
        for axis in range(len(self.shape(out))):
            if self.even(x, axis) is not None:
                self.even_or_fixed(eqn, axis, [self.even(x, axis)])
            else:
                self.make_square(eqn, axis, (x,))

    def make_square(self, eqn: FlatEqn, axis: int, factors: Sequence[Any]) -> None:
        out = eqn.outputs[0]
        self.join([self.node(out, axis, SQUARE), *(self.node(a, axis, LINE) for a in factors)])
        self.fix(out, axis, f"`{eqn.name}` of two values that vary along it", (LINE,))
        if (made := self.node(out, axis, LINE)) is not None:
            self.squares += [(made, n) for a in factors if (n := self.node(a, axis, LINE)) is not None]
        for atom in factors:
            self.fix(atom, axis, f"`{eqn.name}` of a square", (SQUARE,))
            if isinstance(atom, Lit):
                self.fix_all([out, *(a for a in factors if self.shape(a))], f"`{eqn.name}` with a constant that varies along it")

    def factors(self, eqn: FlatEqn) -> None:
        (a, b), out = eqn.inputs, eqn.outputs[0]
        for axis in range(len(self.shape(out))):
            on = [self.even(v, axis) if self.shape(v) else frozenset[int]() for v in (a, b)]
            if on[0] is not None and on[1] is not None:
                self.even_or_fixed(eqn, axis, on)
            elif on[1] is not None:
                self.scaled(out, a, axis, on[1])
            elif on[0] is not None and eqn.name == "mul":
                self.scaled(out, b, axis, on[0])
            elif eqn.name == "mul":
                self.make_square(eqn, axis, (a, b))
            else:
                self.even_or_fixed(eqn, axis, [None])

    def scaled(self, out: Any, x: Any, axis: int, on: frozenset[int]) -> None:
        for kind in (LINE, SQUARE):
            self.join([self.node(out, axis, kind), self.node(x, axis, kind)])
        self.rely(out, axis, on)

    def linear(self, eqn: FlatEqn) -> None:
        for relation in of_equation(self.low, eqn):
            self.relation(relation, eqn.outputs, eqn)
        out = eqn.outputs[0]
        if eqn.name == "reduce_sum":
            for axis in eqn.eqn.params["axes"]:
                self.needs_ones(eqn.inputs[0], axis)
        if eqn.name in SUMS and sum(not isinstance(a, Lit) and a not in self.constant for a in eqn.inputs) > 1:
            self.added += [n for axis in range(len(self.shape(out))) if (n := self.node(out, axis, LINE)) is not None]
        if eqn.name == "select_n" and self.shape(eqn.inputs[0]):
            for axis in range(len(self.shape(out))):
                if self.even(eqn.inputs[0], axis) is None:
                    self.fix(out, axis, "`select_n` that varies along it")
        if eqn.name == "ragged_dot_general":  # its rows belong to different experts
            ragged = eqn.eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions[0]
            self.fix(eqn.inputs[0], ragged, "`ragged_dot_general`, rows of different experts")

    def relation(self, relation: Relation, outputs: Sequence[int], eqn: FlatEqn | None = None) -> None:
        name = f"`{relation.name}`"
        if isinstance(relation, Fixed):
            self.fix_all(relation.atoms, name)
            return
        terms = [(term.atom, self.places(term)) for term in relation.terms]
        summed = eqn.eqn.params["axes"] if eqn is not None and eqn.name == "reduce_sum" else ()
        for atom, place in terms:
            for axis in set(range(len(self.shape(atom)))) - set(place):
                if not (summed and atom == eqn.inputs[0] and axis in summed):  # pyright: ignore[reportOptionalMemberAccess]
                    self.fix(atom, axis, f"{name}, which takes a part of it or mixes it")
        for joint in range(max((len(place) for _, place in terms), default=0)):
            at = [(atom, self.of_literal(relation, atom, place[joint])) for atom, place in terms if joint < len(place)]
            if isinstance(relation, Equal):
                self.same(name, at, outputs)
            else:
                self.contracted(relation, at, eqn)

    def of_literal(self, relation: Relation, atom: Any, axis: int) -> int:
        """An array that is written into the program cannot be rotated; even, it may be added."""
        if axis < 0 or not isinstance(atom, Lit):
            return axis
        return EVEN if isinstance(relation, Equal) and self.even(atom, axis) is not None else LOST

    def same(self, name: str, at: Sequence[tuple[Any, int]], outputs: Sequence[int]) -> None:
        """One axis of the terms of a relation: they are rotated alike."""
        members = [(atom, axis) for atom, axis in at if axis >= 0]
        if any(axis == LOST for _, axis in at):
            for atom, axis in members:
                self.fix(atom, axis, f"{name}, which takes a part of it or mixes it")
            return
        for kind in (LINE, SQUARE):
            self.join(self.node(atom, axis, kind) for atom, axis in members)
        if any(axis == EVEN for _, axis in at):
            for atom, axis in members:
                self.needs_ones(atom, axis)
        on = [frozenset[int]() if axis == EVEN else self.even(a, axis) for a, axis in at if a not in outputs]
        known = [o for o in on if o is not None]
        for atom, axis in members:
            if atom in outputs and len(known) == len(on):
                self.set_even(atom, axis, frozenset[int]().union(*known))

    def contracted(self, relation: Product, at: Sequence[tuple[Any, int]], eqn: FlatEqn | None) -> None:
        """One axis of a product: kept, summed over, or a batch axis."""
        (out, kept), *sides = at
        members = [(atom, axis) for atom, axis in sides if axis >= 0]
        if any(axis == LOST for _, axis in at) or (kept >= 0 and len(members) != 1):
            for atom, axis in at:
                if axis >= 0:
                    self.fix(atom, axis, f"`{relation.name}`, of which it is a batch axis or mixed")
        elif kept >= 0:
            for kind in (LINE, SQUARE):
                self.join([self.node(out, kept, kind), self.node(*members[0], kind)])
            if (on := self.even(*members[0])) is not None:
                self.set_even(out, kept, on)
        elif len(members) == 2:
            nodes = [self.node(atom, axis, LINE) for atom, axis in members]
            self.join(nodes)
            for atom, axis in members:
                self.fix(atom, axis, f"`{relation.name}` of a square", (SQUARE,))
            if eqn is not None and nodes[0] is not None:
                self.readers.append((nodes[0], eqn.key))
        else:
            for atom, axis in members:
                self.fix(atom, axis, f"`{relation.name}`")

    def places(self, term: Term) -> list[int]:
        """For each axis of the joint space the axis of the value that runs along it, EVEN where none does, LOST where several do."""
        shape = self.shape(term.atom)
        at = list(range(len(shape)))
        for step in term.steps:
            if isinstance(step, Place):
                new = [EVEN] * step.rank
                for i, dim in enumerate(step.dims):
                    if dim is not None and step.shape[i] != 1:
                        new[dim] = at[i]
                at = new
            elif isinstance(step, Reshape):
                at = _reshaped(at, step.before, step.after)
            elif isinstance(step, Window):
                whole = [part == (0, n, 1) for n, part in zip(step.shape, step.parts, strict=True)]
                at = [axis if w else LOST for axis, w in zip(at, whole, strict=True)]
        return [EVEN if axis >= 0 and shape[axis] == 1 else axis for axis in at]

    def loop(self, kind: str, passed: Sequence[tuple[Any, ...]], stacked: Sequence[tuple[Any, int]]) -> None:
        if kind not in ("scan", "while", "cond"):
            self.fix_all([v for values in passed for v in values], f"`{kind}`")
            return
        for values in passed:
            for axis in range(len(self.shape(values[-1]))):
                for way in (LINE, SQUARE):
                    self.join(self.node(v, axis, way) for v in values)
                for v in values:
                    if isinstance(v, Lit) and np.any(v.value):
                        self.needs_ones(values[-1], axis)
        for value, whole in stacked:
            self.fix(whole, 0, f"`{kind}`, whose turns it counts")
            for axis in range(len(self.shape(value))):
                for way in (LINE, SQUARE):
                    self.join([self.node(value, axis, way), self.node(whole, axis + 1, way)])

    # The answer.

    def classes(self) -> tuple[Rotatable, ...]:
        reasons = self.by_class(self.fixed.items())
        relies = self.by_class((n, leaf) for n, leaves in self.relies.items() for leaf in leaves)
        readers = self.by_class(self.readers)
        sums = collections.Counter(self.find(n) for n in self.added)
        ones = {self.find(n) for n in self.ones}
        twice = {r for n in range(0, len(self.parent), 2) if (r := self.find(n)) == self.find(n + 1)}
        leaves: dict[int, dict[int, list[int]]] = {}
        for leaf, var in enumerate(self.graph.inputs[: len(self.program.leaves)]):
            for axis in range(len(self.shape(var))):
                node = self.node(var, axis, LINE)
                if node is not None:
                    leaves.setdefault(self.find(node), {}).setdefault(leaf, []).append(axis)
        factors = self.by_class((made, leaf) for made, n in self.squares for leaf in leaves.get(self.find(n), ()))
        out = []
        for root, mine in leaves.items():
            why = list(dict.fromkeys(reasons.get(root, ())))
            even = sorted(dict.fromkeys(relies.get(root, ())))
            why += ["a value would be rotated and the square of a rotated value"] * (root in twice)
            why += [f"{self.program.leaves[leaf].path} is a factor along it and rotated, too" for leaf in even if leaf in mine]
            first = next(iter(mine))
            size = self.program.leaves[first].shape[mine[first][0]]
            rotated = tuple((leaf, tuple(axes)) for leaf, axes in mine.items())
            keys, others = frozenset(readers.get(root, ())), tuple(dict.fromkeys(factors.get(root, ())))
            out.append(Rotatable(size, rotated, root in ones, tuple(even), sums[root], keys, tuple(why), others))
        return tuple(out)

    def by_class(self, items: Iterable[tuple[int, Any]]) -> dict[int, list[Any]]:
        out: dict[int, list[Any]] = {}
        for node, value in items:
            out.setdefault(self.find(node), []).append(value)
        return out


def all_equal(value: Any, axis: int) -> bool:
    """Whether all elements of an array along an axis are equal."""
    value = np.asarray(value)
    return value.shape[axis] > 0 and bool((value == np.take(value, [0], axis)).all())


def _reshaped(at: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
    """An axis stays one if it is neither split nor merged."""
    out: list[int] = []
    for old, new in runs(before, after):
        axes = [axis for axis, n in zip(at[old], before[old], strict=True) if n != 1]
        even = all(axis == EVEN for axis in axes)
        stays = len(axes) == 1 and sum(n != 1 for n in after[new]) == 1
        out += [EVEN if n == 1 or even else axes[0] if stays else LOST for n in after[new]]
    return out


def _zero_values(graph: Graph) -> frozenset[int]:
    zero = {var for var, value in graph.consts.items() if is_floating(value.dtype) and not np.any(value)}
    for eqn in graph.eqns:
        if eqn.name in ZEROS_PASS and all(not np.any(a.value) if isinstance(a, Lit) else a in zero for a in eqn.inputs):
            zero |= {v for v in eqn.outputs if is_floating(graph.avals[v].dtype)}
    return frozenset(zero)


