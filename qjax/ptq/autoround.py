"""AutoRound as a method: the rounding and the ranges of weights are tuned by signed gradient descent on what a block makes of the data."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.calibration import SecondMoment, hessian
from qjax.core import IntSpec, LearnedSpec, QTensor, blocks
from qjax.core.specs import check_count, check_flag, is_number
from qjax.ptq.candidates import Rescaling
from qjax.ptq.data import unseen_note
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.parts import check_matrix_blocks, check_not_cast, for_each_matrix, matrices, packed
from qjax.ptq.range_search import SHRINK
from qjax.ptq.rtn import rtn
from qjax.ptq.signed_descent import Descent, Offsets, decode, descend, round_with, start, stored
from qjax.ptq.work import Work, matrix_sizes

Unit = Literal["auto", "site"]


@dataclasses.dataclass(frozen=True)
class AutoRound:
    """See `autoround`."""

    steps: int
    lr: float | None
    batch_size: int
    minmax: bool
    mse: bool
    block: Unit
    span: int
    checks: int
    seed: int

    @property
    def name(self) -> str:
        usual = autoround()
        changed = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(usual, f.name)]
        return f"autoround({', '.join(f'{name}={value}' for name, value in changed)})" if changed else "autoround"

    @property
    def observer(self) -> SecondMoment:
        return SecondMoment()

    @property
    def needs_float(self) -> bool:
        return self.block == "auto"

    @property
    def descent(self) -> Descent:
        return Descent(self.steps, 1 / self.steps if self.lr is None else self.lr, self.minmax, self.mse, self.checks)

    def shapes(self, problem: Problem) -> QTensor:
        check_tuned(problem)
        return jax.eval_shape(lambda w: rtn().quantize(problem._replace(w=w)).q, problem.w)

    def quantize(self, problem: Problem, state: Any) -> Outcome:
        """Tunes a weight by itself, on the second moment of its inputs: |X w - X w_hat|^2 of all the data in each step."""
        spec = check_tuned(problem)
        seen = np.zeros(1, bool) if state is None else np.asarray(jnp.any(state.total != 0, axis=(1, 2)))
        unseen = (unseen_note(seen, "rounded"),) if not seen.all() else ()
        if state is None or not seen.any():
            return Outcome(rtn(mse=self.mse).quantize(problem).q, unseen)
        w = matrices(problem)
        codes, losses = _tune(w, for_each_matrix(problem, hessian(state)), spec, self.descent)
        best, rounding = np.asarray(losses).sum(axis=0)
        note = f"tuned alone: the error of its output is {best / rounding if rounding else 1:.3g} of that of rounding"
        return Outcome(packed(problem, *codes), (note, *unseen))

    def work(self, problem: Problem) -> Work:
        stack, n, k = matrix_sizes(problem)
        return Work(4.0 * n * k * k, 2 * n * k).times(stack * self.steps).plus(self.searching(problem))

    def searching(self, problem: Problem) -> Work:
        """The search of the ranges to start with."""
        return Work(steps=math.prod(problem.w.shape) * (len(SHRINK) if self.mse else 1))


def autoround(
    steps: int = 200,
    lr: float | None = None,
    batch_size: int = 1,
    minmax: bool = True,
    mse: bool = True,
    block: Unit = "auto",
    span: int = 2,
    checks: int = 2,
    seed: int = 0,
) -> AutoRound:
    """AutoRound (SignRound): tunes the rounding and the range of every weight of a block together, by signed gradient descent.

    w_hat = s (clip(round(w / s + V) + z, q_min, q_max) - z),  s and z of the range beta min(w) .. alpha max(w),
    |V| <= 1/2,  0 < alpha, beta <= 1 (a floating z is added before rounding):
    V, alpha, beta <- V, alpha, beta - lr (1 - t / steps) sign(gradient)
    of |block(x_hat; w_hat) - block(x; w)|^2: x_hat is what the quantized program before the block makes of a calibration batch, x what
    the float one does. Rounding counts as the identity in the gradient.

    Blocks are found by data flow: the program is cut where one value crosses that depends on data and parameters (between the
    branches of a residual network), whatever the architecture. A function without such cuts is one block. Other methods may
    stand in the same block: what needs no data is rounded before the block is tuned, what needs data is quantized after it, on the
    activations of the tuned weights. A parameter that the block cannot tune (used by several sites or by the turns of a loop, or in
    front of a `while`, or within a call with a derivative of its own) is tuned by itself on |X w - X w_hat|^2 over all the data; the
    report says so, and what was gained.
    While a block is tuned, what enters it and what it should make is held for all batches, in memory also with `spill=`; it counts in
    `report.memory`.

    Args:
      steps: gradient steps; time grows with them. On the shipped model 1000 gained nothing over 200.
      lr: the rate of the first step, in units of the scale; None takes 1 / steps. It falls linearly to zero.
      batch_size: calibration batches of a step. A program knows no axis of samples, so batches are taken as the caller cut them: give
        batches of 8 samples, as the authors have it, or batches of one and `batch_size=8`.
      minmax: tune the ranges, too.
      mse: start from searched ranges (see `rtn`), which is better at 2 bits; False starts from the extreme values, as the authors do.
      block: "auto" for blocks, "site" to tune every weight by itself on its own output, all data in each step.
      span: how many stretches between two cuts make a block. Of a transformer two are a layer.
      checks: how often, at equal distances, the error over all of the data is measured; the best is kept, plain rounding among the
        candidates. On the shipped model it was always the last; with a large `lr` it need not be.
      seed: of the order in which batches are taken, each once before any comes twice. The same seed gives the same codes.

    Returns:
      A method for `qjax.Rule`. Needs calibration data, and float activations: with an `activation` in the rule, weights are tuned
      on the block as it is without.

    Raises:
      ValueError, TypeError: an option out of range. By `qjax.quantize`: a spec that is no grid of integers.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"])
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.int2(), method=qjax.autoround(steps=20))])
      >>> x = jnp.sin(jnp.arange(128.0).reshape(8, 16) ** 2)
      >>> result = qjax.quantize(fn, {"w": jnp.cos(jnp.arange(64.0)).reshape(16, 4)}, policy, [x])
      >>> result.report.rows[0].method
      'autoround(steps=20)'

    Source: Cheng et al. 2023, arXiv 2309.05516, equations 3 to 6 and algorithm 1; intel/auto-round. There the best step is that with the
    least loss of its own batch; here all of the data is looked at, half way and at the end. A factor may not fall below
    1/16. A symmetric grid has one factor (there the larger of both ends).
    """
    for argument, value in (("steps", steps), ("batch_size", batch_size), ("span", span), ("checks", checks)):
        check_count(argument, value, 1)
    check_count("seed", seed, 0)
    if lr is not None and not (is_number(lr) and 0 < lr <= 1):
        raise ValueError(f"`lr` must be above 0 and at most 1, or None for 1 / steps, got {lr!r}")
    for argument, value in (("minmax", minmax), ("mse", mse)):
        check_flag(argument, value)
    if block not in get_args(Unit):
        raise ValueError(f"`block` must be one of {', '.join(map(repr, get_args(Unit)))}, got {block!r}")
    return AutoRound(steps, None if lr is None else float(lr), batch_size, minmax, mse, block, span, checks, seed)


def blockwise(method: Any) -> AutoRound | None:
    """The method that tunes a weight with its block: itself, or what a method that rescales (`awq(then=...)`) hands on to; or None.

    Raises:
      ValueError: the method makes more of a weight than `then` rounds (a low-rank part, a rotation): in a block that would be left out.
    """
    if isinstance(method, AutoRound):
        return method if method.block == "auto" else None
    then = getattr(method, "then", None)
    found = None if then is None else blockwise(then)
    if found is not None and not isinstance(method, Rescaling):
        alone = dataclasses.replace(found, block="site")
        raise ValueError(
            f"`then` of `method` {method.name} tunes a weight with its block, where only what it rounds to is known, not what else the "
            f'method makes of it: tune it by itself, qjax.autoround(block="site"), here {alone.name}'
        )
    return found


def check_tuned(problem: Problem) -> IntSpec:
    """The spec, if it is one whose rounding can be tuned.

    Raises:
      ValueError: naming the weight and what to take in place.
    """
    spec = problem.spec
    check_not_cast(problem, "autoround")
    if not isinstance(spec, IntSpec):
        others = "qjax.kmeans" if isinstance(spec, LearnedSpec) else "qjax.gptq, qjax.awq, qjax.rtn"
        raise ValueError(
            f"`method` autoround tunes the rounding on a uniform grid, but {problem.name!r} becomes {spec}: take an integer spec such as "
            f"qjax.int4(), or another method ({others}) for this one"
        )
    check_matrix_blocks(problem, "autoround")
    return spec


@functools.partial(jax.jit, static_argnums=(2, 3))
def _tune(w: jax.Array, h: jax.Array, spec: IntSpec, descent: Descent) -> Any:
    """Tunes matrices (stack, N, K) by themselves; codes and grids, and (stack, 2) the losses of the best and of rounding."""

    def one(pair: tuple[jax.Array, jax.Array]) -> Any:
        w, h = pair
        x, canonical = blocks(w, spec)
        k = w.shape[1]

        def loss(offsets: Offsets, t: Any = None) -> jax.Array:
            del t
            return _quadratic(canonical(decode(round_with(x, offsets, spec)))[:, :k] - w, h)

        plain = start(x, spec, False)
        found = descend(loss, loss, plain, start(x, spec, True) if descent.mse else plain, descent)
        return tuple(stored(round_with(x, found.best, spec), spec, canonical)), jnp.stack([found.least, found.rounding])

    # One after another, not batched: a matrix of a stack gets the same bits as one that stands alone.
    return lax.map(one, (w, h))


@jax.custom_jvp
def _quadratic(delta: jax.Array, h: jax.Array) -> jax.Array:
    """tr(D H D^T); its gradient, 2 D H for a symmetric H, is of the same product."""
    return jnp.sum(delta * jnp.dot(delta, h, precision=lax.Precision.HIGHEST))


@_quadratic.defjvp
def _quadratic_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    delta, h = primals
    slope = jnp.dot(delta, h, precision=lax.Precision.HIGHEST)
    return jnp.sum(delta * slope), 2 * jnp.sum(slope * tangents[0])
