"""Rotations inside flat axes: the channels of a head between the linear layer that makes them and the one that reads them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from qjax.graph.axes import LINEAR
from qjax.graph.fold import Fold, Scaling, find_fold
from qjax.graph.solve import System
from qjax.program import Leaf, Site, shared_inputs
from qjax.program.flatten import Lit

# A rotated value may stand in these beside values that do not depend on it.
BILINEAR = {"mul": (0, 1), "div": (0,), "dot_general": (0, 1), "ragged_dot_general": (0,), "conv_general_dilated": (0,)}


@dataclasses.dataclass(frozen=True)
class Heads:
    """Runs of channels that may be rotated alike, between layers that make them and layers that read them.

    Attributes:
      leaves: (flat index of a parameter, its axes, which are flattened together and cut into runs of `size`).
      sizes: lengths of the runs that are possible, the largest first: which of them is that of a head is for the numbers to say.
      readers: the sites that read them.
    """

    leaves: tuple[tuple[int, tuple[int, ...]], ...]
    sizes: tuple[int, ...]
    readers: tuple[Site, ...]


def heads(system: System) -> Iterator[Heads]:
    """Finds values that linear layers make, that nothing but linear operations changes, and that linear layers read.

    For each group of sites that read one value: if scaling its channels can be undone in the layers that make them (a fold, which follows
    channels through reshapes, transposes and repeated heads and so says which belong together), and the way from
    there is linear in the value, then the program is a sum of products of the value's elements with factors that do not depend on it. A
    rotation of runs of channels then keeps the function either for every value or, as good as surely, for none: it is tried.

    Args:
      system: from `build`.

    Yields:
      `Heads`, each to be verified on numbers.
    """
    for group in shared_inputs(system.program):
        fold = find_fold(system, group)
        if not isinstance(fold, Fold) or fold.residual:
            continue
        made = [s for s in fold.scalings if s.exponents == (-1.0,)]
        read = [s for s in fold.scalings if s.exponents == (1.0,)]
        layers = all(_makes(system.program.leaves[s.leaf]) for s in made)
        if len(made) + len(read) != len(fold.scalings) or not made or not read or not layers:
            continue
        way = _linear_way(system, [s.leaf for s in made], group)
        if way is None:
            continue
        lengths = {n for v in way for n in system.graph.avals[v].shape if n > 1 and fold.size % n == 0}
        sizes = tuple(n for n in sorted(lengths, reverse=True) if all(_in_runs(s, n) for s in fold.scalings))
        if sizes:
            yield Heads(tuple((s.leaf, s.axes) for s in fold.scalings), sizes, tuple(group))


def _makes(leaf: Leaf) -> bool:
    """Whether a parameter is a linear layer's weight or its bias; a scale is neither."""
    return (bool(leaf.sites) and not leaf.consumers) or (not leaf.sites and set(leaf.consumers) <= {"add"})


def _linear_way(system: System, makers: Sequence[int], group: Sequence[Site]) -> set[int] | None:
    """The values between the layers that make a group's input and the group, if all of them are linear in what is made; else None."""
    graph, sites = system.graph, {site.key: site for site in system.program.sites}
    keys = {site.key for site in group}
    # A bias is made with what it is added to; in a loop it is a slice of the parameter.
    biases = {graph.inputs[leaf] for leaf in makers if not system.program.leaves[leaf].sites}
    ahead = biases | {v for v, sliced in graph.sliced.items() if sliced.parent in biases}
    for eqn in graph.eqns:
        site = sites.get(eqn.key)
        makes = site is not None and site.leaf in makers and eqn.eqn is not None
        if makes or (eqn.key not in keys and any(not isinstance(a, Lit) and a in ahead for a in eqn.inputs)):
            ahead |= set(eqn.outputs)
    behind = {a for eqn in graph.eqns if eqn.key in keys for a in eqn.inputs if not isinstance(a, Lit)}
    way = behind & ahead
    for eqn in reversed(graph.eqns):
        if not way & set(eqn.outputs) or (eqn.key in sites and sites[eqn.key].leaf in makers):
            continue
        at = [i for i, a in enumerate(eqn.inputs) if not isinstance(a, Lit) and a in ahead]
        beside = len(at) < len(eqn.inputs)
        allowed = BILINEAR.get(eqn.name)
        linear = len(at) == 1 and at[0] in allowed if allowed is not None else eqn.name in LINEAR and (at != [0] or eqn.name != "select_n")
        if eqn.eqn is None or not linear or (eqn.name in ("add", "sub", "add_any") and len(at) == 1 and beside):
            return None
        way |= {eqn.inputs[i] for i in at}  # pyright: ignore[reportUnhashable]
    return way or None


def _in_runs(scaling: Scaling, size: int) -> bool:
    """Whether runs of `size` of a parameter's channels are runs of free scales: b size, b size + 1, ..., b size + size - 1."""
    channel = np.broadcast_to(scaling.channel, [n if i in scaling.axes else 1 for i, n in enumerate(scaling.power.shape)])
    flat = channel.transpose([*(i for i in range(channel.ndim) if i not in scaling.axes), *scaling.axes]).reshape(-1)
    if flat.size % size or math.prod(channel.shape[a] for a in scaling.axes) != flat.size:
        return False
    runs = flat.reshape(-1, size)
    return bool((runs == runs[:, :1] // size * size + np.arange(size)).all())
