"""What can be demanded of the labels of values.

Three kinds of demand are enough: some values carry the same scale (`Equal`), one carries the product of two (`Product`), or none may
carry any (`Fixed`). `rules` says which primitive demands what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.graph.labels import Place, Step
from qjax.program.flatten import FlatEqn, Graph, Lit


@dataclasses.dataclass(frozen=True)
class Term:
    """A value seen through views in the joint space of a relation; its powers there are those of the value times `factor`."""

    atom: Any
    steps: tuple[Step, ...] = ()
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Equal:
    """All terms carry the same scale."""

    name: str
    terms: tuple[Term, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """out = a * b, element by element of the joint space; dims that `out` lacks are summed over."""

    name: str
    terms: tuple[Term, Term, Term]  # out, a, b


@dataclasses.dataclass(frozen=True)
class Fixed:
    """None of the atoms may be scaled."""

    name: str
    atoms: tuple[Any, ...]


Relation = Equal | Product | Fixed


def atoms_of(relation: Relation) -> tuple[Any, ...]:
    """The values that a relation is about."""
    return relation.atoms if isinstance(relation, Fixed) else tuple(term.atom for term in relation.terms)


def scale_free(atom: Any) -> bool:
    """Whether every element of a literal or constant stays what it is under any positive scale: zero, infinite or NaN."""
    value = np.asarray(atom.value if isinstance(atom, Lit) else atom)
    # bfloat16 is of NumPy's kind V.
    return value.dtype.kind in "fV" and bool(((value == 0) | ~np.isfinite(value)).all())


def is_floating(dtype: Any) -> bool:
    """Whether numbers of this type can be scaled."""
    return jnp.issubdtype(dtype, jnp.floating)


def free_values(graph: Graph) -> frozenset[int]:
    """The values that consist of zeros, infinities and NaN only; any scale may be claimed for them."""
    free = {var for var, value in graph.consts.items() if scale_free(value)}
    passing = {"broadcast_in_dim", "reshape", "convert_element_type", "copy", "transpose", "squeeze", "neg"}
    for eqn in graph.eqns:
        if eqn.name in passing and all(scale_free(a) if isinstance(a, Lit) else a in free for a in eqn.inputs):
            free |= {v for v in eqn.outputs if is_floating(graph.avals[v].dtype)}
    return frozenset(free)


class Lowering:
    """What the rules need to know of a graph: shapes, and which values are free of any scale."""

    def __init__(self, graph: Graph, free: frozenset[int]):
        self.graph, self.free = graph, free

    def shape(self, atom: Any) -> tuple[int, ...]:
        return tuple(np.shape(atom.value) if isinstance(atom, Lit) else self.graph.avals[atom].shape)

    def is_free(self, atom: Any) -> bool:
        return scale_free(atom) if isinstance(atom, Lit) else atom in self.free

    def may_fill(self, value: Any) -> bool:
        """Whether a lookup may put a value in place of rows that are not there."""
        return value is None or value == 0

    def as_traced(self, eqn: FlatEqn) -> bool:
        """False inside a `shard_map`, whose body sees parts of what the graph names."""
        return all(self.shape(a) == tuple(v.aval.shape) for a, v in zip(eqn.inputs, eqn.eqn.invars, strict=True))

    def elementwise(self, atom: Any, rank: int, factor: float = 1.0) -> Term:
        shape = self.shape(atom)
        return Term(atom, (Place(rank, tuple(range(len(shape))), shape),), factor)

    def placed(self, atom: Any, rank: int, dims: Sequence[int | None]) -> Term:
        return Term(atom, (Place(rank, tuple(dims), self.shape(atom)),))

    def equal(self, name: str, *terms: Term) -> Relation:
        return Equal(name, tuple(term for term in terms if not self.is_free(term.atom)))
