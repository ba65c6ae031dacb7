"""Untying: a parameter that is looked up and multiplied, as a table that is the output head too, becomes two of equal values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.program import Interpreter, Leaf, Program, ProgramCache, Site, compat, split_arguments

NAME = "untied"  # the entry of the new tree that holds the copies


class Untied(NamedTuple):
    """A function whose tied parameters were taken apart.

    Attributes:
      fn: takes the new tree; computes what the function did.
      params: the tree with an entry "untied" beside its own: {path: copy}, one for each parameter that was tied.
      paths: the parameters that were; () if none was, and then `fn` and `params` are what they were.
    """

    fn: Callable[..., Any]
    params: Any
    paths: tuple[str, ...]


def tied(program: Program) -> tuple[Leaf, ...]:
    """The parameters that are both looked up and multiplied."""
    return tuple(leaf for leaf in program.leaves if len({site.op == "gather" for site in leaf.sites}) == 2)


def untie(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Untied:
    """Gives the products of a tied parameter a copy of their own, so that the two can be rewritten and quantized apart.

    The products of the table read params["untied"][path], its lookups the table as before: the same numbers, for the cost of a second
    array. A norm's scale in front of a tied head can move into the copy, which it cannot into a table whose rows are looked up.

    Args:
      fn: a function whose first argument is `params`.
      params: a tree. The entry "untied" is added to a dictionary; any other tree becomes {"params": tree, "untied": ...}, whose paths
        are the same to a policy, which drops a leading "params/".
      *args: arguments of the function, or shapes: it is traced.
      **kwargs: keyword arguments.

    Returns:
      An `Untied`.

    Raises:
      ValueError: a product reads a part of the parameter only, or the tree has an entry "untied" already.

    Example:
      >>> def fn(p, tokens):
      ...     return p["embed"][tokens] @ p["embed"].T
      >>> new = untie(fn, {"embed": jnp.eye(3)}, jnp.arange(2))
      >>> sorted(new.params), new.paths, new.fn(new.params, jnp.arange(2)).tolist()
      (['embed', 'untied'], ('embed',), [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])

    Source: as the authors of QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406) do with models whose head is tied.
    """
    arguments = split_arguments(params, args, kwargs)
    programs = ProgramCache(fn)
    program = programs(arguments)
    leaves = tied(program)
    if not leaves:
        return Untied(fn, params, ())
    for site in (site for leaf in leaves for site in leaf.sites if site.op != "gather"):
        if not _whole(site, program.leaves[site.leaf].shape):
            raise ValueError(f"`params` leaf {site.path!r} cannot be untied: the product at {site.scope!r} reads a part of it only")
    paths = {leaf.index: leaf.path for leaf in leaves}
    plain = isinstance(params, dict)
    if plain and NAME in params:
        raise ValueError(f"`params` has an entry {NAME!r} already: rename it")
    copies = {path: jnp.array(arguments.params[index]) for index, path in paths.items()}
    tree = {**params, NAME: copies} if plain else {"params": params, NAME: copies}

    @functools.wraps(fn)
    def run(new: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        rest = {name: value for name, value in new.items() if name != NAME} if plain else new["params"]
        mine = split_arguments(rest, args, kwargs)
        program = programs(mine)
        sites = {site.key: site for site in program.sites if site.leaf in paths and site.op != "gather"}

        def rule(site: Site, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
            operands[site.operand] = _seen(new[NAME][site.path], site, eqn.invars[site.operand].aval)
            return compat.bind(eqn, operands), state

        outs, _ = Interpreter(sites, rule, frozenset(sites))(program.jaxpr, [*mine.params, *mine.inputs])
        return jax.tree.unflatten(program.out_tree, outs)

    return Untied(run, tree, tuple(paths.values()))


def _whole(site: Site, shape: tuple[int, ...]) -> bool:
    view = site.view
    atoms = [atom for dim in view.dims for atom in dim]
    moved = view.scans or view.fixed or view.partial or any(atom.start != 0 for atom in atoms)
    return not moved and not site.sharded and math.prod(atom.size for atom in atoms) == math.prod(shape)


def _seen(w: jax.Array, site: Site, aval: Any) -> jax.Array:
    """A parameter as a site's operand sees it: its axes split into runs, and put in the operand's order."""
    atoms = [atom for dim in site.view.dims for atom in dim]
    order = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].stride))
    split = w.reshape([atoms[i].size for i in order])
    return split.transpose([order.index(i) for i in range(len(atoms))]).reshape(aval.shape).astype(aval.dtype)
