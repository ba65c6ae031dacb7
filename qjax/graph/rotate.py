"""Rotation of the residual stream: one orthogonal matrix for all that writes to it and all that reads it; the function stays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.graph.axes import Rotatable, all_equal, rotatable
from qjax.graph.fold import Fold, apply_fold, find_fold
from qjax.graph.heads import Heads, heads
from qjax.graph.orthogonal import random_orthogonal
from qjax.graph.solve import System, build
from qjax.graph.verify import NotPreserved, verifier
from qjax.program import Leaf, Program, shared_inputs

MOST_ZEROS = 0.1  # the share of exact zeros above which a weight counts as pruned

# (the first parameter of a class and its axes, the size, whether it must keep the ones) -> the matrix and its kind.
Matrices = Callable[[tuple[int, tuple[int, ...]], int, bool], tuple[np.ndarray, str]]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """One rotation that was done.

    Attributes:
      size: n, the length of the axis.
      kind: "hadamard" or "orthogonal", see `random_orthogonal`.
      keeps_ones: whether the matrix keeps the vector of ones, because a mean over the axis is taken.
      rotated: (path of a parameter, its axes that were multiplied by the matrix).
      scales: paths of the scales that moved into their readers first and are one now.
      error: relative change of the results, see `verify`.
      runs: whether a parameter's axes are flattened together and cut into runs of `size`, each of which is rotated: the heads of a flat
        axis. Else every one of its axes is rotated whole.
      zeros: (path of a weight, share of it that was exactly zero and is not any more), where there is any; of a stack the share of the
        layer that has most.
    """

    size: int
    kind: str
    keeps_ones: bool
    rotated: tuple[tuple[str, tuple[int, ...]], ...]
    scales: tuple[str, ...]
    error: float
    runs: bool = False
    zeros: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Rotated:
    """What `rotate` gives.

    Attributes:
      params: the parameters' new array leaves.
      rotations: one entry for each rotation that was done.
      refused: (path of a weight, why what it reads was not rotated).
      error: relative change of the results, see `verify`.
    """

    params: list[Any]
    rotations: tuple[Rotation, ...]
    refused: tuple[tuple[str, str], ...]
    error: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Scales:
    """Scales along an axis: which have equal elements now, which can get them by a fold, and why the others cannot."""

    even: Mapping[int, Mapping[int, frozenset[int]]]
    folds: Mapping[int, tuple[Fold, np.ndarray]]
    stuck: Mapping[int, str]


def rotate(
    program: Program,
    params: Sequence[Any],
    inputs: Sequence[Any],
    key: jax.Array,
    every: bool = False,
    tolerance: float | None = None,
    matrices: Matrices | None = None,
) -> Rotated:
    """Multiplies the residual stream of a program by a random orthogonal matrix, which spreads outlier channels over all channels.

    x -> x R,  W_in -> W_in R,  W_out -> R^T W_out,  b -> b R,  embedding rows e -> e R
    for everything that adds to the stream (weights, biases, embeddings) and everything that reads it. What stands in between is found by
    data flow (see `rotatable`): sums, root mean squares, means (R then keeps the vector of ones), products with what does
    not vary along the axis. A norm's scale moves into its readers before (a fold, see `find_fold`) and is one afterwards. The tree keeps
    its leaves and the program stays as it is. New parameters are computed in float64 and rounded once to their dtype. What was pruned is
    not sparse in another basis: a class with a weight that would lose exact zeros of more than `MOST_ZEROS` of it, or of one layer of it,
    is refused.

    Args:
      program: from `trace`.
      params: the parameters' array leaves.
      inputs: the array leaves of the other arguments: a batch on which every rotation is verified.
      key: a key of `jax.random`.
      every: also rotates values that no sum of two activations ties together, such as queries with their keys, and values between two
        linear layers; and the heads of values in a flat axis (see `qjax.graph.heads`), which one matrix rotates alike.
      tolerance: largest error accepted, see `verify`; by default `rounding(program)`, 64 times the spacing of the coarsest float type
        at 1. A rotation rounds every parameter it changes once, and sums in another order, so unlike a fold by powers of two it is
        exact in no element: a few spacings are expected.
      matrices: gives the matrix of a class of axes in place of a random one: called with the first of its parameters and axes, its
        size, and whether it must keep the ones.

    Returns:
      A `Rotated`. What would change the function by more than rounding is refused and left as it was.

    Raises:
      TypeError: a parameter that is no array of numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from qjax.program import trace
      >>> def fn(p, tokens):
      ...     x = p["embed"][tokens]
      ...     return (x + jnp.tanh(x @ p["in"]) @ p["out"]) @ p["head"]
      >>> shapes = {"embed": (7, 4), "head": (4, 5), "in": (4, 6), "out": (6, 4)}
      >>> p = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}
      >>> result = rotate(trace(fn, p, jnp.arange(3)), jax.tree.leaves(p), [jnp.arange(3)], jax.random.key(0))
      >>> result.rotations[0].rotated, result.rotations[0].kind
      ((('embed', (1,)), ('head', (0,)), ('in', (0,)), ('out', (1,))), 'hadamard')
      >>> result.refused
      (('out', 'its input cannot be rotated: `tanh`'),)

    Source: QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), section 4, stage 1a, and the rotation R1 of SpinQuant (Liu et al. 2024, arXiv
    2405.16406), both for lists of layers; here from the program; with `every` also their rotation R2 of heads. For rotations at run time
    (R3 and R4) see `qjax.online_rotation`.
    """
    for leaf in program.leaves:
        if not isinstance(params[leaf.index], (jax.Array, np.ndarray)):
            kind = type(params[leaf.index]).__name__
            raise TypeError(f"`params` leaf {leaf.path!r} is a {kind}: rotate the float parameters, before they are quantized")
    system = build(program)
    scales = _scales(system, params)

    def made(number: int) -> Matrices:
        return matrices if matrices is not None else functools.partial(_random, jax.random.fold_in(key, number))

    found = rotatable(program, scales.even)
    compare = verifier(program, params, inputs, tolerance)
    leaves, done, reasons, error = list(params), [], {}, 0.0
    for number, axes in enumerate(found):
        reason = _refusal(program, axes, scales, every)
        if not reason and axes.readers:
            answer = _one(program, axes, scales, leaves, made(number), compare)
            if isinstance(answer, str):
                reason = answer
            else:
                leaves, rotation = answer
                done.append(rotation)
                error = rotation.error
        reasons |= dict.fromkeys(axes.readers, reason)
    for number, one in enumerate(heads(system) if every else (), len(found)):
        if not all(reasons.get(site.key, "unknown") for site in one.readers):
            continue
        answer = _runs(program, one, leaves, made(number), compare)
        if isinstance(answer, str):
            reasons |= dict.fromkeys((site.key for site in one.readers), answer)
        elif answer is not None:
            leaves, rotation = answer
            done.append(rotation)
            error = rotation.error
            reasons |= dict.fromkeys((site.key for site in one.readers), "")
    read = [site for site in program.sites if site.op != "gather"]
    unknown = "its input cannot be rotated: parts of an axis are contracted"
    refused = dict.fromkeys((site.path, reasons.get(site.key, unknown)) for site in read)
    return Rotated(leaves, tuple(done), tuple((path, reason) for path, reason in refused if reason), error)


def _refusal(program: Program, axes: Rotatable, scales: _Scales, every: bool) -> str:
    """Why a class of axes is not to be rotated; "" if it is."""
    if axes.reasons:
        factors = dict.fromkeys((*(leaf for leaf, _ in axes.leaves), *axes.factors))
        stuck = [f"{program.leaves[leaf].path} scales it and {scales.stuck[leaf]}" for leaf in factors if leaf in scales.stuck]
        tied = next((program.leaves[leaf] for leaf, _ in axes.leaves if _is_tied(program.leaves[leaf])), None) if stuck else None
        why = [*stuck[:2], *axes.reasons[:3]][:3]
        if tied is not None:
            why.append(f"untie=True of qjax.rewrite gives the products of {tied.path}, which is looked up, too, a copy that can take it")
        return "its input cannot be rotated: " + "; ".join(why)
    if not axes.sums and not every:
        return "its input is no residual stream: no sum of two activations is made along it"
    return ""


def _is_tied(leaf: Leaf) -> bool:
    return len({site.op == "gather" for site in leaf.sites}) == 2


def _one(
    program: Program, axes: Rotatable, scales: _Scales, leaves: Sequence[Any], made: Matrices, compare: Any
) -> tuple[list[Any], Rotation] | str:
    """Rotates one class of axes and verifies it, or says why that failed."""
    r, kind = made(axes.leaves[0], axes.size, axes.keeps_ones)
    new, moved = list(leaves), []
    for leaf in axes.even:
        if leaf in scales.folds and not (np.asarray(new[leaf]) == 1).all():
            fold, s = scales.folds[leaf]
            new = apply_fold(fold, new, s)
            new[leaf] = np.ones_like(leaves[leaf])
            moved.append(program.leaves[leaf].path)
    for leaf, rotated in axes.leaves:
        new[leaf] = multiplied(new[leaf], r, rotated)
    zeros = _lost_zeros(program, leaves, new, axes.leaves)
    if refusal := _pruned(zeros):
        return refusal
    try:
        error = compare(new)
    except NotPreserved as failure:
        return f"its input was not rotated: {failure}"
    paths = tuple((program.leaves[leaf].path, rotated) for leaf, rotated in axes.leaves)
    return new, Rotation(axes.size, kind, axes.keeps_ones, paths, tuple(moved), error, zeros=zeros)


def _lost_zeros(
    program: Program, old: Sequence[Any], new: Sequence[Any], rotated: Iterable[tuple[int, Any]]
) -> tuple[tuple[str, float], ...]:
    """(path, share of exact zeros that a rotation filled in, see `most_of`) of the weights that have any; a bias is not pruned."""
    weights = {leaf for leaf, _ in rotated if program.leaves[leaf].sites}
    each = {program.leaves[i]: (np.asarray(old[i]) == 0) & (np.asarray(new[i]) != 0) for i in sorted(weights)}
    return tuple((leaf.path, max(most_of(lost, site.stacked) for site in leaf.sites)) for leaf, lost in each.items() if lost.any())


def most_of(mask: Any, stacked: Iterable[int]) -> float:
    """The share of a mask that is true, of the independent part that has most of it: one pruned layer is not made up for by full ones.

    Args:
      mask: bool (...,).
      stacked: axes that hold independent parts.

    Returns:
      A number from 0 to 1.

    Example:
      >>> most_of(np.array([[True, False], [False, False]]), (0,)), most_of(np.array([[True, False], [False, False]]), ())
      (0.5, 0.25)
    """
    apart = {axis % mask.ndim for axis in stacked}
    return float(mask.mean(axis=tuple(a for a in range(mask.ndim) if a not in apart)).max())


def _pruned(zeros: Iterable[tuple[str, float]]) -> str:
    """Why a class of axes is not rotated whose zeros would be lost; "" if they are few."""
    path, share = max(zeros, key=lambda each: each[1], default=("", 0.0))
    if share <= MOST_ZEROS:
        return ""
    return (f"its input was not rotated: {100 * share:.3g} % of {path} is exactly zero and would not be, what was pruned would come back; "
            "rotate before you prune, or leave the rotation out")  # fmt: skip


def _runs(
    program: Program, one: Heads, leaves: Sequence[Any], made: Matrices, compare: Any
) -> tuple[list[Any], Rotation] | str | None:
    """Rotates runs of channels of the largest size that keeps the function; None where none does; or says why that is refused."""
    for size in one.sizes:
        r, kind = made(one.leaves[0], size, False)
        new = list(leaves)
        for leaf, axes in one.leaves:
            new[leaf] = multiplied(new[leaf], r, axes, runs=True)
        zeros = _lost_zeros(program, leaves, new, one.leaves)
        if refusal := _pruned(zeros):
            return refusal
        try:
            error = compare(new)
        except NotPreserved:
            continue
        paths = tuple((program.leaves[leaf].path, axes) for leaf, axes in one.leaves)
        return new, Rotation(size, kind, False, paths, (), error, runs=True, zeros=zeros)
    return None


def _random(key: jax.Array, first: tuple[int, tuple[int, ...]], size: int, keeps_ones: bool) -> tuple[np.ndarray, str]:
    del first
    return random_orthogonal(size, key, keeps_ones)


def multiplied(w: Any, r: np.ndarray, axes: Sequence[int], runs: bool = False) -> Any:
    """Multiplies some axes of a parameter by a matrix, w'[..., j, ...] = sum_i w[..., i, ...] r[i, j]; in float64, rounded once.

    Args:
      w: the parameter.
      r: the matrix.
      axes: each is multiplied by it; or, with `runs`, they are flattened together and every run of the matrix's size is.
      runs: see `axes`.

    Returns:
      An array of the shape and dtype of `w`.

    Example:
      >>> multiplied(np.arange(4.0), np.array([[0.0, 1.0], [-1.0, 0.0]]), (0,), runs=True).tolist()
      [-1.0, 0.0, -3.0, 2.0]
    """
    return turned(np, np.asarray(w, np.float64), r, axes, runs).astype(w.dtype)


def turned(xp: Any, w: Any, r: Any, axes: Sequence[int], runs: bool) -> Any:
    """`multiplied` in the dtype of `w`; `xp` is NumPy or `jax.numpy`."""
    if not runs:
        for axis in axes:
            w = xp.moveaxis(xp.tensordot(w, r, (axis, 0)), -1, axis)
        return w
    order = [*(i for i in range(w.ndim) if i not in axes), *axes]
    moved = w.transpose(order)
    return (moved.reshape(-1, r.shape[0]) @ r).reshape(moved.shape).transpose([order.index(i) for i in range(w.ndim)])


def _scales(system: System, params: Sequence[Any]) -> _Scales:
    """Looks at the parameters that are factors: which are even along an axis, and which become so if they move into their readers."""
    program = system.program
    factors = {leaf.index for leaf in program.leaves if not leaf.sites and {"mul", "div"} & set(leaf.consumers)}
    even: dict[int, dict[int, frozenset[int]]] = {}
    for i in factors:
        even[i] = {a: frozenset({i}) for a in range(np.ndim(params[i])) if all_equal(params[i], a)}
    folds: dict[int, tuple[Fold, np.ndarray]] = {}
    stuck: dict[int, str] = {}
    uneven = {i for i in factors if np.ndim(params[i]) and len(even[i]) < np.ndim(params[i])}
    for group in shared_inputs(program) if uneven else ():
        fold = find_fold(system, group)
        for i in uneven - folds.keys():
            if isinstance(fold, Fold) and (scaling := next((s for s in fold.scalings if s.leaf == i), None)) is not None:
                answer = _by(program, fold, i, np.asarray(params[i], np.float64)) if (scaling.power == -1).all() else ""
                if isinstance(answer, np.ndarray):
                    folds[i] = fold, answer
                    even[i] = {a: frozenset({i}) for a in range(np.ndim(params[i]))}
                elif answer:
                    stuck[i] = answer
    stuck |= dict.fromkeys(uneven - folds.keys() - stuck.keys(), "cannot move into what reads it")
    return _Scales(even, folds, {i: reason for i, reason in stuck.items() if i not in folds})


def _by(program: Program, fold: Fold, leaf: int, gamma: np.ndarray) -> np.ndarray | str:
    """The scales of a fold that make one parameter all ones, or why there are none."""
    scaling = next(s for s in fold.scalings if s.leaf == leaf)
    makers = [program.leaves[s.leaf] for s in fold.scalings if (s.power < 0).any()]
    if any(maker.sites for maker in makers) or any({"mul", "div"} & set(m.consumers) for m in makers if m.index != leaf):
        return "other parameters would have to take its place"
    if (gamma == 0).any():
        return "has a zero"
    stacked = len(fold.stack)
    s = np.ones((fold.size, *fold.stack))
    channel = np.broadcast_to(scaling.channel, gamma.shape)
    inner = channel.reshape(*gamma.shape)[(0,) * stacked]
    if stacked and gamma.shape[:stacked] != fold.stack:
        return "is one for layers that have scales of their own"
    s[inner.ravel()] = np.moveaxis(gamma.reshape(*fold.stack, -1), -1, 0)
    s = np.moveaxis(s, 0, -1)
    same = (s[..., inner] if stacked else s[channel]) == gamma
    return s if same.all() else "differs where what reads it is shared"


