"""Pure observers: what is remembered of the activations that a site reads, in bounded memory.

An observer is `init`, `update` and `merge` over a state that is a pytree; it runs under `jit`, `scan` and sharding.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration.rows import Rows
from qjax.core import FloatSpec, IntSpec

S = TypeVar("S")


class Observer(Protocol, Generic[S]):
    """What the collectors need of an observer."""

    def init(self, stack: int, columns: int) -> S:
        """Returns the state before any data, for `stack` independent parts of `columns` values each."""
        ...

    def update(self, state: S, rows: Rows) -> S:
        """Returns the state after one more call of the site."""
        ...

    def merge(self, a: S, b: S) -> S:
        """Returns the state after the data of both."""
        ...


@dataclasses.dataclass(frozen=True)
class Together:
    """Several observers at one site; the state is a tuple of theirs.

    Example:
      >>> import jax.numpy as jnp
      >>> both = Together((SecondMoment(), SecondMoment()))
      >>> [moments.count.tolist() for moments in both.update(both.init(1, 2), Rows(jnp.ones((1, 3, 2))))]
      [[3], [3]]
    """

    observers: tuple[Observer[Any], ...]

    def init(self, stack: int, columns: int) -> tuple[Any, ...]:
        return tuple(observer.init(stack, columns) for observer in self.observers)

    def update(self, state: tuple[Any, ...], rows: Rows) -> tuple[Any, ...]:
        return tuple(observer.update(part, rows) for observer, part in zip(self.observers, state, strict=True))

    def merge(self, a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(observer.merge(x, y) for observer, x, y in zip(self.observers, a, b, strict=True))


class RangeObserver(Observer[S], Protocol[S]):
    """An observer that chooses the range of values that a static activation grid covers."""

    def range(self, state: S, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
        """Returns the range to cover, float32 (stack,) each.

        A symmetric spec gets `-t .. t` (`0 .. t` if unsigned), an asymmetric one a range that holds zero; a part that saw no
        data gets 0 .. 0, one whose data were not finite a range that is not finite.
        """
        ...


class Moments(NamedTuple):
    """Sums of outer products.

    Attributes:
      total: float32 (stack, K, K), the sum of x x^T.
      count: int32 (stack,), the number of rows.
    """

    total: jax.Array
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class SecondMoment:
    """Sums X^T X and counts rows, for the methods that weigh an error by H = 2/n X^T X.

    Example:
      >>> import jax.numpy as jnp
      >>> observer = SecondMoment()
      >>> state = observer.update(observer.init(1, 2), Rows(jnp.array([[[1.0, 2.0], [0.0, 1.0]]])))
      >>> state.total[0].tolist(), state.count.tolist()
      ([[1.0, 2.0], [2.0, 5.0]], [2])
    """

    def init(self, stack: int, columns: int) -> Moments:
        return Moments(jnp.zeros((stack, columns, columns), jnp.float32), jnp.zeros((stack,), jnp.int32))

    def update(self, state: Moments, rows: Rows) -> Moments:
        if rows.owner is None:
            total = jnp.einsum("smk,smj->skj", rows.x, rows.x, precision=lax.Precision.HIGHEST)
            return Moments(state.total + total, state.count + rows.x.shape[1])
        x, owner = rows.x[0], rows.owner

        # One expert at a time: all of them at once would hold `experts` copies of the rows.
        def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, count, expert = part
            mine = jnp.where((owner == expert)[:, None], x, 0)
            return total + jnp.dot(mine.T, mine, precision=lax.Precision.HIGHEST), count + jnp.sum(owner == expert, dtype=jnp.int32)

        return Moments(*lax.map(one, (state.total, state.count, jnp.arange(rows.experts))))

    def merge(self, a: Moments, b: Moments) -> Moments:
        return Moments(a.total + b.total, a.count + b.count)


class CrossMoments(NamedTuple):
    """Sums of outer products of what a site reads, and of what it lacks of the float program's.

    Attributes:
      total: float32 (stack, K, K), the sum of x x^T.
      cross: float32 (stack, K, K), the sum of (x_float - x) x^T.
      count: int32 (stack,), the number of rows.
      compared: int32 (stack,), those of them that had one of the float program beside them.
    """

    total: jax.Array
    cross: jax.Array
    count: jax.Array
    compared: jax.Array


@dataclasses.dataclass(frozen=True)
class CrossMoment:
    """Sums X^T X and (X_float - X)^T X, for the methods that make up for what the inputs lack.

    Example:
      >>> import jax.numpy as jnp
      >>> observer = CrossMoment()
      >>> rows = Rows(jnp.array([[[1.0, 2.0]]]), reference=jnp.array([[[1.5, 2.0]]]))
      >>> observer.update(observer.init(1, 2), rows).cross[0].tolist()
      [[0.5, 1.0], [0.0, 0.0]]

    Source: GPTAQ (arXiv 2504.02692), the authors' dXXT.
    """

    def init(self, stack: int, columns: int) -> CrossMoments:
        moments = SecondMoment().init(stack, columns)
        return CrossMoments(moments.total, jnp.zeros_like(moments.total), moments.count, jnp.zeros_like(moments.count))

    def update(self, state: CrossMoments, rows: Rows) -> CrossMoments:
        total, count = SecondMoment().update(Moments(state.total, state.count), rows)
        if rows.reference is None:
            return state._replace(total=total, count=count)
        lack = rows.reference - rows.x
        if rows.owner is None:
            cross = state.cross + jnp.einsum("smk,smj->skj", lack, rows.x, precision=lax.Precision.HIGHEST)
        else:
            cross = _cross_of_experts(state.cross, lack[0], rows)
        return CrossMoments(total, cross, count, state.compared + (count - state.count))

    def merge(self, a: CrossMoments, b: CrossMoments) -> CrossMoments:
        return jax.tree.map(jnp.add, a, b)


def _cross_of_experts(cross: jax.Array, lack: jax.Array, rows: Rows) -> jax.Array:
    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        mine = jnp.where((rows.owner == part[1])[:, None], rows.x[0], 0)
        return part[0] + jnp.dot(lack.T, mine, precision=lax.Precision.HIGHEST)

    return lax.map(one, (cross, jnp.arange(rows.experts)))


def hessian(state: Moments | CrossMoments) -> jax.Array:
    """Returns `H = 2/n sum x x^T`.

    Args:
      state: of a `SecondMoment`, or of a `CrossMoment`.

    Returns:
      float32 (stack, K, K); zero where no row was seen.

    Example:
      >>> hessian(Moments(jnp.array([[[3.0]]]), jnp.array([2]))).tolist()
      [[[3.0]]]

    Source: GPTQ (arXiv 2210.17323), eq. 1 and the authors' code, whose n counts sequences. GPTQ's codes do not depend on the
    factor.
    """
    return state.total * (2.0 / jnp.maximum(state.count, 1).astype(jnp.float32))[:, None, None]


def deviation(state: CrossMoments) -> jax.Array:
    """Returns `D = 2/n sum (x_float - x) x^T`, in the units of `hessian`.

    Args:
      state: of a `CrossMoment`.

    Returns:
      float32 (stack, K, K); zero where no row of the float program was seen.

    Example:
      >>> deviation(CrossMoments(jnp.array([[[3.0]]]), jnp.array([[[1.0]]]), jnp.array([2]), jnp.array([2]))).tolist()
      [[[1.0]]]
    """
    return state.cross * (2.0 / jnp.maximum(state.count, 1).astype(jnp.float32))[:, None, None]
