"""Caches: inputs of a program that come back with tokens written into them, found by data flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from qjax.program import compat
from qjax.program.primitives import BARRIER

UPDATE = "dynamic_update_slice"


class Flow(NamedTuple):
    """What a result of a program is: an input, by number, written along `axis` (negative), or as it came (None)."""

    source: int
    axis: int | None


@dataclasses.dataclass(frozen=True)
class InputLeaf:
    """An input of a program, and whether it is a cache.

    Attributes:
      index: its number among the program's inputs, parameters first.
      path: of a parameter its path; of another leaf the number of its argument (the parameters are 0) or its keyword, and its path.
      shape: its shape.
      dtype: its dtype.
      axis: along which tokens are written into it, negative; None if it is no cache.
      output: the number of the result that it comes back as; None if it is no cache.
      refusal: why it is no cache, or "".
    """

    index: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    axis: int | None
    output: int | None
    refusal: str


def input_leaves(jaxpr: Any, paths: Sequence[str]) -> tuple[InputLeaf, ...]:
    """Says of every input of a program whether it is a cache.

    A cache is floating, is written with `dynamic_update_slice` along one axis, at the top or inside calls, loops and branches (sliced
    by a scan over layers, or carried by one), and comes back as a result. What else reads it does not matter.

    Args:
      jaxpr: the program.
      paths: of its inputs.

    Returns:
      One entry an input.
    """
    body, _ = compat.parts(jaxpr)
    written = {flow.source: (out, flow.axis) for out, flow in reversed(flows(jaxpr).items()) if flow.axis is not None}
    lost = {flow.source for flow in _known(body).values() if flow.axis is not None} - set(written)
    leaves, met = [], _met(jaxpr)
    for index, (var, path) in enumerate(zip(body.invars, paths, strict=True)):
        shape, dtype = tuple(var.aval.shape), var.aval.dtype
        floating = jnp.issubdtype(dtype, jnp.floating)
        output, axis = written.get(index, (None, None)) if floating else (None, None)
        refusal = "" if output is not None else _refusal(index, lost, met) if floating else f"it is {dtype}, not floating"
        leaves.append(InputLeaf(index, path, shape, dtype, axis, output, refusal))
    return tuple(leaves)


def flows(jaxpr: Any) -> dict[int, Flow]:
    """Returns which results of a program are inputs of it, as they came or with tokens written into them."""
    body, _ = compat.parts(jaxpr)
    known = _known(body)
    results = enumerate(body.outvars)
    return {i: known[atom] for i, atom in results if not isinstance(atom, compat.Literal) and atom in known}


def written_along(eqn: Any) -> int | None:
    """The axis (negative) along which a `dynamic_update_slice` writes tokens; None if it is not one axis."""
    shape, part = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    # An axis that is written as a whole begins at 0 whatever it is told. Where all are, the one that is told is time.
    axes = [i for i in range(len(shape)) if part[i] != shape[i]]
    axes = axes or [i for i, start in enumerate(eqn.invars[2:]) if not isinstance(start, compat.Literal)]
    return axes[0] - len(shape) if len(axes) == 1 and len(shape) > 1 else None


def through(eqn: Any) -> dict[int, Flow]:
    """Returns which results of an equation are operands of it, as they came or with tokens written into them."""
    name = eqn.primitive.name
    if name == UPDATE:
        axis = written_along(eqn)
        return {} if axis is None else {0: Flow(0, axis)}
    if name == BARRIER:
        return {i: Flow(i, None) for i in range(len(eqn.outvars))}
    if name in compat.INLINE or name in compat.REMAT:
        return flows(eqn.params[compat.CALLS[name]])
    if name == "scan":
        consts, carry = compat.scan_counts(eqn)
        found = flows(eqn.params["jaxpr"]).items()
        # A carry must come back in its own place; what a scan slices along layers and stacks again is what it was.
        return {i: f for i, f in found if (f.source == consts + i if i < carry else f.source >= consts + carry)}
    if name == "while":
        first = eqn.params["body_nconsts"]
        found = flows(eqn.params["body_jaxpr"]).items()
        return {i: Flow(f.source + eqn.params["cond_nconsts"], f.axis) for i, f in found if f.source == first + i}
    if name == "cond":
        return _through_branches([flows(branch) for branch in eqn.params["branches"]])
    return {}


def _through_branches(branches: Sequence[Mapping[int, Flow]]) -> dict[int, Flow]:
    joined = {}
    for i, first in branches[0].items():
        ways = [branch.get(i) for branch in branches]
        axes = {way.axis for way in ways if way is not None} - {None}
        if all(way is not None and way.source == first.source for way in ways) and len(axes) < 2:
            joined[i] = Flow(first.source + 1, next(iter(axes), None))
    return joined


def _known(body: Any) -> dict[Any, Flow]:
    """The variables of a program that are inputs of it, as they came or written."""
    known = {var: Flow(i, None) for i, var in enumerate(body.invars)}
    for eqn in body.eqns:
        for result, flow in through(eqn).items():
            atom = eqn.invars[flow.source]
            before = None if isinstance(atom, compat.Literal) else known.get(atom)
            if before is not None and (before.axis is None or flow.axis in (None, before.axis)):
                known[eqn.outvars[result]] = Flow(before.source, before.axis if flow.axis is None else flow.axis)
    return known


def _refusal(index: int, lost: set[int], met: Mapping[int, set[str]]) -> str:
    if index in lost:
        return "tokens are written into it, but it does not come back as a result"
    names = sorted(met.get(index, ()))
    if UPDATE in names:
        where = f"it is written by a {UPDATE} along several axes at once, or by one whose result changes before it comes back"
    else:
        where = f"it meets only {', '.join(names)}" if names else "the function never uses it"
    return f"no {UPDATE} along one axis writes tokens into it and hands it back: {where}"


def _met(jaxpr: Any) -> dict[int, set[str]]:
    """Of each input the names of the primitives that it meets where it is still itself, inside calls and loops too."""
    body, _ = compat.parts(jaxpr)
    known, met = _known(body), {}
    for eqn in body.eqns:
        sources = {i: known[a].source for i, a in enumerate(eqn.invars) if not isinstance(a, compat.Literal) and a in known}
        if not sources:
            continue
        inner = _inside(eqn)
        if inner is None:
            for source in sources.values():
                met.setdefault(source, set()).add(eqn.primitive.name)
        for sub, shift in inner or ():
            for at, names in _met(sub).items():
                if at + shift in sources:
                    met.setdefault(sources[at + shift], set()).update(names)
    return met


def _inside(eqn: Any) -> list[tuple[Any, int]] | None:
    """The programs inside an equation, with the number of its operands that come before theirs; None if there is none to follow."""
    name = eqn.primitive.name
    if name in compat.INLINE or name in compat.REMAT or name == "scan":
        return [(eqn.params["jaxpr" if name == "scan" else compat.CALLS[name]], 0)]
    if name == "cond":
        return [(branch, 1) for branch in eqn.params["branches"]]
    if name == "while":
        return [(eqn.params["body_jaxpr"], eqn.params["cond_nconsts"])]
    return None


def argument_path(path: tuple[Any, ...], written: str) -> str:
    """The path of a leaf of (args, kwargs), where `written` is how the path below its argument is written."""
    where, argument = path[0].idx, path[1]
    head = str(argument.idx + 1) if where == 0 else str(argument.key)
    return f"{head}/{written}" if written else head

