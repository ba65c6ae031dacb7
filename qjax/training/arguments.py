"""What training refuses of its arguments before anything is traced with them: states, batches, inputs, and numbers that ran away."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qjax.program import Arguments

_ENTRIES = frozenset({"weights", "activations", "products", "step", "seed", "held", "policy"})
_STATE = "`quant` must be a state as fq.init gives it, of a policy without one {}, got"
RAN_AWAY = "training ran away: go back to a step before that, and go on with a lower rate or optax.clip_by_global_norm"


def check_form(quant: Any) -> None:
    """Refuses what is no state of any policy; {} is one without numbers.

    Args:
      quant: what was given in its place.

    Raises:
      TypeError: naming what it is, and what to give.
      ValueError: it does not say of which policy it is.

    Example:
      >>> check_form({"w": jnp.ones(2)})
      Traceback (most recent call last):
      TypeError: `quant` must be a state as fq.init gives it, of a policy without one {}, got a tree of 'w'
    """
    if not isinstance(quant, Mapping):
        raise TypeError(f"{_STATE} {type(quant).__name__}")
    if quant and not _is_state(quant):
        inside = next((name for name, value in quant.items() if isinstance(value, Mapping) and _is_state(value)), None)
        more = "" if inside is None else f": give what is under {inside!r}"
        raise TypeError(f"{_STATE} a tree of {', '.join(map(repr, list(quant)[:3]))}{more}")
    if quant and "policy" not in quant:
        raise ValueError("`quant` must be what `init` gave for this policy, and lacks its entry 'policy': call init again")
    mark = next((leaf for leaf in jax.tree.leaves(quant) if isinstance(leaf, str)), None)
    if mark is not None:
        raise TypeError(f"{_STATE} labels ({mark!r}): fq.labels is for optax.multi_transform, give the state itself")


def _is_state(tree: Mapping[Any, Any]) -> bool:
    return bool(tree) and tree.keys() <= _ENTRIES


@contextlib.contextmanager
def called_with(fn: Any, first: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Says what is missing or too much, where a call inside fails and a function cannot be called with its arguments.

    Only then, for a function may take other arguments than those that its signature says it wraps.

    Args:
      fn: the function, or a method of a class.
      first: what stands in front of the arguments: the parameters, or the module.
      args: the others.
      kwargs: those by name.

    Raises:
      TypeError: naming what is missing or too much.

    Example:
      >>> fn = lambda params, x: x
      >>> with called_with(fn, [{}], [], {}):
      ...     fn({})
      Traceback (most recent call last):
      TypeError: `args` are not those of the function: missing a required argument: 'x'; give them as in a call of it ...
    """
    try:
        yield
    except TypeError as error:
        reason = _why_not_called(fn, (*first, *args), kwargs)
        if not reason:
            raise
        raise TypeError(f"`args` are not those of the function: {reason}; give them as in a call of it (shapes are enough to trace "
                        "it)") from error  # fmt: skip


def _why_not_called(fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # what is not written in Python may have none
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""


def check_rows(arguments: Sequence[Arguments]) -> None:
    """Refuses batches that are shapes, or without a number, before a function that may not take them is traced with them.

    Raises:
      ValueError: naming the batch.
    """
    needs = "the range of static activations needs data"
    for number, each in enumerate(arguments):
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in each.inputs):
            raise ValueError(f"`batches` entry {number} holds shapes, but {needs}: give batches of numbers")
        if each.inputs and all(jnp.size(x) == 0 for x in each.inputs):
            raise ValueError(f"`batches` entry {number} holds no rows, but {needs}: leave it out")


def check_trained(x: Any, what: str) -> None:
    """Refuses NaN and infinity in what was trained. Looks at concrete arrays only.

    Args:
      x: an array.
      what: what the error calls it.

    Raises:
      ValueError: how many there are, and the remedy.

    Example:
      >>> check_trained(jnp.float32([1, jnp.nan]), "`params` leaf 'w'")
      Traceback (most recent call last):
      ValueError: `params` leaf 'w' holds 1 NaN and 0 infinite values of 2: training ran away: go back to a step before that, ...
    """
    if isinstance(x, Tracer):
        return
    with jax.ensure_compile_time_eval():
        x = jnp.asarray(x)
        if bool(jnp.all(jnp.isfinite(x))):
            return
        nans, infinities = int(jnp.sum(jnp.isnan(x))), int(jnp.sum(jnp.isinf(x)))
    raise ValueError(f"{what} holds {nans} NaN and {infinities} infinite values of {x.size}: {RAN_AWAY}")
