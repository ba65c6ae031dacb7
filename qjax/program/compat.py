"""The one place that knows how jaxprs differ between jax 0.10 and 0.12."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

Literal = core.Literal
Var = core.Var


def parts(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Splits a program into its open jaxpr and its constants.

    jax 0.10 has `ClosedJaxpr(jaxpr, consts)` and, inside `remat2` and `shard_map`, a bare `Jaxpr`;
    in 0.12 both are one class.
    """
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Returns (number of constants, number of carries) of a `scan` equation."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def abstract(aval: Any, shape: Any = None, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """Returns a stand-in for an array: its shape, dtype and, inside a `shard_map`, over which mesh axes it varies."""
    shape, dtype = aval.shape if shape is None else shape, aval.dtype if dtype is None else dtype
    varying = getattr(aval, "manual_axis_type", None)
    more = {}
    if varying is not None and not varying.empty:
        mesh = jax.sharding.get_abstract_mesh()
        everywhere = jax.sharding.PartitionSpec(*[None] * len(shape))
        more = {"manual_axis_type": varying, "sharding": jax.sharding.NamedSharding(mesh, everywhere)}
    return jax.ShapeDtypeStruct(shape, dtype, weak_type=getattr(aval, "weak_type", False), **more)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Applies an equation unchanged and returns the list of its results."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


# Calls whose body is one program over all operands; the name of the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}
CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
REMAT = frozenset({"remat2", "checkpoint"})
INLINE = frozenset({"jit", "pjit", "closed_call", "core_call"})


def subprograms(eqn: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Returns the programs inside an equation, each with the suffix it adds to a site's key."""
    name = eqn.primitive.name
    if name in CALLS:
        return [((0,), eqn.params[CALLS[name]])]
    if name == "scan":
        return [((0,), eqn.params["jaxpr"])]
    if name == "while":
        return [((0,), eqn.params["cond_jaxpr"]), ((1,), eqn.params["body_jaxpr"])]
    if name == "cond":
        return [((i,), branch) for i, branch in enumerate(eqn.params["branches"])]
    return []


def constants(jaxpr: Any) -> Iterator[Any]:
    """Yields every constant of a program, also those that sit inside nested programs."""
    body, consts = parts(jaxpr)
    yield from consts
    for eqn in body.eqns:
        for _, inner in subprograms(eqn):
            yield from constants(inner)


def trace_context() -> tuple[Any, ...]:
    """Returns the settings, besides shapes, that decide what a function traces to."""
    names = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")
    return (*(getattr(jax.config, name) for name in names), jax.sharding.get_abstract_mesh())
