"""Scale folding: which parameters, scaled along which axes, divide a value by s per channel and leave the function as it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.graph.labels import Label, constant, nonzero
from qjax.graph.layers import layers, residual
from qjax.graph.solve import Solution, System, build, solve
from qjax.program import Program, Site, shared_inputs
from qjax.program.flatten import Lit


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """How one parameter is rescaled: w[i] becomes w[i] * s[channel[i]] ** power[i].

    Attributes:
      leaf: the flat index of the parameter.
      path: its path.
      power: float64 of the parameter's rank, size one along axes it does not depend on; 0 where nothing changes.
      channel: int64, the same shape: indices into the fold's free scales.
    """

    leaf: int
    path: str
    power: np.ndarray
    channel: np.ndarray

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the parameter along which its factor varies."""
        return tuple(i for i, n in enumerate(self.power.shape) if n > 1)

    @property
    def exponents(self) -> tuple[float, ...]:
        """The powers that occur, without zero: (-1.0,) for a producer, (1.0,) for a consumer."""
        return tuple(float(p) for p in np.unique(self.power[self.power != 0]))


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """A function-preserving rescaling: for every s > 0 the program computes the same, and x becomes x / s.

    Attributes:
      scalings: the parameters that change.
      channel_map: int64 of the sizes of `x_dims`: for each channel of x the index of its free scale. Channels that must share a
        scale (grouped heads, pixels of one feature) have the same index.
      x_dims: the dims of the group's first activation that are its channels: batch dims of the product, then contracted ones.
      size: number of free scales.
      stack: lengths of the scans around the group, outermost first, if every layer may have its own scales; else ().
      residual: number of additions of two scaled activations on the way: 0 if only the direct producer changes.
    """

    scalings: tuple[Scaling, ...]
    channel_map: np.ndarray
    x_dims: tuple[int, ...]
    size: int
    stack: tuple[int, ...]
    residual: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of s: (*stack, size)."""
        return (*self.stack, self.size)


@dataclasses.dataclass(frozen=True)
class NoFold:
    """Why a group's input cannot be rescaled.

    Attributes:
      reason: in words, all the ways that failed.
    """

    reason: str


def find_fold(program: Program | System, group: Sequence[Site], keep: Collection[int] = ()) -> Fold | NoFold:
    """Finds the parameters to rescale so that the input of a group of sites is divided by s, channel by channel.

    x -> x / s,  W -> s W  for the group's weights, and whatever else keeps the function: for every s > 0
    f(params', inputs) = f(params, inputs).
    Every value of the flattened program gets an integer power of s for each element; a product adds powers, a sum demands equal
    ones, any other function none. All relations are solved together, so another reader of x either takes the scale
    too or there is no fold. Of several answers the one with the most free scales wins, then the fewest parameters,
    then the fewest residual additions, then the fewest elements.

    Args:
      program: from `trace`, or from `build` if many groups are asked for.
      group: sites that read one value, one of `shared_inputs(program)`.
      keep: flat indices of parameters that must not change.

    Returns:
      A `Fold`, or a `NoFold` with the reason. Verify a fold with `verify_fold` before relying on it.

    Raises:
      ValueError: `group` is empty or not of this program.

    Example:
      >>> from qjax.program import trace
      >>> def norm_linear(p, x):
      ...     return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"] @ p["w"]
      >>> program = trace(norm_linear, {"scale": jnp.ones(4), "w": jnp.ones((4, 3))}, jnp.ones((2, 4)))
      >>> fold = find_fold(program, shared_inputs(program)[0])
      >>> [(scaling.path, scaling.axes, scaling.exponents) for scaling in fold.scalings]
      [('scale', (0,), (-1.0,)), ('w', (0,), (1.0,))]

    Source: the equivalent transformation of Nagel et al. 2019 (arXiv 1906.04721), equation 6, Xiao et al. 2022 (SmoothQuant) and
    Lin et al. 2023 (AWQ), which list the pairs of layers by hand; here they follow from the program.
    """
    system = program if isinstance(program, System) else build(program)
    refusal = _refusal(group)
    if refusal:
        return NoFold(refusal)
    wanted = _wanted(system, group)
    if isinstance(wanted, NoFold):
        return wanted
    labels, x_dims, sizes = wanted
    kept = [system.graph.inputs[leaf] for leaf in keep]
    solutions, reasons = solve(system, labels, math.prod(sizes), kept)
    if not solutions:
        return NoFold("; ".join(reasons[:3]))
    folds = [_fold(system, group, solution, x_dims, sizes) for solution in solutions]
    return min(folds, key=_rank)


def find_folds(program: Program) -> tuple[tuple[tuple[Site, ...], Fold | NoFold], ...]:
    """Answers `find_fold` for every group of sites that share an input.

    Args:
      program: from `trace`.

    Returns:
      (group, Fold or NoFold) for every group, in data-flow order.

    Example:
      >>> from qjax.program import trace
      >>> p = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> program = trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], p, jnp.ones((5, 3)))
      >>> [(group[0].path, type(answer).__name__) for group, answer in find_folds(program)]
      [('a', 'NoFold'), ('b', 'Fold')]
    """
    system = build(program)
    return tuple((group, find_fold(system, group)) for group in shared_inputs(program))


def channels(fold: Fold) -> tuple[int, np.ndarray]:
    """Returns the number of free scales and, for each channel of x, the index of its scale.

    Args:
      fold: from `find_fold`.

    Returns:
      (size, int64 array over the dims `fold.x_dims` of x).

    Example:
      >>> from qjax.program import trace
      >>> def shared_heads(p, x):
      ...     return jnp.repeat(x @ p["v"], 2, axis=1) @ p["o"]
      >>> program = trace(shared_heads, {"v": jnp.ones((3, 2)), "o": jnp.ones((4, 3))}, jnp.ones((5, 3)))
      >>> channels(find_fold(program, shared_inputs(program)[1]))
      (2, array([0, 0, 1, 1]))
    """
    return fold.size, fold.channel_map


def apply_fold(fold: Fold, flat_params: Sequence[Any], s: Any) -> list[Any]:
    """Rescales the parameters: w' = w * s[channel] ** power, in float32, cast back.

    Args:
      fold: from `find_fold`.
      flat_params: the parameters' array leaves, in the program's order.
      s: positive scales of shape `fold.shape`; or (fold.size,), the same for every layer.

    Returns:
      The new leaves; those that the fold does not name are the same objects.

    Raises:
      ValueError: `s` has another shape.

    Example:
      >>> from qjax.program import trace
      >>> p = [jnp.ones((3, 2)), jnp.ones((2, 3))]
      >>> program = trace(lambda p, x: x @ p[0] @ p[1], p, jnp.ones((5, 3)))
      >>> fold = find_fold(program, shared_inputs(program)[1])
      >>> new = apply_fold(fold, p, jnp.array([2.0, 4.0]))
      >>> new[0][0].tolist(), new[1][:, 0].tolist()
      ([0.5, 0.25], [2.0, 4.0])
    """
    s = jnp.asarray(s, jnp.float32)
    if s.shape not in (fold.shape, (fold.size,)):
        raise ValueError(f"`s` has shape {s.shape}: give one positive scale for each free channel, {fold.shape}")
    out = list(flat_params)
    for scaling in fold.scalings:
        w = out[scaling.leaf]
        out[scaling.leaf] = (jnp.asarray(w, jnp.float32) * _factor(scaling, s)).astype(w.dtype)
    return out


def _factor(scaling: Scaling, s: jax.Array) -> jax.Array:
    stacked = s.ndim - 1
    picked = s[..., scaling.channel.reshape(scaling.channel.shape[stacked:])]
    power = scaling.power.reshape(scaling.power.shape[stacked:])
    factor = jnp.ones_like(picked)
    for p in scaling.exponents:
        factor = jnp.where(power == p, _raised(picked, p), factor)
    return factor


def _raised(x: jax.Array, p: float) -> jax.Array:
    """x to the p; not by `power` where a quotient or a root does: that is exact."""
    if p in (0.5, -0.5):
        x = jnp.sqrt(x)
    if p in (0.5, 1.0):
        return x
    return 1 / x if p in (-0.5, -1.0) else jnp.power(x, p)


def _refusal(group: Sequence[Site]) -> str | None:
    if not group:
        raise ValueError("`group` has no sites: give one of shared_inputs(program)")
    for site in group:
        if site.op == "gather":
            return f"{site.path} is looked up by indices, which have no scale"
        if site.sharded:
            return f"{site.path} stands inside a shard_map, which sees parts of its activation"
    return None


def _wanted(system: System, group: Sequence[Site]) -> tuple[list[tuple[int, Label]], tuple[int, ...], tuple[int, ...]] | NoFold:
    """The labels to start from: x / s for the group's input, and results of the group as they were."""
    at = {eqn.key: eqn for eqn in system.graph.eqns if eqn.eqn is not None}
    missing = [site.path for site in group if site.key not in at]
    if missing:
        raise ValueError(f"`group` has sites {missing} that are not of this program: give one of shared_inputs(program)")
    first = group[0]
    x = at[first.key].inputs[1 - first.operand]
    x_dims = _channel_dims(first, at[first.key].eqn)
    if isinstance(x, Lit) or x in system.fixed:
        return NoFold("the scale would reach " + ("a constant" if isinstance(x, Lit) else system.fixed[x]))
    shape = system.graph.avals[x].shape
    sizes = tuple(shape[d] for d in x_dims)
    channel = np.arange(math.prod(sizes)).reshape([n if d in x_dims else 1 for d, n in enumerate(shape)])
    results = [at[site.key].outputs[0] for site in group]
    labels = [(x, Label(np.full(channel.shape, -1.0), channel))]
    labels += [(y, constant(len(system.graph.avals[y].shape), 0.0)) for y in results]
    return labels, x_dims, sizes


def _channel_dims(site: Site, eqn: Any) -> tuple[int, ...]:
    if site.op == "conv_general_dilated":
        return (eqn.params["dimension_numbers"].lhs_spec[1],)
    return tuple(sorted(x for _, x in (*site.pairs, *site.batch)))


def _fold(system: System, group: Sequence[Site], solution: Solution, x_dims: tuple[int, ...], sizes: tuple[int, ...]) -> Fold:
    free, index = np.unique(solution.representative, return_inverse=True)
    scalings = []
    for leaf in system.program.leaves:
        label = solution.labels.get(system.graph.inputs[leaf.index])
        if label is not None:
            scalings.append(Scaling(leaf.index, leaf.path, label.power, np.where(nonzero(label), index[label.channel], 0)))
    stack = layers(system, group, solution, [s.leaf for s in scalings])
    return Fold(tuple(scalings), index.reshape(sizes), x_dims, len(free), stack, residual(system, solution))


def _rank(fold: Fold) -> tuple[int, ...]:
    elements = sum(s.power.size for s in fold.scalings)
    return (-fold.size, len(fold.scalings), fold.residual, -len(fold.stack), elements)
