"""Low-rank error correction: what rounding took away comes back, in part, as two thin float matrices (EoRA, LQER)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import ColumnPower, CrossMoment, CrossMoments, Moments, Power, SecondMoment
from qjax.calibration.observers import Observer, Together
from qjax.core import ActSpec, Adapter, QTensor, adapter_matrix, check_finite, uncanonicalize
from qjax.ptq.candidates import activation_of, checked_then
from qjax.ptq.data import unseen_note
from qjax.ptq.method import Method, Outcome, Problem
from qjax.ptq.parts import axes_order, for_each_matrix, matrices
from qjax.ptq.rtn import rtn
from qjax.ptq.sparsity import check_filled
from qjax.ptq.work import Work, matrix_sizes, work_of

Kind = Literal["eora", "lqer", "svd"]
AdapterDtype = Literal["float16", "bfloat16", "float32"]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """See `low_rank`."""

    rank: int = 32
    then: Method = dataclasses.field(default_factory=rtn)
    measure: Kind = "eora"
    dtype: AdapterDtype = "float16"
    turns: int = 1

    @property
    def name(self) -> str:
        how = [] if self.measure == "eora" else [self.measure]
        how += [] if self.turns == 1 else [f"iterations={self.turns}"]
        how += [] if self.dtype == "float16" else [self.dtype]
        return f"low_rank({', '.join([str(self.rank), *how, f'then={self.then.name}'])})"

    @property
    def fills_zeros(self) -> bool:
        return True

    @property
    def observer(self) -> Observer[Any] | None:
        first = self.then.observer
        enough = (SecondMoment, CrossMoment, *([ColumnPower] if self.measure == "lqer" else []))
        if self.measure == "svd" or isinstance(first, enough):
            return first
        own = SecondMoment() if self.measure == "eora" else ColumnPower()
        return own if first is None else Together((first, own))

    def activation(self, given: ActSpec | None, ops: Collection[str] = ()) -> tuple[ActSpec | None, str]:
        return activation_of(self.then, given, ops)

    def shapes(self, problem: Problem) -> QTensor:
        self._check(problem)
        stack, n, k = matrix_sizes(problem)
        q = self.then.shapes(problem)

        def corrected(q: QTensor) -> QTensor:
            left, right = jnp.zeros((stack, n, self.rank), self.dtype), jnp.zeros((stack, self.rank, k), self.dtype)
            return q.with_adapter(_placed(problem, left, right))

        return jax.eval_shape(corrected, q)

    def quantize(self, problem: Problem, state: Any = None) -> Outcome:
        self._check(problem)
        filled = check_filled(problem, self.name)
        both = isinstance(self.observer, Together)
        own = state[0] if both else None if self.then.observer is None else state
        statistic, notes = self._statistic(problem, state[1] if both else state)
        fed = None if self.turns == 1 else self._nearest(problem, own, statistic)
        outcome, left, right = self._corrected(problem, own, statistic, fed)[:3]
        for part in (left, right):
            check_finite(part, f"the {self.dtype} adapter of {problem.name}")
        return Outcome(outcome.q.with_adapter(_placed(problem, left, right)), (*outcome.notes, *notes, *filled))

    def _corrected(self, problem: Problem, state: Any, statistic: Any, fed: Any) -> tuple[Outcome, jax.Array, jax.Array, jax.Array]:
        """What is rounded where the part `fed`, L and R, is taken off first, and L and R of its error; and that (stack, N, K)."""
        rest = problem
        if fed is not None:
            change = adapter_matrix(_placed(problem, *fed))
            change = uncanonicalize(change, problem.axes, [problem.w.shape[a] for a in problem.axes])
            rest = problem._replace(w=(problem.w.astype(jnp.float32) - change).astype(problem.w.dtype))
        outcome = self.then.quantize(rest, state)
        error = problem.w.astype(jnp.float32) - dataclasses.replace(outcome.q, dtype=np.dtype(np.float32)).dequantize()
        error = matrices(problem._replace(w=error))
        return outcome, *_correct(error, statistic, self.rank, self.dtype), error

    def _nearest(self, problem: Problem, state: Any, statistic: Any) -> Any:
        """The L and R to take off first with which each matrix comes nearest: the turns do not always go down."""
        fed, best, least = None, None, None
        for _ in range(self.turns):
            _, left, right, error = self._corrected(problem, state, statistic, fed)
            fed = (jnp.zeros_like(left), jnp.zeros_like(right)) if fed is None else fed
            best, least = (fed, _distances(error, left, right)) if least is None else _nearer(fed, error, left, right, best, least)
            fed = left, right
        return best

    def work(self, problem: Problem) -> Work:
        stack, n, k = matrix_sizes(problem)
        small = min(n, k)
        own = Work(10.0 * small**3 * (2 if self.measure == "eora" and k < n else 1) + 4.0 * small * n * k).times(stack)
        return work_of(self.then, problem).plus(own).times(1 if self.turns == 1 else self.turns + 1)

    def _statistic(self, problem: Problem, state: Any) -> tuple[jax.Array | None, tuple[str, ...]]:
        """What the error is weighed by, (stack, K, K) or (stack, K), and a remark where there is nothing."""
        if self.measure == "svd" or state is None:
            return None, ()
        if self.measure == "eora" and isinstance(state, Moments | CrossMoments):
            found = state.total / jnp.maximum(state.count, 1).astype(jnp.float32)[:, None, None]
        elif isinstance(state, Power):
            found = state.mean_square
        else:
            found = jnp.diagonal(state.total, axis1=1, axis2=2) / jnp.maximum(state.count, 1).astype(jnp.float32)[:, None]
        seen = np.asarray(found.reshape(found.shape[0], -1) != 0).any(-1)
        note = unseen_note(seen, "all errors of its low-rank part count alike")
        return for_each_matrix(problem, found), (note,) if note else ()

    def _check(self, problem: Problem) -> None:
        name = problem.name
        if problem.groups > 1:
            raise ValueError(f"`method` {self.name} has no low-rank part for the grouped convolution {name!r}, whose groups have "
                             f"columns of their own: give it a rule with {self.then.name} alone")  # fmt: skip
        _, n, k = matrix_sizes(problem)
        if self.rank > min(n, k):
            most = f"take at most {min(n, k)}; from {n * k // (n + k)} on the two parts have as many numbers as the weight"
            raise ValueError(f"`rank`={self.rank} is more than a matrix of {n} outputs and {k} inputs has, those of {name!r}: {most}")


def low_rank(rank: int = 32, then: Method | None = None, kind: Kind = "eora", dtype: AdapterDtype = "float16") -> LowRank:
    """Low-rank error correction: rounds, and keeps the most important part of the error as two thin float matrices.

    w ~= dequantize(q) + L R  with L (N, r), R (r, K), where L R minimises |(w - dequantize(q) - L R) S|_F:

        "eora": S = (E[x x^T])^(1/2), so it is the error of the output on the calibration data that is least.
        "lqer": S = diag(E[x^2])^(1/2), which takes the inputs for uncorrelated.
        "svd":  S = 1, and no data is needed.

    With the singular value decomposition (w - dequantize(q)) S = U T V^T: L = U_r and R = U_r^T (w - dequantize(q)), scales shared
    out between both, which is U_r T_r V_r^T S^-1 where S has an inverse. At run time the product has two thin ones beside it,
    (x R^T) L^T, on the float activations also where the weight multiplies integers; L R itself is never formed, except in front
    of a convolution and of products over a part of the
    contracted axes, and the report says so.

    Args:
      rank: r; costs 16 r (N + K) / (N K) bits a weight at 16 bit.
      then: how the weight is rounded first, such as `qjax.gptq()`; None: to nearest.
      kind: what the error is weighed by.
      dtype: what L and R are stored in: "float16", "bfloat16" or "float32".

    Returns:
      A method for `qjax.Rule`. Needs calibration data, except for "svd" behind a method that needs none. `q.adapter` is the pair L, R
      of a packed weight, and `q.with_adapter(...)` puts another in its place. Weights that were zero are zero no more,
      except where a whole output is.

    Raises:
      ValueError: naming the argument; when it runs: a rank larger than the weight has, a grouped convolution, a weight
        of which more than a tenth was pruned.
      TypeError: `then` is no method.

    Example:
      >>> import jax.numpy as jnp, qjax
      >>> rule = qjax.Rule("*", weight=qjax.int2(group_size=8), method=low_rank(4, kind="svd"))
      >>> params = {"w": jnp.cos(jnp.arange(256.0) ** 2).reshape(16, 16)}
      >>> result = qjax.quantize(lambda p, x: x @ p["w"], params, qjax.Policy([rule]), calibration=[jnp.ones((2, 16))])
      >>> result.params["w"].adapter.left.shape, result.params["w"].adapter.right.shape
      ((16, 4), (1, 4, 16))

    Source: EoRA, Liu et al., arXiv 2410.21271, section 3.2; LQER, Zhang et al., arXiv 2402.02446, section 3.2. LQER weighs by the mean |x|,
    here it is the root of the mean square, which minimises the error of the output for uncorrelated inputs (QERA, arXiv
    2410.06040, theorem 2). No inverse of S is taken, so inputs that span less than all directions need no damping.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        hint = ": the method goes behind it, qjax.low_rank(32, then=...)" if isinstance(rank, Method) else ""
        raise ValueError(f"`rank` must be an int of at least 1, got {rank!r}{hint}")
    for argument, value, choices in (("kind", kind, get_args(Kind)), ("dtype", dtype, get_args(AdapterDtype))):
        if value not in choices:
            raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, choices))}, got {value!r}")
    first = checked_then(then)
    if isinstance(first, LowRank):
        raise ValueError(f"`then` must be a method that rounds, such as qjax.gptq(), got {first.name}: give one low-rank part a "
                         "larger `rank`")  # fmt: skip
    return LowRank(rank, first, kind, dtype)


@functools.partial(jax.jit, static_argnames=("rank", "dtype"))
def _correct(error: jax.Array, statistic: jax.Array | None, rank: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """L (stack, N, r) and R (stack, r, K) of errors (stack, N, K), weighed by (stack, K, K), (stack, K) or nothing."""
    if statistic is None:
        statistic = jnp.ones((error.shape[0], error.shape[2]), jnp.float32)
    left, right = jax.lax.map(lambda part: _parts(part[0], part[1], rank), (error, statistic))
    # Rows without an error (of zeros, for one) stay exactly what they are.
    left = jnp.where(jnp.any(error != 0, axis=-1, keepdims=True), left, 0.0)
    return left.astype(dtype), right.astype(dtype)


@jax.jit
def _distances(error: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """|error - L R|^2 of each matrix, (stack,)."""
    change = jax.lax.map(lambda parts: _product(*(part.astype(jnp.float32) for part in parts)), (left, right))
    return jnp.sum(jnp.square(error - change), axis=(1, 2))


def _nearer(fed: Any, error: jax.Array, left: jax.Array, right: jax.Array, best: Any, least: jax.Array) -> tuple[Any, jax.Array]:
    """Of each matrix the part `fed` if what came of it is nearer than `least`, else what was best."""
    distance = _distances(error, left, right)
    won = (distance < least)[:, None, None]
    return tuple(jnp.where(won, new, old) for new, old in zip(fed, best, strict=True)), jnp.minimum(distance, least)


def _parts(error: jax.Array, statistic: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """L = U_r and R = U_r^T E with the leading left singular vectors of E S, as large as each other."""
    reach = jnp.max(jnp.abs(error))
    unit = error / jnp.where(reach > 0, reach, 1.0)
    statistic = jnp.where(jnp.any(statistic != 0), statistic, _identity(statistic))
    statistic = statistic / jnp.max(statistic)
    left = _leading(unit, statistic, rank)
    right = _product(left.T, error)
    reach = jnp.max(jnp.abs(left), axis=0), jnp.max(jnp.abs(right), axis=1)
    some = (reach[0] > 0) & (reach[1] > 0)
    by = jnp.where(some, jnp.sqrt(reach[1] / jnp.where(some, reach[0], 1.0)), 1.0)  # for each of the r terms
    return left * by[None, :], right / by[:, None]


def _leading(error: jax.Array, statistic: jax.Array, rank: int) -> jax.Array:
    """The leading left singular vectors (N, r) of E S, S S^T = statistic, from the smaller of the matrices (N, N) and (K, K)."""
    if error.shape[0] <= error.shape[1]:
        weighed = error * statistic[None, :] if statistic.ndim == 1 else _product(error, statistic)
        return _largest(_product(weighed, error.T), rank)
    if statistic.ndim == 1:
        weighed = error * jnp.sqrt(statistic)[None, :]
    else:
        values, vectors = jnp.linalg.eigh(statistic)
        weighed = _product(error, vectors) * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]
    return jnp.linalg.qr(_product(weighed, _largest(_product(weighed.T, weighed), rank)))[0]


def _largest(symmetric: jax.Array, rank: int) -> jax.Array:
    """The eigenvectors of the `rank` largest eigenvalues, the largest first."""
    return jnp.linalg.eigh(symmetric)[1][:, ::-1][:, :rank]


def _identity(statistic: jax.Array) -> jax.Array:
    return jnp.ones_like(statistic) if statistic.ndim == 1 else jnp.eye(statistic.shape[0], dtype=statistic.dtype)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _placed(problem: Problem, left: jax.Array, right: jax.Array) -> Adapter:
    """Parts of `matrices(problem)` with the weight's kept axes."""
    stacked, kept, _ = axes_order(problem)
    shape = problem.w.shape
    lead, rest = [shape[a] for a in stacked], [shape[a] for a in kept]
    order = [int(i) for i in np.argsort([*stacked, *kept])]
    last = len(order)
    left = left.reshape(*lead, *rest, left.shape[-1]).transpose(*order, last)
    right = right.reshape(*lead, *[1] * len(rest), *right.shape[-2:]).transpose(*order, last, last + 1)
    return Adapter(left, right)
