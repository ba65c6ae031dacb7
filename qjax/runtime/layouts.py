"""Weights in the layout of a kernel: `laid_out` brings a `QTensor` there, `LaidOut.plain` back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from qjax_kernels.request import Weight

from qjax.core import CodebookSpec, FloatSpec, QTensor, pack_codes, padded_size, signed_codes, unpack, zero_dtype
from qjax.program import Packed, compat
from qjax.runtime.kernels import Codes, Layout
from qjax.runtime.request import levels_of, rows_of, weight_of


@dataclasses.dataclass(frozen=True)
class LaidOut:
    """The form of a `QTensor` whose arrays have the layout of a kernel.

    Attributes:
      layout: which.
      weight: the format, as kernels call it.
      k: contracted values, with padding.
      parts: kept axes that hold parts (experts).
      rows: kept axes that hold rows, behind those; axes in front of both are stacked, an array for each.
    """

    layout: Layout
    weight: Weight
    k: int
    parts: int
    rows: int

    def __str__(self) -> str:
        return self.layout.name

    def plain(self, q: QTensor) -> QTensor:
        """Brings the codes back as `qjax.core.pack` lays them, the scales as float32."""
        kept = q.codes.shape[:-1]
        stacked = kept[: len(kept) - self.parts - self.rows]

        def one(laid: Any) -> Codes:
            return self.layout.unpack(self.weight, self.k, laid)

        found = _mapped(one, len(stacked))(q.laid)
        scale, dtype = found.scale, jnp.int8 if signed_codes(q.spec) else jnp.uint8
        if isinstance(q.spec, FloatSpec) and q.spec.element == "int8":
            scale = scale * 64
        return dataclasses.replace(
            q,
            codes=pack_codes(found.codes.astype(dtype), q.spec).reshape(*kept, -1),
            scale=None if q.scale is None else scale.reshape(*kept, -1).astype(getattr(q.spec, "scale_dtype", "float32")),
            zero_point=None if q.zero_point is None else found.zero_point.reshape(*kept, -1).astype(zero_dtype(q.spec)),  # pyright: ignore
            laid=None,
            form=None,
        )


def layout_of(q: QTensor) -> Layout | None:
    """The layout that a weight has; None for its own."""
    return q.form.layout if isinstance(q.form, LaidOut) else None


def laid_out(q: QTensor, layout: Layout, parts: int, stacked: int) -> QTensor:
    """Brings a weight into the layout of a kernel.

    Args:
      q: as it was quantized; scales that take a byte become float32.
      layout: where to.
      parts: how many of its kept axes hold parts of one product (experts).
      stacked: how many kept axes in front of those hold independent weights (layers of a scan).

    Returns:
      A `QTensor` without the codes in their own layout.

    Raises:
      ValueError: its format is none that kernels take.
    """
    q = with_float_scales(q)
    k = padded_size(math.prod(q.sizes), q.spec)
    weight = weight_of(q.spec, math.prod(q.sizes))
    if isinstance(weight, str):
        raise ValueError(f"`q`, {q.spec}, has no layout of kernels: {weight}")
    kept = q.codes.shape[:-1]
    lead, form = kept[: stacked + parts], LaidOut(layout, weight, k, parts, len(kept) - parts - stacked)
    part = (math.prod(kept[stacked : stacked + parts]),) if math.prod(kept[stacked : stacked + parts]) != 1 else ()
    shape = (*kept[:stacked], *part, math.prod(kept[len(lead) :]))
    stored, scale, zero_point = rows_of(q, shape)
    codes = stored if weight.bits == 8 else unpack(stored, weight.bits, k, weight.kind == "int")
    levels = levels_of(q)

    def one(codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> Any:
        return layout.pack(weight, Codes(codes, scale, zero_point, levels))

    empty = jnp.zeros((*kept, 0), q.codes.dtype)
    return dataclasses.replace(
        q,
        codes=empty,
        scale=None if q.scale is None else jnp.zeros((*kept, 0), q.scale.dtype),
        zero_point=None if q.zero_point is None else jnp.zeros((*kept, 0), q.zero_point.dtype),
        laid=_mapped(one, stacked)(codes, scale, zero_point),
        form=form,
    )


def laid_rows(weight: Packed, eqn: Any, indices: jax.Array) -> jax.Array | None:
    """Looks rows up in a table that is laid out for a kernel; None where its layout has no way to."""
    q, dims = weight.q, eqn.params["dimension_numbers"]
    form = q.form
    if not isinstance(form, LaidOut) or form.layout.rows is None:
        return None
    plain = q.perm is None and q.rotation is None and q.input_scale is None and q.adapter_left is None
    if not plain or q.ndim != 2 or q.axes != (-1,) or tuple(dims.start_index_map) != (0,):
        return None
    count, inside = q.shape[0], indices[..., 0]
    rows = form.layout.rows(form.weight, form.k, q.laid, jnp.clip(inside, 0, count - 1))[..., : math.prod(q.sizes)]
    mode = str(eqn.params["mode"])
    if "FILL" in mode:
        fill = eqn.params["fill_value"]
        valid = (inside >= 0) & (inside < count)
        rows = jnp.where(valid[..., None], rows, jnp.nan if fill is None else fill)
    x = rows.astype(q.dtype)
    for pending in weight.pending:
        (x,) = compat.bind(pending, [x])
    return jnp.moveaxis(x, indices.ndim - 1, dims.offset_dims[0])


def with_float_scales(q: QTensor) -> QTensor:
    """The same numbers with scales of floats."""
    scales = q.spec.scale_dtype if hasattr(q.spec, "scale_dtype") else ""  # pyright: ignore[reportAttributeAccessIssue]
    nested = isinstance(q.spec, CodebookSpec) and q.spec.double_quant
    if not nested and scales not in ("e8m0", "e4m3"):
        return q
    change: dict[str, Any] = {"double_quant": False} if nested else {"scale_dtype": "float32", "exponent_rule": "floor"}
    spec = dataclasses.replace(q.spec, **change)
    return dataclasses.replace(q, scale=q.scales(), nested_scale=None, nested_offset=None, spec=spec)


def _mapped(f: Callable[..., Any], times: int) -> Callable[..., Any]:
    for _ in range(times):
        f = jax.vmap(f)
    return f
