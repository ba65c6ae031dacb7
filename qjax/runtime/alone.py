"""`alone_or`: a kernel in a program for one device, and what XLA cuts by itself in a program that it spreads over several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir

from qjax.program import compat


def alone_or(fast: Callable[..., Any], slow: Callable[..., Any]) -> Callable[..., Any]:
    """Chooses between two functions that compute the same, when the program is lowered: only then is known for how many devices.

    `jit` over a mesh asks the compiler to cut every operation, which it cannot do with a Pallas kernel: jax refuses such a program. Inside
    a `shard_map` over all axes, each device runs a program of its own.

    Args:
      fast: for a program of one device, or of each device by itself.
      slow: for all others; the same shapes and dtypes of results.

    Returns:
      A function of the same arguments, pytrees of arrays. It has no rules for `grad` and `vmap`: those belong around it.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.jit(alone_or(lambda x: x + 1, lambda x: x - 1))(jnp.zeros(2)).tolist()
      [1.0, 1.0]
    """

    def run(*args: Any) -> Any:
        flat, tree = jax.tree.flatten(args)
        one, shape = jax.make_jaxpr(lambda *flat: fast(*jax.tree.unflatten(tree, flat)), return_shape=True)(*flat)
        many = jax.make_jaxpr(lambda *flat: slow(*jax.tree.unflatten(tree, flat)))(*flat)
        return jax.tree.unflatten(jax.tree.structure(shape), _choice.bind(*flat, one=one, many=many))

    return run


_choice = Primitive("alone_or")
_choice.multiple_results = True


@_choice.def_impl
def _run(*flat: Any, one: Any, many: Any) -> list[Any]:
    return jax.jit(lambda *flat: _choice.bind(*flat, one=one, many=many))(*flat)


@_choice.def_abstract_eval
def _results(*flat: Any, one: Any, many: Any) -> list[Any]:
    del flat, one
    body, _ = compat.parts(many)
    return [v.aval for v in body.outvars]


def _lowered(context: Any, *flat: Any, one: Any, many: Any) -> Any:
    mine = one if _is_alone(context.module_context.axis_context) else many
    return mlir.lower_fun(jaxpr_as_fun(mine), multiple_results=True)(context, *flat)


def _is_alone(where: Any) -> bool:
    """As jax asks itself in front of a kernel: of what `jit` compiles the number of devices, in a shard_map which axes are taken apart."""
    devices, manual = getattr(where, "num_devices", None), getattr(where, "manual_axes", None)
    return devices == 1 if devices is not None else not manual or set(manual) == set(where.mesh.axis_names)


mlir.register_lowering(_choice, _lowered)
