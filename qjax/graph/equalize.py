"""Cross-layer equalization: two layers with nothing but positively homogeneous functions between them share their range."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.graph.fold import Fold, Scaling, apply_fold, find_fold
from qjax.graph.solve import System, build
from qjax.graph.verify import verify
from qjax.program import Program, Site, shared_inputs

ITERATIONS = 50
CONVERGED = 1e-3  # largest |log s| of a round that still counts as movement


@dataclasses.dataclass(frozen=True)
class Pair:
    """One equalized pair of layers.

    Attributes:
      producers: paths of the weights that make the channels.
      consumers: paths of the weights that read them.
      spread: exp of the root mean square of log(r_i / r), before and after, where r_i is the range of a channel, in the producers and
        in the consumers, and r the geometric mean on its side: the factor by which ranges of channels differ, 1 if they are alike. No
        scales of the pair make it smaller; what other pairs do to the same weights may make it larger.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    spread: tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Equalized:
    """What `equalize` gives.

    Attributes:
      params: the parameters' new array leaves.
      pairs: the pairs of layers that were equalized.
      refused: (path of the consumer, reason) for the other sites.
      rounds: rounds until the scales stood still.
      error: relative change of the results, see `verify`.
    """

    params: list[Any]
    pairs: tuple[Pair, ...]
    refused: tuple[tuple[str, str], ...]
    rounds: int
    error: float


def equalize(program: Program, params: Sequence[Any], inputs: Sequence[Any], iterations: int = ITERATIONS) -> Equalized:
    """Gives the channels between two layers equal ranges on both sides, all pairs in turn until nothing moves.

    s_i = sqrt(r1_i / r2_i),  W1[:, i] -> W1[:, i] / s_i,  b1_i -> b1_i / s_i,  W2[i, :] -> W2[i, :] * s_i
    where r1_i = max |W1[:, i]| and r2_i = max |W2[i, :]|, so that both become sqrt(r1_i r2_i).

    Args:
      program: from `trace`.
      params: the parameters' array leaves.
      inputs: the array leaves of the other arguments: a batch on which the rewrite is verified.
      iterations: most rounds over all pairs.

    Returns:
      An `Equalized`.

    Raises:
      NotPreserved: the function changed by more than rounding.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from qjax.program import trace
      >>> p = [jnp.array([[1.0, 100.0]]), jnp.array([[4.0], [1.0]])]
      >>> x = jnp.ones((3, 1))
      >>> program = trace(lambda p, x: jax.nn.relu(x @ p[0]) @ p[1], p, x)
      >>> result = equalize(program, p, [x])
      >>> result.params[0].tolist(), result.params[1].tolist()
      ([[2.0, 10.0]], [[2.0], [10.0]])

    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1, equation 11 (their s_i is r1_i / sqrt(r1_i r2_i), the same number). Theirs
    lists pairs joined by ReLU; here a pair is any fold whose producer is a linear layer, so heads that share a value projection and
    gated products take part. Their measure of a pair (equations 8 and 9) stays as it is where one channel is the largest on both
    sides, however much the others gain; `Pair.spread` does not. Scales of norms and batch norms are kept: fold batch norms first.
    """
    system = build(program)
    folds, refused = _pairs(system)
    before = [_spread(*pair, params) for pair in folds]
    leaves, rounds, moved = list(params), 0, bool(folds)
    while moved and rounds < iterations:
        rounds, moved = rounds + 1, False
        for fold, producers, consumers in folds:
            first, second = _ranges(fold, producers, leaves, -1.0), _ranges(fold, consumers, leaves, 1.0)
            dead = (first == 0) | (second == 0)
            s = np.where(dead, 1.0, np.sqrt(first / np.where(dead, 1.0, second)))
            moved |= bool(np.abs(np.log(s)).max(initial=0.0) > CONVERGED)
            leaves = apply_fold(fold, leaves, s)
    after = [_spread(*pair, leaves) for pair in folds]
    pairs = tuple(
        Pair(tuple(s.path for s in producers), tuple(s.path for s in consumers), (b, a))
        for (_, producers, consumers), b, a in zip(folds, before, after, strict=True)
    )
    return Equalized(leaves, pairs, refused, rounds, verify(program, params, leaves, inputs))


def _pairs(system: System) -> tuple[list[tuple[Fold, list[Scaling], list[Scaling]]], tuple[tuple[str, str], ...]]:
    leaves = system.program.leaves
    factors = [leaf.index for leaf in leaves if not leaf.sites and {"mul", "div"} & set(leaf.consumers)]
    linear = {leaf.index for leaf in leaves if leaf.sites and all(site.op != "gather" for site in leaf.sites)}
    folds, refused = [], []
    for group in shared_inputs(system.program):
        fold = find_fold(system, group, keep=factors)
        if isinstance(fold, Fold):
            producers = [s for s in fold.scalings if s.leaf in linear and (s.power == -1).any()]
            consumers = [s for s in fold.scalings if s.leaf in _leaves(group)]
            if producers:
                folds.append((fold, producers, consumers))
                continue
        reason = "no linear layer makes its input" if isinstance(fold, Fold) else fold.reason
        refused += [(site.path, reason) for site in group]
    return folds, tuple(refused)


def _leaves(group: Sequence[Site]) -> set[int]:
    return {site.leaf for site in group}


def _ranges(fold: Fold, scalings: Sequence[Scaling], leaves: Sequence[Any], power: float) -> np.ndarray:
    """Largest magnitude of each channel over the parts of some parameters that are scaled with one power: shape `fold.shape`."""
    layers, out = len(fold.stack), np.zeros((fold.size, *fold.stack))
    for scaling in scalings:
        w = np.abs(np.asarray(leaves[scaling.leaf], np.float64))
        same = tuple(i for i, n in enumerate(scaling.power.shape) if n == 1 and i >= layers)
        peaks = w.max(axis=same, keepdims=True)
        shape = scaling.power.shape[layers:]
        chosen = (scaling.power == power).reshape(shape)
        np.maximum.at(out, scaling.channel.reshape(shape)[chosen], np.moveaxis(peaks[..., chosen], -1, 0))
    return np.moveaxis(out, 0, -1)


def _spread(fold: Fold, producers: Sequence[Scaling], consumers: Sequence[Scaling], leaves: Sequence[Any]) -> float:
    """See `Pair.spread`; channels that are zero on a side do not count, layers of a stack have a mean of their own."""
    sides = np.stack([_ranges(fold, producers, leaves, -1.0), _ranges(fold, consumers, leaves, 1.0)])
    live = (sides > 0).all(axis=0)
    logs = np.log(np.where(live, sides, 1.0))
    count = np.maximum(live.sum(axis=-1, keepdims=True), 1)
    off = np.where(live, logs - logs.sum(axis=-1, keepdims=True) / count, 0.0)
    return float(np.exp(np.sqrt(np.square(off).sum() / max(2 * live.sum(), 1))))
