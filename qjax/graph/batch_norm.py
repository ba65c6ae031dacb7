"""Batch-norm folding: an affine map per channel after a linear layer moves into its weight and bias."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qjax.graph.affine import VIEWS, affine_after, constant_values, readers_of
from qjax.graph.labels import Label, nonzero
from qjax.graph.relations import Relation, atoms_of
from qjax.graph.solve import System, build, index_readers, solve
from qjax.graph.verify import verify
from qjax.program import Program, Site, compat
from qjax.program.flatten import FlatEqn, Lit

CASTS = frozenset({"convert_element_type"})  # of a layer in bfloat16 whose batch norm is in float32


@dataclasses.dataclass(frozen=True)
class Folded:
    """One affine map that moved into the layer before it.

    Attributes:
      weight: path of the layer's weight.
      scale: path of the parameter that was set so that the map multiplies by one.
      shift: path of the parameter that holds all of the shift now: the layer's bias, if it has one.
      zeroed: paths of the shifts that are zero now.
    """

    weight: str
    scale: str
    shift: str
    zeroed: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class BatchNormFold:
    """What `fold_batch_norm` gives.

    Attributes:
      params: the parameters' new array leaves.
      folded: one entry for each map that moved.
      refused: (path of the weight, reason) for the layers that a map follows but cannot move into.
      error: relative change of the results, see `verify`.
    """

    params: list[Any]
    folded: tuple[Folded, ...]
    refused: tuple[tuple[str, str], ...]
    error: float


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The affine equations after a site: operands that depend on parameters only, one value a channel.

    Attributes:
      site: the place of the layer's weight.
      channel: the dim of its result that the weight makes.
      eqns: the equations, each with the operand that is no activation.
    """

    site: Site
    channel: int
    eqns: tuple[tuple[FlatEqn, Any], ...]

    @property
    def size(self) -> int:
        """How many channels there are."""
        return self.site.out_shape[self.channel]


@dataclasses.dataclass(frozen=True)
class Places:
    """The parameters, by flat index, that a map which moves is set to nothing in.

    Attributes:
      scale: what all of its factor is proportional to.
      shifts: what is added or subtracted; the first takes all of the shift.
    """

    scale: int
    shifts: tuple[int, ...]


def fold_batch_norm(program: Program, params: Sequence[Any], inputs: Sequence[Any]) -> BatchNormFold:
    """Moves every batch norm that runs on stored statistics into the convolution or dense layer before it.

    y = (W x + b - mean) * k + beta,  k = gamma / sqrt(var + eps)
    W' = k W,  b' = k (b - mean) + beta,  mean' = 0,  beta' = 0,  gamma' = sqrt(var + eps), so that k' = 1
    The tree keeps its leaves and the program stays as it is. Without a bias, beta takes the shift. Any affine map
    per channel that is proportional to a parameter is moved in the same way.

    Args:
      program: from `trace`; the statistics are among its parameters.
      params: the parameters' array leaves.
      inputs: the array leaves of the other arguments: a batch on which the rewrite is verified.

    Returns:
      A `BatchNormFold`.

    Raises:
      NotPreserved: the function changed by more than rounding.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from qjax.program import trace
      >>> def layer(p, x):
      ...     return (x @ p["w"] - p["mean"]) * (jax.lax.rsqrt(p["var"] + 1.0) * p["gamma"]) + p["beta"]
      >>> p = {"beta": jnp.ones(1), "gamma": 4 * jnp.ones(1), "mean": jnp.ones(1), "var": 3 * jnp.ones(1), "w": jnp.ones((2, 1))}
      >>> x = jnp.ones((1, 2))
      >>> result = fold_batch_norm(trace(layer, p, x), jax.tree.leaves(p), [x])
      >>> [leaf.ravel().tolist() for leaf in result.params]
      [[-1.0], [2.0], [0.0], [3.0], [2.0, 2.0]]

    Source: Jacob et al. 2017, arXiv 1712.05877, section 3.2; Nagel et al. 2021, arXiv 2106.08295, section 3.2.
    """
    system = build(program)
    leaves, folded, refused = list(params), [], []
    for site in program.sites:
        chain = chain_after(system, site)
        if chain is None:
            continue
        answer = _fold_one(system, chain, leaves)
        if isinstance(answer, str):
            refused.append((site.path, answer))
        else:
            leaves, done = answer
            folded.append(done)
    return BatchNormFold(leaves, tuple(folded), tuple(refused), verify(program, params, leaves, inputs))


def chain_after(system: System, site: Site) -> Chain | None:
    """Follows a site's result through affine equations as long as nothing else reads it."""
    if site.op == "gather" or site.sharded or site.opaque or site.scans:
        return None
    graph, constant = system.graph, _constants(system)
    start = next(eqn for eqn in graph.eqns if eqn.key == site.key and eqn.eqn is not None)
    channel, shape = _channel(start, site), graph.avals[start.outputs[0]].shape
    if channel is None:
        return None

    def takes(eqn: FlatEqn, other: Any) -> bool:
        known = isinstance(other, Lit) or (other in constant and leaves_of(system, other) is not None)
        per_channel = isinstance(other, Lit) or _per_channel(graph.avals[other].shape, channel)
        return known and per_channel and graph.avals[eqn.outputs[0]].shape == shape

    eqns = [(eqn, other) for eqn, _, other in affine_after(graph, readers_of(graph), start.outputs[0], takes, CASTS)]
    scaled = any(eqn.name in ("mul", "div") and not isinstance(other, Lit) for eqn, other in eqns)
    return Chain(site, channel, tuple(eqns)) if scaled else None


def _channel(eqn: FlatEqn, site: Site) -> int | None:
    """The dim of a site's result that the weight makes, if it is one."""
    if site.op == "conv_general_dilated":
        return eqn.eqn.params["dimension_numbers"].out_spec[1]
    if site.op == "dot_general" and site.operand == 1 and len(site.view.dims) - len(site.pairs) - len(site.batch) == 1:
        return len(site.out_shape) - 1
    return None


def _per_channel(shape: Sequence[int], channel: int) -> bool:
    return all(n == 1 for i, n in enumerate(shape) if i != channel)


def _constants(system: System) -> set[int]:
    return constant_values(system.graph, len(system.program.leaves))


def leaves_of(system: System, atom: Any) -> set[int] | None:
    """The parameters on which a value depends; None if it is not the same in every turn of a loop."""
    graph, found = system.graph, set()
    inputs = {v: i for i, v in enumerate(graph.inputs[: len(system.program.leaves)])}
    for at, eqn in _behind(system, atom):
        if isinstance(at, Lit) or at in graph.consts:
            continue
        if at in inputs:
            found.add(inputs[at])
        elif eqn is None:
            return None
    return found


def holds_constants(system: System, atom: Any) -> bool:
    """Whether a value depends on an array that is no parameter: one that the function closes over."""
    values = (at.value if isinstance(at, Lit) else system.graph.consts.get(at) for at, _ in _behind(system, atom))
    return any(value is not None and np.size(value) > 1 for value in values)


def _behind(system: System, atom: Any) -> Iterator[tuple[Any, FlatEqn | None]]:
    """A value and all that it is made of, each once, with the equation that makes it; None for what no equation of the program makes."""
    made, seen, left = {v: eqn for eqn in system.graph.eqns for v in eqn.outputs if eqn.eqn is not None}, set(), [atom]
    while left:
        at = left.pop()
        eqn = None if isinstance(at, Lit) else made.get(at)
        if not isinstance(at, Lit):
            if at in seen:
                continue
            seen.add(at)
        yield at, eqn
        left += () if eqn is None else eqn.inputs


def _value(system: System, atom: Any, leaves: Sequence[Any]) -> np.ndarray:
    return np.asarray(computed(system, atom, leaves), np.float64)


def computed(system: System, atom: Any, leaves: Sequence[Any]) -> Any:
    """Computes a value that depends on parameters only; of traced parameters a traced one."""
    graph, made = system.graph, {v: eqn for eqn in system.graph.eqns for v in eqn.outputs}
    inputs = dict(zip(graph.inputs, leaves, strict=False))

    def compute(atom: Any) -> Any:
        if isinstance(atom, Lit):
            return atom.value
        if atom in inputs or atom in graph.consts:
            return inputs[atom] if atom in inputs else graph.consts[atom]
        eqn = made[atom]
        return compat.bind(eqn.eqn, [compute(a) for a in eqn.inputs])[eqn.outputs.index(atom)]

    return compute(atom)


def _affine(system: System, chain: Chain, leaves: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The chain as (factor, shift), one number a channel."""
    factor, shift = np.ones(()), np.zeros(())
    for eqn, other in chain.eqns:
        value = np.ravel(_value(system, other, leaves))
        value = value if value.size > 1 else value.reshape(())
        if eqn.name in ("mul", "div"):
            value = value if eqn.name == "mul" else 1 / value
            factor, shift = factor * value, shift * value
        else:
            shift = shift + (value if eqn.name == "add" else -value)
    return np.broadcast_to(factor, chain.size), np.broadcast_to(shift, chain.size)


def _leaf_of(system: System, atom: Any) -> int | None:
    """The parameter that a value is an unpermuted view of."""
    made = {v: eqn for eqn in system.graph.eqns for v in eqn.outputs}
    while not isinstance(atom, Lit) and atom in made and made[atom].name in VIEWS:
        atom = made[atom].inputs[0]
    inputs = system.graph.inputs[: len(system.program.leaves)]
    if isinstance(atom, Lit) or atom not in inputs or len(system.readers[atom]) != 1:
        return None
    return inputs.index(atom)


def _factor_leaf(system: System, atom: Any) -> int | None:
    """A parameter that a value is proportional to."""
    made = {v: eqn for eqn in system.graph.eqns for v in eqn.outputs}
    leaf = _leaf_of(system, atom)
    eqn = None if isinstance(atom, Lit) else made.get(atom)
    if leaf is not None or eqn is None or eqn.name not in VIEWS | {"mul", "div"}:
        return leaf
    operands = eqn.inputs if eqn.name == "mul" else eqn.inputs[:1]
    return next((found for a in operands if (found := _factor_leaf(system, a)) is not None), None)


def places(system: System, chain: Chain) -> Places | str:
    """Where a chain's map can be set to nothing, or why nowhere."""
    weight = system.program.leaves[chain.site.leaf]
    if len(weight.sites) != 1 or weight.consumers:
        return "its weight is used elsewhere, too"
    scale = _factor_leaf_of(system, chain)
    if scale is None:
        return "no parameter of one number a channel is a factor of its scale"
    shifts = _shifts(system, chain)
    return Places(scale, tuple(shifts)) if shifts else "no parameter of one number a channel holds a shift"


def moved(system: System, chain: Chain, leaves: Sequence[Any], at: Places) -> list[Any]:
    """The leaves with a chain's map in the layer, but for the weight, which is to be multiplied by its factor."""
    new, shift = list(leaves), _affine(system, chain, leaves)[1]
    new[at.scale] = np.ones_like(leaves[at.scale])
    new[at.scale] = _cast(1 / _affine(system, chain, new)[0], leaves[at.scale])
    for leaf in at.shifts:
        new[leaf] = np.zeros_like(leaves[leaf])
    left, first = _affine(system, chain, new)[1], at.shifts[0]
    new[first] = np.ones_like(leaves[first])
    weight_of_shift = _affine(system, chain, new)[1] - left  # -1 for a mean; more if factors follow that are not one
    new[first] = _cast((shift - left) / weight_of_shift, leaves[first])
    return new


def _fold_one(system: System, chain: Chain, leaves: Sequence[Any]) -> tuple[list[Any], Folded] | str:
    """Folds one chain, or says why it cannot be."""
    at = places(system, chain)
    if isinstance(at, str):
        return at
    new, weight = moved(system, chain, leaves, at), chain.site.leaf
    new[weight] = _scaled(system, chain, leaves[weight], _affine(system, chain, leaves)[0])
    paths = [leaf.path for leaf in system.program.leaves]
    return new, Folded(paths[weight], paths[at.scale], paths[at.shifts[0]], tuple(paths[leaf] for leaf in at.shifts[1:]))


def _factor_leaf_of(system: System, chain: Chain) -> int | None:
    """A parameter that the whole chain's factor is proportional to, with one number a channel."""
    found = [_factor_leaf(system, other) for eqn, other in chain.eqns if eqn.name == "mul"]
    return next((leaf for leaf in found if leaf is not None and _of_channels(system, chain, leaf)), None)


def _of_channels(system: System, chain: Chain, leaf: int) -> bool:
    return math.prod(system.program.leaves[leaf].shape) == chain.size


def _shifts(system: System, chain: Chain) -> list[int]:
    """The parameters that are added or subtracted as they are; first the one that can hold the shift: a bias, then beta, then a mean."""
    groups: tuple[list[int], list[int], list[int]] = [], [], []
    scaled = False
    for eqn, other in chain.eqns:
        scaled |= eqn.name in ("mul", "div")
        leaf = _leaf_of(system, other) if eqn.name in ("add", "sub") else None
        if leaf is not None and _of_channels(system, chain, leaf):
            groups[2 if eqn.name == "sub" else int(scaled)].append(leaf)
    return [leaf for group in groups for leaf in group]


def _scaled(system: System, chain: Chain, weight: Any, factor: np.ndarray) -> Any:
    """The weight times the factor of the channel that each of its elements makes."""
    found = weight_channels(system, chain)
    return _cast(np.asarray(weight, np.float64) * np.where(nonzero(found), factor[found.channel], 1.0), weight)


def weight_channels(system: System, chain: Chain) -> Label:
    """Which channel each element of the weight makes, of the weight's rank; with the power 0, or NaN, where none."""
    inner = _only_weight(system, chain.site)
    ndim, size = len(chain.site.out_shape), chain.size
    label = Label(*(a.reshape([-1 if i == chain.channel else 1 for i in range(ndim)]) for a in (np.ones(size), np.arange(size))))
    start = next(eqn for eqn in system.graph.eqns if eqn.key == chain.site.key and eqn.eqn is not None)
    (solution, *_), _ = solve(inner, [(start.outputs[0], label)], size)
    return solution.labels[system.graph.inputs[chain.site.leaf]]


def _only_weight(system: System, site: Site) -> System:
    """The relations between a weight and its site's result, and no others."""
    constant = _constants(system)
    start = next(eqn for eqn in system.graph.eqns if eqn.key == site.key and eqn.eqn is not None)
    x = start.inputs[1 - site.operand]

    def inside(relation: Relation) -> bool:
        return all(isinstance(a, Lit) or a in constant or a in (x, start.outputs[0]) for a in atoms_of(relation))

    kept = [relation for relation in system.relations if inside(relation)]
    fixed = {} if isinstance(x, Lit) else {x: "the layer's input"}
    return dataclasses.replace(system, relations=kept, readers=index_readers(kept), fixed=fixed)


def _cast(value: np.ndarray, like: Any) -> Any:
    return np.asarray(value).reshape(like.shape).astype(like.dtype)
