"""Batch norms that training through rounding folds anew in every step: which weight each scales, and by what."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import divide
from qjax.graph.batch_norm import Chain, Places, chain_after, computed, holds_constants, leaves_of, moved, places, weight_channels
from qjax.graph.labels import Label, nonzero
from qjax.graph.solve import System, build
from qjax.program import Program, check_function, split_arguments, trace

# A channel with a smaller factor adds nothing to any sum of float32, and what is divided by it would leave float32.
SMALLEST = 2.0**-80
# Errors of flax.errors: a variable that is not there, and one that may not be written.
_UNREAD = ("ScopeCollectionNotFound", "ScopeVariableNotFoundError", "ScopeParamNotFoundError")
_UPDATES = ("ModifyScopeVariableError",)


@dataclasses.dataclass(frozen=True, eq=False)
class WeightFold:
    """The batch norm behind one weight.

    Attributes:
      chain: its equations.
      places: where it is when it has moved.
      channels: which channel each element of the weight makes.
      reads: flat indices of the weight and of all parameters that it depends on.
    """

    chain: Chain
    places: Places
    channels: Label
    reads: frozenset[int]

    @property
    def weight(self) -> int:
        """The flat index of the weight."""
        return self.chain.site.leaf


@dataclasses.dataclass(frozen=True, eq=False)
class BatchNormFolds:
    """The batch norms of a function that `qjax.fake_quant(..., folds=...)` folds in every step. Built by `batch_norm_folds`.

    Attributes:
      system: the program in evaluation.
      by_path: the folds by the path of their weight.
      refused: (path of the weight, reason) for weights that a map follows which cannot move into them.
    """

    system: System
    by_path: Mapping[str, WeightFold]
    refused: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        refused = f", not {', '.join(path for path, _ in self.refused)}" if self.refused else ""
        return f"BatchNormFolds({', '.join(self.by_path)}{refused})"

    @property
    def read(self) -> frozenset[str]:
        """Paths of the weights and of all parameters that their batch norms read."""
        leaves = self.system.program.leaves
        return frozenset(leaves[i].path for fold in self.by_path.values() for i in fold.reads)

    def factors(self, params: Any) -> dict[str, jax.Array]:
        """By what the batch norm of each weight multiplies it, from parameters that may be traced.

        Args:
          params: the tree of parameters, with the batch norms' statistics.

        Returns:
          By the weight's path float32 arrays that broadcast against it; 0 for channels whose factor is below 2^-80.

        Raises:
          ValueError: `params` lacks a parameter that a batch norm reads.
        """
        arguments = split_arguments(params, (), {})
        where = self.aligned(arguments.paths, [tuple(jnp.shape(w)) for w in arguments.params], self.by_path)
        leaves = self.arranged(arguments.params, where)
        return {path: self.factor(fold, leaves) for path, fold in self.by_path.items()}

    def aligned(self, paths: Sequence[str], shapes: Sequence[tuple[int, ...]], weights: Collection[str]) -> dict[int, int]:
        """Finds what the folds of some weights read among the parameters of another function.

        Args:
          paths: paths of the parameters.
          shapes: their shapes.
          weights: paths of the weights.

        Returns:
          By the flat index of each parameter here, that of the same one there.

        Raises:
          ValueError: one is missing, or has another shape.
        """
        there, mine = {path: i for i, path in enumerate(paths)}, self.system.program.leaves
        where = {}
        for weight in weights:
            for i in sorted(self.by_path[weight].reads):
                leaf = mine[i]
                found = there.get(leaf.path)
                if found is None:
                    raise ValueError(f"`folds` need {leaf.path!r}, which the batch norm of {weight!r} reads and the parameters lack: the "
                                     "first argument must hold statistics too, of a Linen module all of its variables")  # fmt: skip
                if shapes[found] != leaf.shape:
                    raise ValueError(f"`folds` were made for {leaf.path!r} of shape {leaf.shape}, here it is {shapes[found]}: make them "
                                     "anew with qjax.batch_norm_folds")  # fmt: skip
                where[i] = found
        return where

    def arranged(self, leaves: Any, where: Mapping[int, int]) -> list[Any]:
        """Leaves of another function in the order of this one; None for those that no fold reads."""
        return [leaves[where[i]] if i in where else None for i in range(len(self.system.program.leaves))]

    def factor(self, fold: WeightFold, leaves: Sequence[Any]) -> jax.Array:
        """What `factors` says of one weight, from flat leaves."""
        factor = jnp.ones((), jnp.float32)
        for eqn, other in fold.chain.eqns:
            if eqn.name not in ("mul", "div"):
                continue
            value = jnp.ravel(jnp.asarray(computed(self.system, other, leaves), jnp.float32))
            value = value if value.size > 1 else value.reshape(())
            factor = factor * value if eqn.name == "mul" else factor / value
        factor = jnp.broadcast_to(factor, fold.chain.size)
        factor = jnp.where(jnp.abs(factor) < SMALLEST, 0.0, factor)
        placed = jnp.where(nonzero(fold.channels), factor[fold.channels.channel], 1.0)
        # Else XLA turns x / (a / b) into x b / a, in training and not in packing.
        return jax.lax.optimization_barrier(jax.lax.stop_gradient(placed))

    def moved(self, weights: Collection[str], leaves: Sequence[Any]) -> list[Any]:
        """The leaves with the batch norms of some weights multiplying by one, and their shifts in one place, as `fold_batch_norm` does.

        The weights stay as they are: they are to be multiplied by `factor`.
        """
        for weight in weights:
            fold = self.by_path[weight]
            leaves = moved(self.system, fold.chain, leaves, fold.places)
        return list(leaves)


def scaled(w: jax.Array, factor: jax.Array) -> jax.Array:
    """The folded weight, in float32."""
    return w.astype(jnp.float32) * factor


def unscaled(rounded: jax.Array, factor: jax.Array, w: jax.Array) -> jax.Array:
    """A folded and rounded weight back in the place of `w`, which stays where the factor is 0: the batch norm multiplies it by nothing."""
    dead = factor == 0
    factor = jnp.broadcast_to(jnp.where(dead, 1.0, factor), rounded.shape)
    return jnp.where(dead, w, divide(rounded, factor).astype(w.dtype))


def check_folds(folds: Any) -> None:
    """Refuses what is no `BatchNormFolds`.

    Raises:
      TypeError: naming the argument and what to write.
    """
    if folds is not None and not isinstance(folds, BatchNormFolds):
        raise TypeError(f"`folds` must be a value of qjax.batch_norm_folds(fn, params, *args) or None, got {type(folds).__name__}")


def batch_norm_folds(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> BatchNormFolds:
    """Finds the batch norms that training through rounding folds into the layers before them, in every step.

    y = (W x + b - mean) f + beta,  f = gamma / sqrt(var + eps)  in evaluation
    W_hat = Q(f W) / f  is what `qjax.fake_quant(fn, policy, folds=folds)` computes with

    f is that of the step's parameters, without a gradient, so that W is rounded as the folded network will hold it. On stored statistics
    W_hat gives the results of the folded network. A batch norm on the batch's statistics takes the scale of a channel out again, and that
    is folding with stored statistics, corrected by their ratio to the batch's: y = Q(f W) x sigma / sigma_batch + beta - gamma mean_batch
    / sigma_batch. The program stays as it is: stored statistics are those of W_hat x and follow as they do. `qjax.convert` folds and packs.

    Folding changes what training finds where channels share a scale (`per="tensor"`) or scales are learned. Where each channel has a
    scale of its own that comes from its weights, Q(f W) / f is Q(W) but for float rounding.

    Args:
      fn: the function in evaluation, whose batch norms run on stored statistics. What is trained may be another one, on the batch's
        statistics, with the same parameters; towards the end train this one, to freeze the statistics.
      params: its parameters, or their shapes. The statistics must be among them: of a Linen module, all variables; of an NNX
        module, `nnx.state(model)`.
      *args: its other arguments, or their shapes.
      **kwargs: keyword arguments, such as `train=False`.

    Returns:
      A `BatchNormFolds`, made once, outside of the step. `folds.by_path` names the weights, `folds.refused` those that a map follows
      which cannot move.

    Raises:
      TypeError: `fn` is no function, or a module of Flax in place of one.
      ValueError: no batch norm follows a weight; `params` lacks collections that a Linen module reads, or the module is in training.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> def evaluate(p, x):
      ...     return (x @ p["w"] - p["mean"]) * (jax.lax.rsqrt(p["var"]) * p["gamma"]) + p["beta"]
      >>> def train(p, x):
      ...     h = x @ p["w"]
      ...     return (h - h.mean(0)) * (jax.lax.rsqrt(h.var(0)) * p["gamma"]) + p["beta"]
      >>> ones = jnp.ones(2)
      >>> p = {"beta": 0 * ones, "gamma": ones, "mean": 0 * ones, "var": jnp.array([1.0, 64.0]), "w": jnp.array([[3.5, 20.0], [1.2, 3.0]])}
      >>> folds, x = qjax.batch_norm_folds(evaluate, p, jnp.eye(2)), jnp.eye(2)
      >>> folds, folds.factors(p)["w"].tolist()
      (BatchNormFolds(w), [[1.0, 0.125]])
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(per="tensor", scale_rule="full"))])
      >>> fq = qjax.fake_quant(train, policy, folds=folds)
      >>> fq.leaves(p, x)(p)["w"].tolist()  # in steps of 0.5, and of 4 where the batch norm divides by 8
      [[3.5, 20.0], [1.0, 4.0]]
      >>> packed = qjax.convert(fq, p, x).params
      >>> packed["w"].dequantize().tolist(), packed["gamma"].tolist()
      ([[3.5, 2.5], [1.0, 0.5]], [1.0, 8.0])

    Source: Jacob et al. 2017, arXiv 1712.05877, section 3.2; Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2, whose statistics of a
    batch are those of the float layer, run a second time for them; here those of the rounded one. Where f is 0, W_hat is W.
    """
    program = _traced(fn, params, args, kwargs)
    system, found, refused = build(program), {}, []
    for site in program.sites:
        chain = chain_after(system, site)
        if chain is None:
            continue
        at = places(system, chain)
        if any(holds_constants(system, other) for _, other in chain.eqns):
            at = "its batch norm reads arrays that `fn` closes over, such as statistics: put them among `params`"
        if isinstance(at, str):
            refused.append((site.path, at))
        else:
            reads = {site.leaf}.union(*(leaves_of(system, other) or () for _, other in chain.eqns))
            found[site.path] = WeightFold(chain, at, weight_channels(system, chain), frozenset(reads))
    if not found:
        reasons = f" and folds into ({'; '.join(f'{path!r}: {reason}' for path, reason in refused)})" if refused else ""
        raise ValueError(f"`fn` has no weight that a batch norm on stored statistics follows{reasons}: give the function in evaluation "
                         "(train=False; of an NNX module after model.eval()) and its statistics among `params`")  # fmt: skip
    return BatchNormFolds(system, found, tuple(refused))


def _traced(fn: Any, params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
    """The program, or what Flax says against it in the words of the arguments here."""
    check_function(fn, "give model.apply of a Linen module with its variables, qjax.nnx.function(model) of an NNX one with "
                       "nnx.state(model)")  # fmt: skip
    if not jax.tree.leaves(params):
        raise ValueError(f"`params` holds no arrays, got {params!r}: give the function's parameters with the batch norms' statistics")
    # A function that applies a module may raise Flax's errors; where that was never imported there are none to catch.
    flax = vars(sys.modules["flax.errors"]) if "flax.errors" in sys.modules else {}
    unread = tuple(flax[name] for name in _UNREAD if name in flax)
    updates = tuple(flax[name] for name in _UPDATES if name in flax)
    try:
        return trace(fn, params, *args, **kwargs)
    except updates as error:
        raise ValueError(f"`fn` updates its statistics, as in training ({_said(error)}): give the function in evaluation, train=False or "
                         "use_running_average=True; what is trained may be another one") from error  # fmt: skip
    except unread as error:
        got = ", ".join(map(repr, list(params)[:3])) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"`params` lacks what the module reads ({_said(error)}), got {got}: give all of its variables as model.init "
                         "returns them, {'params': ..., 'batch_stats': ...}") from error  # fmt: skip


def _said(error: BaseException) -> str:
    """Flax's message without the address of its page."""
    return str(error).split(" (http")[0].rstrip(".")
