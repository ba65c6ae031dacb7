"""`quantized`: a function that takes packed parameters where it took float ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from qjax.program import Interpreter, ProgramCache, split_arguments
from qjax.runtime.select import packed_rule


def quantized(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Transforms `fn(params, *args)` so that `params` may hold `QTensor` leaves.

    The function is traced with the float shapes; wherever a packed parameter meets data, the packed matmul of the platform
    runs. The result is an ordinary function: `jit`, `vmap`, `scan`, `shard_map` and `jax.export` it, and differentiate it
    with respect to the other arguments. Call it under `jit`: alone it dispatches operation by operation.

    Args:
      fn: any JAX function whose first argument is the tree of parameters. As under `jit`, arrays are traced and must not
        decide Python control flow; other leaves are static.

    Returns:
      The function, with the same arguments and results.

    Raises:
      TypeError: `fn` is no function.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fn = lambda p, x: x @ p["w"]
      >>> params, x = {"w": jnp.eye(8)}, jnp.ones((2, 8))
      >>> result = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=qjax.int8())]), calibration=[x])
      >>> jax.jit(quantized(fn))(result.params, x).shape
      (2, 8)
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be a function of (params, *args), got {type(fn).__name__}: for a module see qjax.linen and qjax.nnx")
    programs = ProgramCache(fn)

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = split_arguments(params, args, kwargs)
        program = programs(arguments)
        interpreter = Interpreter({site.key: site for site in program.sites}, rule=packed_rule)
        outs, _ = interpreter(program.jaxpr, [*arguments.params, *arguments.inputs])
        return jax.tree.unflatten(program.out_tree, outs)

    return call
