"""A fingerprint of what a policy rounds and how that trains, by which a state of quantizers knows whose it is."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import types
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import ActSpec
from qjax.core.specs import is_number
from qjax.policy import Rule
from qjax.program import Leaf
from qjax.training.planned import Planned, rotation_by
from qjax.training.qat import training_of


def fingerprint(plan: Planned) -> str:
    """Eight hexadecimal digits, behind an x, of all that a state depends on.

    Of each parameter that a rule rounds: its path, its spec and that of its activations, how those train that it has, its rotation, and
    whether a batch norm is folded into it. Of rules for products and caches what they say, as written. Nothing depends on which of
    them a program reads: that changes with its arguments (a head that only training has, a cache that it has not), and the policy
    is the same.

    The digits are those of SHA-256, of every field of every value: equal in every process, on every version of jax and Python but for
    functions among the fields, whose bytecode counts (what they call does not).

    Args:
      plan: what is rounded.

    Returns:
      A name for an entry of a tree. Never digits alone: `flax.nnx.restore_int_paths` would make those a number.

    Raises:
      TypeError: a field holds something whose content cannot be told.
    """
    folded = {} if plan.folding is None else plan.folding.weights
    others = [_of_rule(rule) for rule in plan.policy.rules if rule.is_product or rule.is_cache]
    rules = [rule for rule in plan.policy.rules if not (rule.is_product or rule.is_cache)]
    named = ((leaf, next((rule for rule in rules if rule.matches(leaf.path)), None)) for leaf in plan.program.leaves)
    weights = [_of_weight(leaf, rule, leaf.index in folded) for leaf, rule in named
               if rule is not None and rule.weight is not None and jnp.issubdtype(leaf.dtype, jnp.floating)]  # fmt: skip
    document = json.dumps(described((sorted(weights, key=lambda each: each[0]), others)), separators=(",", ":"))
    return f"x{hashlib.sha256(document.encode()).hexdigest()[:8]}"


def _of_weight(leaf: Leaf, rule: Rule, folded: bool) -> tuple[Any, ...]:
    act, train = rule.activation if isinstance(rule.activation, ActSpec) else None, training_of(rule)
    ranges = train.activation if act is not None and act.static else None
    return leaf.path, rule.weight, act, (train.weight, ranges, train.gradient, train.schedule), rotation_by(rule), folded


def _of_rule(rule: Rule) -> Any:
    if rule.is_cache:
        return rule.pattern, rule.cache
    return rule.pattern, rule.operands, training_of(rule), rotation_by(rule)


def described(value: Any) -> Any:
    """A value as lists and strings that hold all of its content, and nothing else: no address, no order of a set.

    Args:
      value: None, a number, a string, a dtype, an array, a collection, a dataclass or another object with attributes, a function.

    Returns:
      What `json` can write; equal numbers are equal, whatever type they have.

    Raises:
      TypeError: naming the type of what has no content that could be told.

    Example:
      >>> import qjax
      >>> described(qjax.moving_range(0.5)), described(np.float32([1, 2])) == described(jax.numpy.float32([1, 2]))
      (['MovingRange', [['decay', '0x1.0000000000000p-1']]], True)
    """
    if value is None or isinstance(value, bool | np.bool_):
        return ["none" if value is None else "flag", str(value)]
    if isinstance(value, str):
        return ["text", value]
    if isinstance(value, bytes | complex | range | slice | types.EllipsisType):
        return [type(value).__name__, repr(value)]
    if isinstance(value, enum.Enum):
        return [type(value).__qualname__, value.name]
    if is_number(value):
        number = float(value)
        return str(int(value)) if number.is_integer() else number.hex()
    if isinstance(value, np.dtype):
        return ["dtype", value.name]
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return ["key", described(jax.random.key_data(value))]
    if isinstance(value, np.ndarray | jax.Array):
        held = np.ascontiguousarray(value)
        return ["array", held.dtype.name, list(held.shape), hashlib.sha256(held.tobytes()).hexdigest()]
    if isinstance(value, Mapping):
        return ["mapping", sorted(([described(k), described(v)] for k, v in value.items()), key=json.dumps)]
    if isinstance(value, Set):
        return ["set", sorted(map(described, value), key=json.dumps)]
    if isinstance(value, tuple | list):
        return [described(each) for each in value]
    return _described_object(value)


def _described_object(value: Any) -> Any:
    if isinstance(value, type):
        return ["type", value.__qualname__]
    if isinstance(value, functools.partial):
        return ["partial", *map(described, (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return ["method", value.__name__, described(value.__self__)]
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        inside = ["itself" if each is value else each for each in held]
        return ["function", value.__module__, value.__qualname__, _code(value.__code__),
                described((value.__defaults__, value.__kwdefaults__, inside))]  # fmt: skip
    if dataclasses.is_dataclass(value):
        return [type(value).__qualname__, [[f.name, described(getattr(value, f.name))] for f in dataclasses.fields(value)]]
    if callable(getattr(value, "__wrapped__", None)):  # of jax.jit
        return ["wrapped", described(value.__wrapped__)]
    if isinstance(value, types.BuiltinFunctionType | np.ufunc):
        return ["builtin", value.__name__]
    if hasattr(value, "__dict__"):
        return [type(value).__qualname__, described(vars(value))]
    raise TypeError(f"`policy` holds a {type(value).__qualname__}, whose content cannot be told between steps: make it a frozen dataclass")


def _code(code: types.CodeType) -> list[Any]:
    """What a function does: without its file and line."""
    constants = [_code(each) if isinstance(each, types.CodeType) else described(each) for each in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]
