"""Lookups in a packed table."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core import NAN_BYTES, CastSpec, QTensor, with_plain_scales
from qjax.program import Packed


def gather_rows(weight: Packed, eqn: Any, indices: jax.Array) -> jax.Array | None:
    """Looks rows up in a packed table; None if the table is not stored by rows."""
    q, dims = weight.q, eqn.params["dimension_numbers"]
    by_rows = q.ndim == 2 and q.axes == (-1,) and tuple(dims.start_index_map) == (0,)
    # A scale for several rows (per tensor, 2-D blocks) is not indexed by the row.
    if not by_rows or isinstance(q.spec, CastSpec) or q.perm is not None:
        return None
    own = [a for a in (q.scale, q.levels) if a is not None and a.shape[0] == q.codes.shape[0]]
    if not own or (q.scale is not None and q.scale is not own[0]):
        return None
    if any(a is not None and a.shape[0] != 1 for a in (q.input_scale, q.adapter_right)):
        return None

    def rows(table: jax.Array | None, fill: Any) -> jax.Array | None:
        if table is None:
            return None
        numbers = lax.GatherDimensionNumbers(
            offset_dims=(indices.ndim - 1,), collapsed_slice_dims=(0,), start_index_map=(0,)
        )
        return lax.gather(
            table, indices, numbers, slice_sizes=(1, table.shape[1]), mode=eqn.params["mode"], fill_value=fill
        )

    # Rows out of range come as NaN, by way of the scale or the table; another value needs the float table.
    if eqn.params["fill_value"] is not None and not math.isnan(eqn.params["fill_value"]):
        return None
    lead = indices.ndim - 1

    def spread(part: jax.Array | None) -> jax.Array | None:
        return None if part is None else part.reshape(-1, part.shape[-1])

    if q.nested_offset is not None:
        q = with_plain_scales(q)  # blocks of scales run over rows
    nan = NAN_BYTES.get(q.spec.scale_dtype, jnp.nan)  # pyright: ignore[reportAttributeAccessIssue]
    levels = spread(rows(q.levels, jnp.nan)) if q.levels is own[-1] else q.levels
    picked = QTensor(
        spread(rows(q.codes, 0)), spread(rows(q.scale, nan)), spread(rows(q.zero_point, 0)), None, q.spec, q.axes, q.sizes, q.dtype,
        input_scale=q.input_scale, nested_scale=q.nested_scale, rotation=q.rotation, levels=levels,
        adapter_left=spread(rows(q.adapter_left, 0)), adapter_right=q.adapter_right,
    )
    x = Packed(picked, weight.pending).value()
    x = x.reshape(*indices.shape[:-1], x.shape[-1])
    return jnp.moveaxis(x, lead, dims.offset_dims[0])
