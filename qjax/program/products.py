"""Products of two activations: the `dot_general`s that no parameter stands in, and the names by which a rule picks them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from qjax.program import compat
from qjax.program.primitives import PARTIAL_VIEWS, VIEWS

# What `jnp.einsum` adds to the name stack: its subscripts.
_SUBSCRIPTS = re.compile(r"[A-Za-z. ]*(?:,[A-Za-z. ]*)+(?:->[A-Za-z. ]*)?|[A-Za-z. ]*->[A-Za-z. ]*")
_BATCHED = "vmap("


@dataclasses.dataclass(frozen=True)
class Product:
    """One `dot_general` whose two operands are both data: neither is a parameter, seen through any chain of views.

    Attributes:
      key: where the equation stands: positions in the nested programs, outermost first.
      name: `scope:dot_general.i`: the names of all scopes around it and its number, in data-flow order, among the products of that
        scope. `jnp.einsum`'s subscripts, `vmap` and calls of jitted functions are no scopes: they do not change a name.
      scope: the whole name stack, subscripts and all.
      shapes: shapes of the two operands, per call.
      dtypes: their dtypes.
      out_shape: shape of the result, per call.
      out_dtype: its dtype.
      contracted: dims of each operand that are summed over.
      batch: dims of each operand that run along together.
      made_by: the primitive that made each operand ("div" of a softmax), or the name of the jitted function, behind casts and
        reshapes; "input" where that lies outside of the body that it stands in.
      scans: keys of the scans around it that step through stacked parameters, outermost first: each turn is a layer of its own.
      turns: how many turns each of `scans` takes.
      opaque: whether it stands in a loop or branch that cannot be laid flat.
      sharded: whether it stands inside a `shard_map`.
      condition: whether it stands in the condition of a `while`.
      custom_rule: whether it stands inside a custom_jvp or custom_vjp function.
    """

    key: tuple[int, ...]
    name: str
    scope: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[Any, Any]
    out_shape: tuple[int, ...]
    out_dtype: Any
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    made_by: tuple[str, str]
    scans: tuple[tuple[int, ...], ...]
    turns: tuple[int, ...]
    opaque: bool = False
    sharded: bool = False
    condition: bool = False
    custom_rule: bool = False

    @property
    def op(self) -> str:
        """The primitive."""
        return "dot_general"

    @property
    def refusal(self) -> str:
        """Why it cannot be computed from codes; "" if it can."""
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (*self.dtypes, self.out_dtype)):
            return f"it multiplies {self.dtypes[0]} by {self.dtypes[1]}, not floating numbers"
        if not self.contracted[0]:
            return "it contracts no axis"
        if self.custom_rule:
            return "it stands inside a custom derivative rule, which stays as it is"
        return "it stands inside a shard_map" if self.sharded else ""


def describe(jaxpr: Any, found: Iterable[tuple[tuple[int, ...], dict[str, bool]]], stepped: Iterable[Any]) -> tuple[Product, ...]:
    """Names products.

    Args:
      jaxpr: the traced program.
      found: (key, flags) of each product.
      stepped: keys of the scans that slice a parameter.

    Returns:
      The products in data-flow order. Their names are unique.
    """
    counts: dict[str, int] = {}
    layers = set(stepped)
    products = []
    for key, flags in sorted(found, key=lambda pair: pair[0]):
        path, body = _path(jaxpr, key)
        eqn = path[-1][1]
        stacks = [str(e.source_info.name_stack) for _, e in path]
        scope = _scope(stacks)
        index = counts[scope] = counts.get(scope, -1) + 1
        scans = [(at, e.params["length"]) for at, e in path if at in layers]
        contract, batch = eqn.params["dimension_numbers"]
        lhs, rhs = (atom.aval for atom in eqn.invars)
        products.append(
            Product(
                key=key,
                name=f"{scope}:dot_general.{index}",
                scope="/".join(filter(None, stacks)),
                shapes=(tuple(lhs.shape), tuple(rhs.shape)),
                dtypes=(lhs.dtype, rhs.dtype),
                out_shape=tuple(eqn.outvars[0].aval.shape),
                out_dtype=eqn.outvars[0].aval.dtype,
                contracted=(tuple(contract[0]), tuple(contract[1])),
                batch=(tuple(batch[0]), tuple(batch[1])),
                made_by=(_maker(body, eqn.invars[0]), _maker(body, eqn.invars[1])),
                scans=tuple(at for at, _ in scans),
                turns=tuple(length for _, length in scans),
                **flags,
            )
        )
    return tuple(products)


def _path(jaxpr: Any, key: tuple[int, ...]) -> tuple[list[tuple[tuple[int, ...], Any]], Any]:
    """The equations around one, outermost first, and itself, each with its key; and the body that it stands in."""
    found, at = [], 0
    while True:
        body = compat.parts(jaxpr)[0]
        eqn = body.eqns[key[at]]
        found.append((key[: at + 1], eqn))
        if at + 1 == len(key):
            return found, body
        jaxpr = dict(compat.subprograms(eqn))[key[at + 1 : at + 2]]
        at += 2


def _maker(body: Any, atom: Any) -> str:
    makers = {var: eqn for eqn in body.eqns for var in eqn.outvars}
    while not isinstance(atom, compat.Literal) and atom in makers:
        eqn = makers[atom]
        if eqn.primitive.name not in VIEWS - PARTIAL_VIEWS:
            return str(eqn.params.get("name", eqn.primitive.name)) if eqn.primitive.name in compat.INLINE else eqn.primitive.name
        atom = eqn.invars[0]
    return "input"


def _scope(stacks: Iterable[str]) -> str:
    parts = [part for stack in stacks for part in _without_vmap(stack).split("/")]
    return "/".join(part for part in parts if part and not _SUBSCRIPTS.fullmatch(part))


def _without_vmap(stack: str) -> str:
    """A name stack without the marks of `vmap`: the same function has the same names, batched or not.

    >>> _without_vmap("layer/vmap(vmap(heads/0))/jvp(vmap())")
    'layer/heads/0/jvp()'
    """
    while (start := stack.find(_BATCHED)) >= 0:
        stop, depth = start + len(_BATCHED), 1
        while depth and stop < len(stack):
            depth += {"(": 1, ")": -1}.get(stack[stop], 0)
            stop += 1
        stack = stack[:start] + stack[start + len(_BATCHED) : stop - 1] + stack[stop:]
    return stack
