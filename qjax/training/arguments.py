"""What training refuses of its arguments before anything is traced with them: states, batches, inputs, and numbers that ran away."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qjax.program import Arguments
from qjax.program.trace import is_array

_ENTRIES = frozenset({"weights", "activations", "products", "step", "seed", "held", "policy", "uncalibrated"})
_STATE = "`quant` must be a state as fq.init gives it, of a policy without one {}, got"
ONCE = "is fake-quantized already: give the float one, and write all rules into one policy"
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


def as_dicts(tree: Any) -> Any:
    """A state, or variables, as plain dictionaries, in whatever mappings they came, such as `flax.core.FrozenDict`.

    Example:
      >>> import types
      >>> as_dicts({"a": types.MappingProxyType({"b": 1})})
      {'a': {'b': 1}}
    """
    return {name: as_dicts(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree


def in_form_of(given: Any, tree: Any) -> Any:
    """A tree of plain dictionaries in the mappings of `given`, which has the same entries: what goes round a loop keeps its structure."""
    paths, structure = jax.tree_util.tree_flatten_with_path(given)
    return jax.tree.unflatten(structure, [functools.reduce(lambda inside, key: inside[key.key], path, tree) for path, _ in paths])


def check_places(fn: Any, params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses a state that stands among the arguments of the function, and one that is given where none is read.

    Args:
      fn: the function.
      params: what stands in the place of the parameters.
      args: the arguments behind them.
      kwargs: those by name.

    Raises:
      TypeError: saying where the state stands, and how to give it.
    """
    if "quant" in kwargs:
        raise TypeError("`quant` is not read here: what is rounded, and how, the policy says, whatever the state holds; leave `quant` out")
    where = next((i for i, each in enumerate((params, *args)) if _is_whole_state(each)), None)
    if where is not None:
        place = "in the place of `params`" if where == 0 else f"as argument {where} behind `params`"
        raise TypeError(f"`quant` stands {place}, where the arguments of {_name(fn)} are: give the state by its name, behind them: "
                        "(params, *args, quant=quant)")  # fmt: skip


def _is_whole_state(tree: Any) -> bool:
    """By the one name under "policy", a fingerprint: parameters may have a part that is called so, the network of an actor."""
    policy = tree.get("policy") if isinstance(tree, Mapping) and _is_state(tree) else None
    return isinstance(policy, Mapping) and len(policy) == 1 and re.fullmatch("x[0-9a-f]{8}", str(*policy)) is not None


def _name(fn: Any) -> str:
    return f"`{getattr(fn, '__name__', type(fn).__name__)}`"


@contextlib.contextmanager
def called_with(fn: Any, first: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Says what is missing or too much, where a call inside fails and a function cannot be called with its arguments; or what is swapped.

    Only then, for a function may take other arguments than those that its signature says it wraps, and its parameters be an array.

    Args:
      fn: the function, or a method of a class.
      first: what stands in front of the arguments: the parameters, or the module.
      args: the others.
      kwargs: those by name.

    Raises:
      TypeError: naming what is missing, too much or swapped.

    Example:
      >>> fn = lambda params, x: x
      >>> with called_with(fn, [{}], [], {}):
      ...     fn({})
      Traceback (most recent call last):
      TypeError: `args` are not those of the function: missing a required argument: 'x'; give them as in a call of it ...
    """
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        reason = _why_not_called(fn, (*first, *args), kwargs) if isinstance(error, TypeError) else ""
        if reason:
            raise TypeError(f"`args` are not those of the function: {reason}; give them as in a call of it (shapes are enough to trace "
                            "it)") from error  # fmt: skip
        swapped = _swapped(first[0], args) if first else ""
        if not swapped:
            raise
        raise TypeError(swapped) from error


def _swapped(params: Any, args: Sequence[Any]) -> str:
    """Says that an array stands in the place of the parameters, and a tree of arrays behind it; "" if it is not so."""
    tree = next((each for each in args if isinstance(each, Mapping) and any(map(is_array, jax.tree.leaves(each)))), None)
    if tree is None or not is_array(params):
        return ""
    return (f"`params` is an array of shape {tuple(params.shape)}, with which the function fails, and behind it stands a tree of "
            f"{', '.join(map(repr, list(tree)[:3]))}: the parameters come first, then the arguments, (params, *args)")  # fmt: skip


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
