"""Learned rotations: the matrices of `qjax.rotation` trained on the orthogonal manifold, through fake quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from qjax.calibration import as_batches
from qjax.core import check_key
from qjax.core.specs import as_count, check_flag, check_number
from qjax.graph import NotPreserved, Rotation, rotate
from qjax.graph import untie as take_apart
from qjax.graph.orthogonal import random_orthogonal
from qjax.graph.rotate import turned
from qjax.policy import Policy, check_policy
from qjax.program import Program, check_function, split_arguments
from qjax.program.trace import trace_arguments
from qjax.training.fake_quant import fake_quant

Loss = Callable[..., jax.Array]
First = tuple[int, tuple[int, ...]]  # the first parameter of a class of axes, and its axes


class Turn(NamedTuple):
    """One matrix: which parameters it multiplies along which axes, and how (see `qjax.graph.Rotation`)."""

    leaves: tuple[First, ...]
    size: int
    keeps_ones: bool
    runs: bool


@dataclasses.dataclass(frozen=True)
class LearnedRotation:
    """Parameters that were rotated by learned matrices.

    Attributes:
      params: the tree of parameters for `fn`; in float it computes what the old one did.
      fn: the function that takes them: the one given, unless `untie` changed it.
      rotations: what was rotated, as `qjax.graph.rotate` reports it.
      matrices: float64 (n, n), the matrix of each of `rotations`.
      losses: on all batches with the random matrices, then at each step on its batch, and on all batches with those that were kept, the
        best of ten looks on the way.
      refused: (path of a weight, why what it reads was not rotated).
      error: relative change of the float results.
    """

    params: Any
    fn: Callable[..., Any]
    rotations: tuple[Rotation, ...]
    matrices: tuple[np.ndarray, ...]
    losses: tuple[float, ...]
    refused: tuple[tuple[str, str], ...]
    error: float


def learn_rotation(
    fn: Callable[..., Any],
    params: Any,
    policy: Policy,
    calibration: Iterable[Any],
    *,
    key: jax.Array,
    steps: int = 100,
    learning_rate: float = 0.002,
    optimizer: optax.GradientTransformation | None = None,
    loss: Loss | None = None,
    every: bool = True,
    untie: bool = False,
) -> LearnedRotation:
    """Learns the rotations that make a model lose least when it is quantized by a policy.

    Minimises L(R) = loss of the fake-quantized function at the rotated parameters over orthogonal R, from a random Hadamard matrix on:
    A = G R^T - R G^T,  U = optimizer(A), made skew,  R <- (I + U/2)^-1 (I - U/2) R   with G = dL / dR
    a Cayley transform, which is orthogonal for every skew U. The fake quantization rounds weights and activations as the
    policy says, to nearest; afterwards quantize the result with any method.

    Args:
      fn: any JAX function whose first argument is `params`.
      params: the float parameters.
      policy: what the weights and activations become.
      calibration: batches, as for `qjax.quantize`; step i takes batch i modulo their number.
      key: a key of `jax.random`, for the matrices to start from.
      steps: how many. With 0 it is the random rotation.
      learning_rate: of the default optimizer, falling linearly to zero; radians, about, a step of Adam turns by.
      optimizer: of optax, for the skew matrices; None is Adam with that rate. One that is not odd and element by element makes
        updates that are not skew: their symmetric part is dropped.
      loss: (outputs of the quantized function, *batch) -> a scalar, the task's loss; None is the squared error of its outputs to those of
        the float function, as a share of their squares.
      every: also rotates what no residual sum ties, such as the heads of values (R2); see `qjax.rotation`.
      untie: see `qjax.rewrite`.

    Returns:
      A `LearnedRotation`.

    Raises:
      TypeError, ValueError: an argument of the wrong kind or out of range; nothing can be rotated; the rotation does not keep the function;
        a loss that is not finite.

    Example:
      >>> import qjax
      >>> def fn(p, x):
      ...     return jnp.tanh(x @ p["a"] @ p["b"])
      >>> p = {"a": jax.random.normal(jax.random.key(0), (6, 8)), "b": jax.random.normal(jax.random.key(1), (8, 4))}
      >>> x = jax.random.normal(jax.random.key(2), (32, 6))
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.int3())])
      >>> learned = learn_rotation(fn, p, policy, [x], key=jax.random.key(0), steps=20)
      >>> learned.losses[-1] < learned.losses[0], bool(jnp.allclose(fn(learned.params, x), fn(p, x), atol=1e-5))
      (True, True)

    Source: SpinQuant (Liu et al. 2024, arXiv 2405.16406), section 3.3, R1 and R2; Li, Fuxin and Todorovic 2020 (arXiv 2002.01113), Cayley
    SGD. Where we differ: the Cayley transform is solved exactly, not by fixed-point iterations; any optax optimizer in place of
    momentum SGD with a rate of 1.5; the default loss needs no labels; activations and weights are both rounded while learning
    (SpinQuant learns on float weights where GPTQ follows: give `policy` a fine weight spec for that); the best matrices are kept.
    """
    check_function(fn)
    check_policy(policy)
    check_key("key", key)
    check_flag("every", every)
    check_flag("untie", untie)
    steps = as_count("steps", steps, 0)
    _check_learning(learning_rate, optimizer, loss)
    batches = as_batches(calibration)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batches)):
        raise ValueError("`calibration` holds shapes, but rotations are learned on data: give batches of numbers")
    if untie:
        apart = take_apart(fn, params, *batches[0])
        fn, params = apart.fn, apart.params
    arguments = split_arguments(params, batches[0], {})
    program = trace_arguments(fn, arguments)
    drawn: dict[tuple[First, int], np.ndarray] = {}

    def draw(first: First, size: int, keeps_ones: bool) -> tuple[np.ndarray, str]:
        r, kind = random_orthogonal(size, jax.random.fold_in(key, len(drawn)), keeps_ones)
        drawn[first, size] = r
        return r, kind

    ready = rotate(program, arguments.params, arguments.inputs, key, every, matrices=draw)
    turns = _turns(program, ready.rotations)
    if not turns:
        reasons = "; ".join(dict.fromkeys(reason for _, reason in ready.refused)) or "it has no value between two layers"
        raise ValueError(f"`fn` has nothing to rotate: {reasons}")
    start = [jnp.eye(turn.size, dtype=jnp.float32) for turn in turns]  # the learned matrix is the drawn one times this one
    whole = [jnp.asarray(w) for w in ready.params]

    def rebuilt(leaves: Sequence[Any]) -> Any:
        return arguments.rebuild([*leaves], arguments.inputs)[0]

    objective = _objective(fn, policy, turns, loss, rebuilt, params)
    if optimizer is None:
        optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, max(steps, 1)))
    matrices, losses = _learn(objective, start, turns, whole, batches, steps, optimizer)
    for turn, r in zip(turns, matrices, strict=True):
        drawn[turn.leaves[0], turn.size] = drawn[turn.leaves[0], turn.size] @ _nearest(r, turn.keeps_ones)
    final = rotate(program, arguments.params, arguments.inputs, key, every, matrices=lambda first, size, _: (drawn[first, size], "learned"))
    if len(final.rotations) != len(turns):
        raise NotPreserved(f"the learned rotations change the function: {final.refused}")
    new = [old if w is old else jnp.asarray(w) for old, w in zip(arguments.params, final.params, strict=True)]
    found = tuple(drawn[turn.leaves[0], turn.size] for turn in turns)
    return LearnedRotation(rebuilt(new), fn, final.rotations, found, losses, final.refused, final.error)


def _check_learning(learning_rate: Any, optimizer: Any, loss: Any) -> None:
    check_number("learning_rate", learning_rate, positive=True)
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"`optimizer` must be an optax transformation such as optax.sgd(0.1), or None, got {optimizer!r}")
    if loss is not None and not callable(loss):
        raise TypeError(f"`loss` must be a function of (outputs, *batch), or None, got {loss!r}")


def cayley(u: jax.Array, r: jax.Array) -> jax.Array:
    """Turns an orthogonal matrix along a skew one: (I + U/2)^-1 (I - U/2) R.

    Args:
      u: (n, n), skew: its symmetric part is dropped.
      r: (n, n), orthogonal.

    Returns:
      (n, n), orthogonal.

    Example:
      >>> u = jnp.array([[0.0, 0.2], [-0.2, 0.0]])
      >>> r = cayley(u, jnp.eye(2))
      >>> bool(jnp.allclose(r @ r.T, jnp.eye(2), atol=1e-6)), round(r[0, 1].item(), 3)
      (True, -0.198)
    """
    half, eye = (u - u.T) / 4, jnp.eye(u.shape[0], dtype=u.dtype)
    return jnp.linalg.solve(eye + half, jnp.matmul(eye - half, r, precision=lax.Precision.HIGHEST))


def skew_gradient(g: jax.Array, r: jax.Array, keeps_ones: bool) -> jax.Array:
    """G R^T - R G^T, the direction of steepest ascent in the skew matrices, or in those of them that leave the vector of ones alone."""
    a = jnp.matmul(g, r.T, precision=lax.Precision.HIGHEST)
    a = a - a.T
    if keeps_ones:
        a = a - a.mean(0, keepdims=True)
        a = a - a.mean(1, keepdims=True)
    return a


def _turns(program: Program, rotations: Sequence[Rotation]) -> tuple[Turn, ...]:
    index = {leaf.path: leaf.index for leaf in program.leaves}
    return tuple(Turn(tuple((index[path], axes) for path, axes in r.rotated), r.size, r.keeps_ones, r.runs) for r in rotations)


def rotated_leaves(leaves: Sequence[jax.Array], turns: Sequence[Turn], matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """The parameters, multiplied by the matrices: float32, then their own dtype."""
    new = list(leaves)
    for turn, r in zip(turns, matrices, strict=True):
        for leaf, axes in turn.leaves:
            new[leaf] = turned(jnp, new[leaf].astype(jnp.float32), r, axes, turn.runs)
    return [w.astype(old.dtype) for w, old in zip(new, leaves, strict=True)]


def _objective(
    fn: Callable[..., Any], policy: Policy, turns: Sequence[Turn], loss: Loss | None, rebuilt: Callable[..., Any], params: Any
) -> Callable[..., jax.Array]:
    """(matrices, leaves, batch) -> the loss of the fake-quantized function."""
    quantized = fake_quant(fn, policy)

    def objective(matrices: Sequence[jax.Array], leaves: Sequence[jax.Array], batch: tuple[Any, ...]) -> jax.Array:
        made = quantized(rebuilt(rotated_leaves(leaves, turns, matrices)), *batch)
        if loss is not None:
            return jnp.asarray(loss(made, *batch), jnp.float32)
        return squared_error(made, lax.stop_gradient(fn(params, *batch)))

    return objective


def squared_error(made: Any, wanted: Any) -> jax.Array:
    """|made - wanted|^2 / |wanted|^2 over the float leaves of two trees."""
    pairs = [(a, b) for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True) if jnp.issubdtype(b.dtype, jnp.floating)]
    error = sum((jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))) for a, b in pairs), jnp.float32(0))
    whole = sum((jnp.sum(jnp.square(b.astype(jnp.float32))) for _, b in pairs), jnp.float32(0))
    return error / jnp.maximum(whole, 1e-30)


def _learn(
    objective: Callable[..., jax.Array],
    start: list[jax.Array],
    turns: Sequence[Turn],
    leaves: Sequence[jax.Array],
    batches: Sequence[tuple[Any, ...]],
    steps: int,
    optimizer: optax.GradientTransformation,
) -> tuple[list[jax.Array], tuple[float, ...]]:
    """Runs the steps; gives the best matrices seen and the losses."""

    @jax.jit
    def step(matrices: list[jax.Array], state: Any, leaves: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(objective)(matrices, leaves, batch)
        skew = [skew_gradient(g, r, t.keeps_ones) for g, r, t in zip(gradients, matrices, turns, strict=True)]
        updates: Any
        updates, state = optimizer.update(skew, state, skew)
        # An optimizer gives what is added; the Cayley transform turns against its argument.
        return [cayley(-u, r) for u, r in zip(updates, matrices, strict=True)], state, value

    def over_all(matrices: list[jax.Array]) -> float:
        return float(np.mean([float(measure(matrices, leaves, batch)) for batch in batches]))

    measure = jax.jit(objective)
    state, losses, matrices = optimizer.init(start), [], start
    first = over_all(start)
    best, least = start, first
    checks = {-(-steps * i // 10) for i in range(1, 11)}
    for number in range(steps):
        matrices, state, value = step(matrices, state, leaves, batches[number % len(batches)])
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise ValueError(f"the loss at step {number} is {losses[-1]}: lower `learning_rate`, or look at `loss` and the data")
        if number + 1 in checks and (here := over_all(matrices)) < least:
            best, least = matrices, here
    return best, (first, *losses, least)


def _nearest(r: jax.Array, keeps_ones: bool) -> np.ndarray:
    """The nearest orthogonal matrix (that keeps the ones), in float64: what rounding has left of one is undone."""
    wide, n = np.asarray(r, np.float64), r.shape[0]
    if not keeps_ones:
        u, _, vt = np.linalg.svd(wide)
        return u @ vt
    rest = np.eye(n) - 1 / n
    u, _, vt = np.linalg.svd(rest @ wide @ rest)
    return u[:, :-1] @ vt[:-1] + 1 / n
