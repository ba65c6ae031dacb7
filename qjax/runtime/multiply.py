"""A site on the kernel that was chosen for it: differentiated, vmapped, and lowered for whatever platform it is compiled for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from qjax_kernels.request import Device, Request

from qjax.program import Packed, Site, compat
from qjax.program.primitives import PLACEMENTS
from qjax.runtime.alone import alone_or
from qjax.runtime.kernels import Choice, Kernel, Runtime, choose
from qjax.runtime.layouts import laid_out, layout_of
from qjax.runtime.request import check_result, operands_of, request_of, result_of, rows_alone, why_not_operands

# A function of (activation, weight, what else the equation takes): the product as XLA has it, also for the platforms that a kernel is not
# for.
Plain = Callable[..., jax.Array]
# What the sites of a call that are the same product share, by what makes them so: the product, and the casts of its weight.
Shared = dict[Any, tuple[Plain, tuple[Any, ...]]]
_HARMLESS = PLACEMENTS | {"convert_element_type", "copy", "copy_p", "name", "stop_gradient", "pvary", "pbroadcast"}


def kernel_product(
    site: Site, eqn: Any, x: jax.Array, weight: Packed, runtime: Runtime, plain: Plain, others: tuple[jax.Array, ...] = (),
    shared: Shared | None = None,
) -> jax.Array | None:  # fmt: skip
    """Runs a site on a kernel.

    The choice is made here, while the program is traced. A program that is lowered for another platform than that of `runtime.device`
    gets `plain` there, and one for several TPUs, between which XLA cannot cut a kernel; with a forced kernel it is refused. Derivatives
    are those of the float product with the dequantized weight, with respect to the activations and, where they stay float, the scales;
    forward mode has none.

    Args:
      site: where.
      eqn: its equation.
      x: the activation.
      weight: the other operand, without an adapter.
      runtime: what to choose from.
      plain: the product as XLA has it.
      others: the sizes of a `ragged_dot`; nothing for a `dot_general`.
      shared: what other sites of this call are: layers alike are traced and lowered once. None keeps each for itself.

    Returns:
      The result of the equation; None where no kernel takes it.

    Raises:
      ValueError: `runtime.force` names a kernel that cannot run here.
    """
    request = reason = _request(site, eqn, x, weight, runtime.device)
    if isinstance(request, str):
        if runtime.force not in (None, "xla"):
            raise ValueError(f"`kernel` {runtime.force!r} cannot run {site.path}: {reason}")
        return None
    choice = _choose(site, request, runtime, weight)
    if choice.kernel is None:
        return None
    key = _alike(site, eqn, weight)
    if shared is None or key is None or runtime.force is not None:  # errors of a forced kernel name the site
        return _differentiable(site, eqn, request, runtime, weight, plain)(x, weight, *others)
    if key not in shared:
        shared[key] = jax.jit(_differentiable(site, eqn, request, runtime, weight, plain)), weight.pending
    product, pending = shared[key]
    return product(x, dataclasses.replace(weight, pending=pending), *others)


def _alike(site: Site, eqn: Any, weight: Packed) -> Any:
    """What two sites have in common that are the same product of other arrays; None where that cannot be compared."""
    anywhere = dataclasses.replace(site, key=(), leaf=0, path="", scope="", view=dataclasses.replace(site.view, leaf=0))
    key = anywhere, *(_said(each) for each in (eqn, *weight.pending))
    try:
        hash(key)
    except TypeError:  # parameters of an equation need not have a hash
        return None
    return key


def _said(eqn: Any) -> tuple[Any, ...]:
    """An equation without its operands."""
    avals = tuple(v.aval for v in (*eqn.invars, *eqn.outvars))
    return eqn.primitive, tuple(sorted(eqn.params.items(), key=lambda item: item[0])), avals, eqn.ctx


def _request(site: Site, eqn: Any, x: jax.Array, weight: Packed, device: Device) -> Request | str:
    request = request_of(site, weight.q, device, x.dtype, eqn.outvars[0].aval.dtype)
    if isinstance(request, str):
        return request
    strange = [e.primitive.name for e in weight.pending if e.primitive.name not in _HARMLESS]
    if strange:
        return f"its values go through {strange[0]} first"
    reason = _placed(x) or _placed(weight.q.codes)
    return reason or why_not_operands(site, eqn, weight.q) or request


def _placed(a: Any) -> str:
    """Why an array is not one that a kernel sees whole; what jit spreads over devices by itself is not known here."""
    spec = getattr(getattr(jax.typeof(a), "sharding", None), "spec", None) or ()
    return "it is sharded over explicit axes of a mesh" if any(axis is not None for axis in spec) else ""


def _choose(site: Site, request: Request, runtime: Runtime, weight: Packed) -> Choice:
    return choose(request, runtime.kernels, runtime.force, layout_of(weight.q), site.path, runtime.tuned)


def _differentiable(site: Site, eqn: Any, request: Request, runtime: Runtime, weight: Packed, plain: Plain) -> Plain:
    def choose_for(request: Request) -> Kernel | None:
        return _choose(site, request, runtime, weight).kernel

    fast = _vmappable(site, eqn, request, choose_for, runtime.force, plain, ())

    def float_product(x: jax.Array, weight: Packed, *others: jax.Array) -> jax.Array:
        operands = [x, x, *others]
        operands[site.operand] = weight.value()
        return compat.bind(eqn, operands)[0]

    @jax.custom_vjp
    def run(x: jax.Array, weight: Packed, *others: jax.Array) -> jax.Array:
        return fast(x, weight, *others)

    def forward(x: jax.Array, weight: Packed, *others: jax.Array) -> tuple[jax.Array, Any]:
        return fast(x, weight, *others), (x, weight, others)

    def backward(saved: Any, t: jax.Array) -> tuple[Any, ...]:
        x, weight, others = saved
        none = (None,) * len(others)
        if weight.q.act is not None:  # the straight-through gradient, as without a kernel
            return jax.vjp(lambda x: float_product(x, weight, *others), x)[1](t)[0], None, *none
        return *jax.vjp(lambda x, weight: float_product(x, weight, *others), x, weight)[1](t), *none

    run.defvjp(forward, backward)
    return run


def _vmappable(
    site: Site, eqn: Any, request: Request, choose_for: Callable[[Request], Kernel | None], force: str | None, plain: Plain,
    extra: tuple[int, ...],
) -> Plain:  # fmt: skip
    """The product of x (extra..., shape...): axes that `vmap` added are rows more of the same product."""
    times = math.prod(extra)
    wider = dataclasses.replace(request, m=request.m * times)
    kernel = choose_for(wider)
    slow = plain
    for _ in extra:
        slow = jax.vmap(slow, in_axes=(0, None))
    if kernel is None:
        return slow

    def fast(x: jax.Array, weight: Packed, *others: jax.Array) -> jax.Array:
        q = weight.q
        if kernel.layout is not None and q.form is None:
            q = laid_out(q, kernel.layout, 1 if request.ragged else len(site.batch), 0)
        operands = operands_of(site, eqn, wider, q, x.reshape(times, *site.x_shape), *others, rotate=not kernel.rotates)
        y = kernel.run(wider, operands, q.act)
        check_result(kernel, wider, y)
        y = result_of(site, eqn, q, y, times)
        return y.reshape(*extra, *y.shape[1:])

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, weight: Packed, *others: jax.Array) -> jax.Array:
        if force is not None:
            return lax.platform_dependent(x, weight, *others, **{kernel.platform: fast})
        mine = alone_or(fast, slow) if kernel.platform == "tpu" and not site.sharded else fast
        return lax.platform_dependent(x, weight, *others, **{kernel.platform: mine}, default=slow)

    @run.def_vmap
    def rule(size: int, batched: Any, x: jax.Array, weight: Packed, *others: jax.Array) -> tuple[jax.Array, bool]:
        of_x, of_weight, *of_others = batched
        if any(jax.tree.leaves(of_weight)):
            if force is not None:
                raise ValueError(f"`kernel` {force!r} cannot run {site.path}: its weight is vmapped")
            axes = jax.tree.map(lambda own: 0 if own else None, (of_x, of_weight, *of_others))
            return jax.vmap(slow, in_axes=axes)(x, weight, *others), True
        if not request.ragged and rows_alone(weight.q.act):
            return _vmappable(site, eqn, request, choose_for, force, plain, (size, *extra))(x, weight), True
        own = [of_x, *of_others]  # what one of them does with its rows depends on all of these: one after another

        def one(values: list[jax.Array]) -> jax.Array:
            left = iter(values)
            x_one, *rest = (next(left) if mine else a for mine, a in zip(own, (x, *others), strict=True))
            return run(x_one, weight, *rest)

        return lax.map(one, [a for mine, a in zip(own, (x, *others), strict=True) if mine]), True

    return run
