"""Packed parameters inside `shard_map`: the packed arrays are split as the parameter would have been."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from qjax.core import with_plain_scales
from qjax.program.packed import Packed, materialize


def shard_map_packed(
    eqn: Any, operands: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any] | None:
    """Rebuilds a `shard_map` over packed operands; None if no packed operand can be split as its spec asks."""
    mesh, jaxpr = eqn.params["mesh"], eqn.params["jaxpr"]
    specs: list[Any] = []
    values: list[Any] = []
    local: list[Any] = []
    for given, spec in zip(operands, eqn.params["in_specs"], strict=True):
        operand = given
        if isinstance(given, Packed) and any(entry is not None for entry in spec):
            # A part of a tensor knows nothing of the blocks of scales that run over all of it, nor of a kernel's layout.
            operand = Packed(with_plain_scales(given.q.plain()), given.pending)
        split = packed_specs(operand, spec, mesh) if isinstance(operand, Packed) else None
        if split is None:
            specs.append(spec)
            values.append(materialize(operand))
            local.append(None)
        else:
            specs.append(split[0])
            values.append(jax.tree.leaves(operand))
            local.append(split[1])
    if not any(local):
        return None

    def run(*args: Any) -> tuple[Any, ...]:
        inner = [rebuild(arg) if rebuild else arg for rebuild, arg in zip(local, args, strict=True)]
        return tuple(materialize(v) for v in body(jaxpr, inner))

    call = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=tuple(eqn.params["out_specs"]),
        axis_names=set(eqn.params["newly_manual_axes"]) if "newly_manual_axes" in eqn.params else set(mesh.axis_names),
        check_vma=eqn.params["check_vma"],
    )
    return list(call(*values))


def packed_specs(packed: Packed, spec: Any, mesh: Any) -> tuple[list[Any], Callable[[list[Any]], Packed]] | None:
    """Returns the specs of the packed arrays, and how the local arrays become the local `Packed`.

    A contracted axis may be split only if it is the only one, every part holds whole bytes and whole groups,
    nothing is padded and there is no permutation or rotation across parts.
    """
    q = packed.q
    if all(entry is None for entry in spec):  # every device has all of it, in whatever layout
        structure = jax.tree.structure(packed)
        return [PartitionSpec()] * structure.num_leaves, lambda leaves: jax.tree.unflatten(structure, leaves)
    ndim = len(q.shape)
    entries = (*spec, *[None] * (ndim - len(spec)))
    contracted = [a % ndim for a in q.axes]
    kept = [i for i in range(ndim) if i not in contracted]
    parts = {i: _parts(entries[i], mesh) for i in range(ndim)}
    inner = [entries[i] for i in contracted if parts[i] > 1]
    ways = math.prod(parts[i] for i in contracted)
    whole = q.perm is not None or q.rotation is not None or q.levels is not None or q.adapter_left is not None
    if inner and (len(q.axes) != 1 or whole):
        return None
    specs = []
    for leaf in jax.tree.leaves(q):
        axes = [entries[i] if leaf.shape[pos] != 1 else None for pos, i in enumerate(kept)]
        if any(n != 1 and leaf.shape[pos] % parts[i] for pos, i in enumerate(kept) for n in (leaf.shape[pos],)):
            return None
        last = inner[0] if inner and leaf.shape[-1] != 1 else None
        if last is not None and leaf.shape[-1] % ways:
            return None
        specs.append(PartitionSpec(*axes, last))
    if inner and not _whole_parts(q, ways):
        return None
    sizes = tuple(n // ways for n in q.sizes) if inner else q.sizes
    structure = jax.tree.structure(dataclasses.replace(packed, q=dataclasses.replace(q, sizes=sizes)))
    return specs, lambda leaves: jax.tree.unflatten(structure, leaves)


def _parts(entry: Any, mesh: Any) -> int:
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[name] for name in names)


def _whole_parts(q: Any, ways: int) -> bool:
    """Whether `ways` equal parts of the contracted axis hold whole bytes and whole groups, with no padding."""
    (k,) = q.sizes
    stored_bits = q.codes.shape[-1] * q.codes.dtype.itemsize * 8
    if k % ways or (k // ways) * q.spec.bits % 8 or stored_bits != k * q.spec.bits:
        return False
    groups = 1 if q.scale is None else q.scale.shape[-1]
    return groups == 1 or (groups % ways == 0 and k % groups == 0)
