"""The scales that are tried for an input, and what each costs: the part of rescaling that needs no program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from qjax.calibration import Channels
from qjax.core import ActSpec, Spec, quantize, round_inliers
from qjax.core.specs import check_count
from qjax.policy import ChoosesActivation
from qjax.ptq.method import Method
from qjax.ptq.rtn import rtn

Unfoldable = Literal["leave", "scale"]


class Member(NamedTuple):
    """A weight that reads the input to be rescaled, and what it reads.

    Attributes:
      w: float32 (stack, N, K).
      x: float32 (stack, rows, K), rows of the data; zero where there are fewer.
      stats: of all rows, (stack, K) each.
      channel: int32 (stack, K), the free scale of each column; the number of free scales where a column is not scaled.
    """

    w: jax.Array
    x: jax.Array
    stats: Channels
    channel: jax.Array


@runtime_checkable
class Rescaling(Method, Protocol):
    """A method that rescales the inputs of its weights before it rounds them."""

    @property
    def rows(self) -> int:
        """How many rows of activations it tries its candidates on."""
        ...

    @property
    def unfoldable(self) -> Unfoldable:
        """What becomes of an input whose scales nothing can take in exchange: left as it is, or divided at run time."""
        ...

    @property
    def tries(self) -> int:
        """How many candidates there are."""
        ...

    def candidates(self, members: tuple[Member, ...], size: int, specs: tuple[Spec, ...]) -> jax.Array:
        """Returns the scales to try, float32 (candidates, size), all positive; the first of the best is taken."""
        ...


def best(method: Rescaling, members: tuple[Member, ...], size: int, how: tuple[tuple[Spec, ActSpec | None], ...]) -> jax.Array:
    """The candidate with the least error of the members' outputs; the first of equals. A sample without rows has none."""
    candidates = method.candidates(members, size, tuple(spec for spec, _ in how))
    if candidates.shape[0] == 1:
        return candidates[0]
    return candidates[jnp.argmin(_errors(candidates, members, how))]


@functools.partial(jax.jit, static_argnames="how")
def _errors(candidates: jax.Array, members: tuple[Member, ...], how: tuple[tuple[Spec, ActSpec | None], ...]) -> jax.Array:
    """sum over members of |act(x / s) round(s w) - x w|^2, for each candidate."""

    def error(s: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for member, (spec, act) in zip(members, how, strict=True):
            by = factors(s, member.channel)[:, None, :]
            w = quantize(member.w * by, spec, (-1,), (-3,)).dequantize()
            x = member.x / by
            if act is not None:
                x = round_inliers(x, dataclasses.replace(act, static=False, observer=None), (2,) if act.per_token else (1, 2), (1,))
            made, wanted = (
                jnp.einsum("smk,snk->smn", a, b, precision=lax.Precision.HIGHEST) for a, b in ((x, w), (member.x, member.w))
            )
            total += jnp.sum(jnp.square(made - wanted))
        return total

    return lax.map(error, candidates)


def factors(s: jax.Array, channel: jax.Array) -> jax.Array:
    """The factor of each column: its free scale, 1 where it has none. s (size,), channel as `Member.channel`."""
    return jnp.concatenate([s, jnp.ones((1,), s.dtype)])[channel]


def peaks(values: Sequence[jax.Array], members: Sequence[Member], size: int) -> jax.Array:
    """The largest value among the columns of each free scale, 0 where there is none: values (stack, K) >= 0, result (size,)."""
    out = jnp.zeros((size,), jnp.float32)
    for value, member in zip(values, members, strict=True):
        out = out.at[member.channel].max(value, mode="drop")
    return out


def means(values: Sequence[jax.Array], members: Sequence[Member], size: int) -> jax.Array:
    """The mean over the columns of each free scale, members counted by their rows: values (stack, K), result (size,)."""
    total, count = (jnp.zeros((size,), jnp.float32) for _ in range(2))
    for value, member in zip(values, members, strict=True):
        rows = member.w.shape[1]
        total, count = total.at[member.channel].add(rows * value, mode="drop"), count.at[member.channel].add(rows, mode="drop")
    return total / jnp.maximum(count, 1)


def checked_then(then: Any) -> Method:
    """The method that follows a rescaling; None rounds to nearest."""
    if then is None:
        return rtn()
    if not isinstance(then, Method) or isinstance(then, type):
        raise TypeError(f"`then` must be a method such as qjax.gptq(), got {then!r}")
    if isinstance(then, Rescaling):
        raise ValueError(f"`then` must be a method that rounds, such as qjax.gptq() or qjax.llm_int8(), got {then.name}: an input is "
                         "rescaled once; take one of the two, with what rounds as its `then`")  # fmt: skip
    return then


def activation_of(then: Method | None, given: ActSpec | None, ops: Collection[str]) -> tuple[ActSpec | None, str]:
    """What becomes of activations, and a remark: what the method that follows a rescaling makes of them."""
    return then.activation(given, ops) if isinstance(then, ChoosesActivation) else (given, "")


def checked_unfoldable(unfoldable: Any) -> Unfoldable:
    """What becomes of an input whose scales cannot be folded."""
    if unfoldable not in get_args(Unfoldable):
        raise ValueError(f"`unfoldable` must be 'leave' or 'scale', got {unfoldable!r}")
    return unfoldable


def checked_rows(rows: int) -> int:
    """A number of rows to sample."""
    check_count("rows", rows, 1)
    return rows
