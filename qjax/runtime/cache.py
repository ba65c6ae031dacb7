"""`quantized_cache`: the packed form of the caches that a function takes and gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qjax.core import CacheSpec, QCache, append_cache, init_cache
from qjax.policy import Policy, check_policy
from qjax.program import InputLeaf, Program, ProgramCache, check_function, split_arguments


def quantized_cache(fn: Callable[..., Any], policy: Policy, *, argnum: int | str = 2, length: int = 0) -> Callable[..., Any]:
    """Transforms `fn` into a function of the same arguments that gives its cache argument packed, as the policy's rules say.

    A cache is an array among the arguments into which the function writes tokens with `jax.lax.dynamic_update_slice` along one axis,
    at the top or inside calls and loops (over layers, which it is stacked for, too), and which it returns. It is found by data flow;
    `qjax.trace(fn, ...).caches` lists them with the paths that rules match: the number of the argument (the parameters are 0) or its
    keyword, then the path inside it. `qjax.quantized(fn)` takes the packed cache, writes tokens into the packed form, dequantizes it
    where it is read and returns it packed; donate it under `jit` and it is updated in place.

    Args:
      fn: any JAX function of (params, *args), such as `apply(params, tokens, cache, position) -> (logits, cache)`.
      policy: with rules that have a `cache`; the others are for `qjax.quantize` and are not looked at.
      argnum: the argument that is given packed, by number (the parameters are 0) or keyword.
      length: how many tokens the cache that will be given holds already; 0 is an empty one.

    Returns:
      A function of the arguments of `fn`, arrays or `jax.ShapeDtypeStruct`s, that returns the one argument with a `QCache` for every
      leaf that a rule names.

    Raises:
      TypeError: `fn` is no function, `policy` is no policy. When called:
      ValueError: the policy has no cache rule; a rule that matches no cache, or a cache in another argument; a cache that cannot be
        packed; with `length` 0 a cache that is not empty, which would be lost.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> def fn(params, x, cache, position):
      ...     cache = jax.lax.dynamic_update_slice(cache, x @ params, (position, 0))
      ...     return x @ cache.T, cache
      >>> params, x, empty = jnp.eye(8), jnp.ones((1, 8)), jnp.zeros((64, 8))
      >>> policy = qjax.Policy([qjax.Rule("2", cache=qjax.kv_cache(qjax.int8(), window=4))])
      >>> cache = quantized_cache(fn, policy)(params, x, empty, jnp.int32(0))
      >>> y, cache = jax.jit(qjax.quantized(fn), donate_argnums=2)(params, x, cache, jnp.int32(0))
      >>> cache
      QCache(kv_cache(int8(), per="token", window=4), float32[64,8], 900 bytes, 14.1 bits/value)

    Source: for the format see `qjax.kv_cache`.
    """
    check_function(fn)
    check_policy(policy)
    programs = ProgramCache(fn)

    def pack(params: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = split_arguments(params, args, kwargs)
        program = programs(arguments)
        values = [*arguments.params, *arguments.inputs]
        chosen = [(choice.leaf, choice.spec) for choice in policy.resolve_caches(program) if choice.spec is not None]
        for leaf, spec in chosen:
            values[leaf.index] = _packed(values[leaf.index], leaf, spec, length)
        count = len(arguments.params)
        tree, new_args, new_kwargs = arguments.rebuild(values[:count], values[count:])
        given = _argument((tree, *new_args), new_kwargs, argnum)
        _check_inside(given, [(leaf, values[leaf.index]) for leaf, _ in chosen], argnum)
        return given

    return pack


def check_caches(program: Program, values: Sequence[Any]) -> None:
    """Refuses packed caches where the function does not keep them so.

    Args:
      program: the traced function.
      values: its inputs.

    Raises:
      ValueError: naming the input and why.
    """
    for index, value in enumerate(values):
        if not isinstance(value, QCache):
            continue
        leaf = program.inputs[index]
        if leaf.refusal:
            raise ValueError(f"`{leaf.path}` is a packed cache, but in this function it is none: {leaf.refusal}")
        if leaf.axis != value.axis:
            raise ValueError(
                f"`{leaf.path}` is a packed cache of tokens along axis {value.axis}, and the function writes along {leaf.axis}: "
                "make it with qjax.quantized_cache of this function"
            )


def _packed(value: Any, leaf: InputLeaf, spec: CacheSpec, length: int) -> QCache:
    if isinstance(value, QCache):
        raise ValueError(f"`{leaf.path}` is packed already: begin with the float cache, or its shapes")
    axis = leaf.axis if leaf.axis is not None else 0  # a cache has one
    cache = init_cache(leaf.shape, leaf.dtype, spec, axis, name=leaf.path)
    if not 0 <= length <= cache.capacity:
        raise ValueError(f"`length` {length} must be between 0 and the {cache.capacity} tokens that `{leaf.path}` has room for")
    if length:
        return append_cache(cache, jax.lax.slice_in_dim(jnp.asarray(value), 0, length, axis=axis % cache.ndim), 0)
    if not isinstance(value, (Tracer, jax.ShapeDtypeStruct)) and bool(jnp.any(jnp.asarray(value) != 0)):
        raise ValueError(f"`{leaf.path}` holds tokens, which would be lost: pass `length=`, how many, or an empty cache")
    return cache


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], argnum: int | str) -> Any:
    if isinstance(argnum, str):
        if argnum not in kwargs:
            raise ValueError(f"`argnum` {argnum!r} is no keyword of this call, which has {', '.join(kwargs) or 'none'}")
        return kwargs[argnum]
    if not 0 <= argnum < len(args):
        raise ValueError(f"`argnum` must be 0 .. {len(args) - 1} for a call of {len(args)} arguments (the parameters are 0), got {argnum}")
    return args[argnum]


def _check_inside(given: Any, packed: list[tuple[InputLeaf, QCache]], argnum: int | str) -> None:
    here = {id(leaf) for leaf in jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, QCache))}
    for leaf, cache in packed:
        if id(cache) not in here:
            raise ValueError(f"`argnum` {argnum!r} is not the argument of the cache {leaf.path!r} that a rule names: pass its own, or "
                             "narrow the pattern and pack each argument for itself")  # fmt: skip
