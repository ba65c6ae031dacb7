"""`quantized`: a function that takes packed parameters where it took float ones."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from qjax.core import QProduct
from qjax.policy import no_product
from qjax.program import Interpreter, Key, Product, Program, ProgramCache, check_function, split_arguments
from qjax.runtime.attention import CALL, packed_attention
from qjax.runtime.cache import check_caches
from qjax.runtime.installed import runtime_of
from qjax.runtime.kernels import XLA, CacheKernel, Kernel, check_name
from qjax.runtime.products import product_rule
from qjax.runtime.select import packed_rule


def quantized(
    fn: Callable[..., Any],
    sites: Mapping[str, QProduct] | None = None,
    *,
    kernel: str | None = None,
    device: Any = None,
    kernels: Sequence[Kernel | CacheKernel] | None = None,
    tuned: str | os.PathLike[str] | None = None,
) -> Callable[..., Any]:
    """Transforms `fn(params, *args)` so that `params` may hold `QTensor` leaves, and the arguments `QCache` ones.

    The function is traced with the float shapes; wherever a packed parameter meets data, the fastest kernel runs that takes the
    product (`qjax doctor` lists them), or XLA, which takes all. The choice is made while the function is traced and costs a call nothing;
    a program that is lowered for another platform than `device` gets XLA there. A packed cache (see `qjax.quantized_cache`) is written
    in its packed form and comes back so; `qjax.cached_attention` reads it so, too, where a kernel can. The result is an ordinary
    function: `jit`, `vmap`, `scan`, `shard_map` and `jax.export` it, and differentiate it with respect to the other arguments;
    forward-mode derivatives (`jax.jvp`) need `kernel="xla"`.
    Call it under `jit`: alone it dispatches operation by operation.

    Args:
      fn: any JAX function whose first argument is the tree of parameters. As under `jit`, arrays are traced and must not
        decide Python control flow; other leaves are static.
      sites: `result.sites`, the products of two activations that multiply integers, by name. Without it they are float: they have
        no parameter that could say so.
      kernel: the only kernel that may run, by name; "xla" for none. None chooses for each product.
      device: where the function will run, a `jax.Device` or, to compile ahead of time, a `qjax.Device`. None is jax's default device.
      kernels: what to choose from, the fastest first; None for all that are installed.
      tuned: the folder of what `qjax tune` measured, which goes before the order of `kernels`. None is the user's cache folder where
        `kernels` is None, too, and nothing where it is not.

    Returns:
      The function, with the same arguments and results.

    Raises:
      TypeError: `fn` is no function, or `sites` holds something else than products. When called:
      ValueError: `sites` names a product that the program does not have; a packed cache where the function takes none; `kernel` is not
        the name of one, or cannot run a product, with the reason.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fn = lambda p, x: x @ p["w"]
      >>> params, x = {"w": jnp.eye(8)}, jnp.ones((2, 8))
      >>> result = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=qjax.int8())]), calibration=[x])
      >>> jax.jit(quantized(fn))(result.params, x).shape
      (2, 8)
    """
    check_function(fn)
    sites = checked_products(sites)
    programs = ProgramCache(fn)
    if kernels is not None or kernel == XLA:
        check_name(kernel, kernels or ())

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = split_arguments(params, args, kwargs)
        program = programs(arguments)
        named = named_products(program, sites)
        runtime = runtime_of(kernel, device, kernels, tuned)
        rule = functools.partial(packed_rule, runtime=runtime, memo={}, shared={})
        reads: list[bool] = []

        def read(eqn: Any, operands: Any) -> Any:
            outs = packed_attention(eqn, operands, runtime)
            reads.append(outs is not None)
            return outs

        calls = {CALL: read}
        at = {site.key: site for site in program.sites}
        interpreter = Interpreter(at, rule=rule, products=named, product_rule=product_rule, calls=calls)
        state = {key: sites[product.name] for key, product in named.items()}
        values = [*arguments.params, *arguments.inputs]
        check_caches(program, values)
        outs, _ = interpreter(program.jaxpr, values, state)
        if runtime.force_cache not in (None, XLA) and not any(reads):
            raise ValueError(f"`kernel` {runtime.force_cache!r} reads packed caches, and the program hands none to qjax.cached_attention: "
                             "pack one with qjax.quantized_cache, or leave `kernel` out")  # fmt: skip
        return jax.tree.unflatten(program.out_tree, outs)

    return call


def checked_products(sites: Any) -> dict[str, QProduct]:
    """The argument `sites`, or an error that names it."""
    if sites is None:
        return {}
    if not isinstance(sites, Mapping) or not all(isinstance(q, QProduct) for q in sites.values()):
        raise TypeError(f"`sites` must be the `sites` of a result, got {type(sites).__name__}: write sites=result.sites")
    return dict(sites)


def named_products(program: Program, sites: Mapping[str, QProduct]) -> dict[Key, Product]:
    """The products of a program that `sites` names, by key; ValueError if it names others."""
    known = {product.name: product for product in program.products}
    for name in sites:
        if name not in known:
            raise ValueError(f"`sites` names {name!r}, {no_product(name, program)}")
    return {known[name].key: known[name] for name in sites}
