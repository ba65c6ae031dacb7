"""Products of integer activations and integer weights: int8 x int8 -> int32, the scales in the epilogue.

    y = s_x s_w (sum_k x_k w_k - z_x sum_k w_k - z_w sum_k x_k + K z_x z_w)

on codes x and w with scales s and zero points z; terms with a floating z_w are added in float32. Columns of
outliers are multiplied apart, in 16 bit (`outliers.py`).
Products of FP8 activations and FP8 weights go the same way, f8 x f8 -> float32 and no zero points.
Everything here is stock XLA; it is what a faster kernel is compared with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core import (
    FLOAT8,
    ActSpec,
    FloatSpec,
    IntSpec,
    PerBlock,
    PerGroup,
    QTensor,
    block_params,
    divide,
    encode_activation,
    group_length,
    uncanonicalize,
)
from qjax.program import Site
from qjax.program.labels import axes_of
from qjax.runtime.outliers import Split, outlier_product, split_outliers

BLOCK = 16  # rows of one expert at a time


class Codes(NamedTuple):
    """A weight's codes, int8 or FP8 (kept..., Kpad); scale (kept-like..., G); zero point int32 or float32 like the scale, or None."""

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None


def weight_codes(q: QTensor) -> Codes:
    """Unpacks a weight for an integer product. Unsigned 8-bit codes are moved down by 128, and their zero point with them."""
    if isinstance(q.spec, FloatSpec):
        scale = q.scales()
        if isinstance(q.spec.granularity, PerBlock):
            rows, count = q.codes.shape[-2], scale.shape[-2]
            scale = jnp.broadcast_to(scale[..., None, :], (*scale.shape[:-1], rows // count, scale.shape[-1]))
            scale = scale.reshape(*scale.shape[:-3], rows, scale.shape[-1])
        return Codes(lax.bitcast_convert_type(q.codes, FLOAT8[q.spec.element]), scale, None)
    kind = jnp.float32 if isinstance(q.spec, IntSpec) and q.spec.float_zero else jnp.int32
    codes, zero_point = q.codes_padded(), None if q.zero_point is None else q.zero_point.astype(kind)
    if codes.dtype == jnp.uint8 and q.spec.bits == 8:
        codes = lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)
        zero_point = (jnp.zeros(q.scale.shape, jnp.int32) if zero_point is None else zero_point) - 128
    return Codes(codes.astype(jnp.int8), q.scale.astype(jnp.float32), zero_point)


def _is_float8(spec: Any) -> bool:
    """Whether codes are FP8 with scales of a float each, not of blocks so small that a product for each would cost more."""
    return isinstance(spec, FloatSpec) and spec.element in FLOAT8 and spec.scale_dtype not in ("e8m0", "e4m3")


def why_not_float8(site: Site, spec: Any, act: ActSpec) -> str:
    """Says why a site's product cannot run on FP8 operands; "" if it can."""
    for name, one in (("weights", spec), ("activations", act.spec)):
        if not _is_float8(one):
            return f"{name} of {one} are no FP8 with float scales"
    groups = [group_length(0, one) for one in (spec, act.spec)]
    if groups[1] and groups[0] != groups[1]:
        return f"activations in groups of {groups[1]} meet weights that have no such groups"
    if site.op == "conv_general_dilated":
        return "a convolution"
    if site.op == "dot_general" and axes_of([site.view.dims[w] for w, _ in site.pairs]) != set(site.contracted):
        return "it is contracted over a part of its axes"
    return ""


def why_not(site: Site, spec: Any) -> str:
    """Says why a site's product cannot run on integers; "" if it can. Its activations are then rounded in front of a float product."""
    reason = _why_no_integers(spec)
    if reason:
        return reason
    if site.op == "conv_general_dilated" and (not spec.symmetric or not spec.signed):
        return "a convolution with a zero point in its weights"
    if site.op == "conv_general_dilated" and isinstance(spec.granularity, PerGroup):
        return "a convolution whose weights share scales in groups"
    if site.op == "dot_general" and axes_of([site.view.dims[w] for w, _ in site.pairs]) != set(site.contracted):
        return "it is contracted over a part of its axes"
    return ""


def _why_no_integers(spec: Any) -> str:
    if not isinstance(spec, IntSpec):
        return f"{spec} has no integers"
    return "a 2-D block of weights shares a scale" if isinstance(spec.granularity, PerBlock) else ""


def why_no_product(site: Site, eqn: Any, q: QTensor, ndim: int) -> str:
    """Says why an equation cannot multiply the codes of a weight as it arrives there, which a site does not tell; "" if it can.

    Args:
      site: where it stands.
      eqn: the equation.
      q: the weight, rearranged by the views on its way.
      ndim: of the activation.
    """
    if q.adapter_left is not None:
        return "its low-rank part was not taken off"
    if q.act is None:
        return "its activations stay float"
    reason = why_not_float8(site, q.spec, q.act) if q.act.is_float else _why_no_integers(q.spec)
    if reason:
        return reason
    if site.op == "dot_general":
        return _why_no_dot(eqn, q, site.operand)
    return _why_no_conv(eqn, q, q.act) if site.op == "conv_general_dilated" else _why_no_ragged_dot(eqn, q, ndim)


def _why_no_dot(eqn: Any, q: QTensor, operand: int) -> str:
    contract, batch = eqn.params["dimension_numbers"]
    flat = [a + q.ndim for a in q.axes]
    if sorted(flat) != sorted(contract[operand]):
        return "it contracts other axes than those that the codes run along"
    places = _kept_places(q, batch[operand])
    of_rows = [a for a in (q.input_scale, q.perm, q.act_scale) if a is not None]
    if any(n != 1 for a in of_rows for i, n in enumerate(a.shape[:-1]) if i not in places):
        return "parts of it that meet the same rows want them in another form each: divided, in order, on a grid"
    return ""


def _kept_places(q: QTensor, axes: Sequence[int]) -> list[int]:
    """Where axes that a weight keeps stand among those."""
    flat = [a + q.ndim for a in q.axes]
    kept = [i for i in range(q.ndim) if i not in flat]
    return [kept.index(axis) for axis in axes]


def dot(eqn: Any, x: jax.Array, q: QTensor, act: ActSpec, operand: int) -> jax.Array:
    """The `dot_general` of an equation on integers."""
    contract, batch = eqn.params["dimension_numbers"]
    flat = [a + q.ndim for a in q.axes]
    pair = dict(zip(contract[operand], contract[1 - operand], strict=True))
    free = [i for i in range(x.ndim) if i not in batch[1 - operand] and i not in contract[1 - operand]]
    lead = [x.shape[i] for i in (*batch[1 - operand], *free)]
    x = x.transpose(*batch[1 - operand], *free, *(pair[a] for a in flat)).reshape(*lead, -1)
    return _matmul(x, q, act, _kept_places(q, batch[operand]), x_first=operand == 1)


def _matmul(x: jax.Array, q: QTensor, act: ActSpec, places: Sequence[int], x_first: bool) -> jax.Array:
    """x (batch..., free..., K) by q (kept..., K), whose kept axes at `places` are the batch axes: (batch..., free..., rest...)."""
    n_batch = len(places)
    n_free, n_rest = x.ndim - 1 - n_batch, q.codes.ndim - 1 - n_batch
    w = weight_codes(q)
    order = [*places, *(i for i in range(q.codes.ndim - 1) if i not in places)]

    def on_x(a: jax.Array) -> jax.Array:  # (batch..., free...) -> the rank of the result
        lead, rest = a.shape[:n_batch], a.shape[n_batch:]
        return a.reshape(*lead, *rest, *[1] * n_rest) if x_first else a.reshape(*lead, *[1] * n_rest, *rest)

    def on_w(a: jax.Array) -> jax.Array:  # (kept...) -> the rank of the result
        a = a.transpose(order)
        lead, rest = a.shape[:n_batch], a.shape[n_batch:]
        return a.reshape(*lead, *[1] * n_free, *rest) if x_first else a.reshape(*lead, *rest, *[1] * n_free)

    def of_weight(a: jax.Array | None) -> jax.Array | None:  # (kept-like..., 1 or K) of the batch -> (batch..., 1..., last)
        if a is None:
            return None
        a = a.transpose(*order, a.ndim - 1)
        return a.reshape(*a.shape[:n_batch], *[1] * n_free, a.shape[-1])

    half = jnp.float16 if x.dtype == jnp.float16 else jnp.bfloat16
    input_scale = of_weight(q.input_scale)
    if input_scale is not None:
        x = divide(x.astype(jnp.float32), input_scale)
    if q.rotation is not None:
        x = q.rotation.apply(x.astype(jnp.float32))
    perm = of_weight(q.perm)
    if perm is not None:
        x = jnp.take_along_axis(x, jnp.broadcast_to(perm, (*x.shape[:n_batch], *[1] * n_free, x.shape[-1])), axis=-1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, w.codes.shape[-1] - x.shape[-1])])
    split: Split | None = None
    if act.outliers is not None:
        split = split_outliers(x, act.outliers, n_batch, half)
        x = split.inliers
    axes = (x.ndim - 1,) if act.per_token else tuple(range(x.ndim))
    codes, scale, zero_point = encode_activation(x, act, axes, of_weight(q.act_scale), of_weight(q.act_zero_point))
    numbers = _numbers(n_batch, places, codes.ndim - 1, w.codes.ndim - 1, x_first)
    z_x = None if zero_point is None else zero_point[..., 0]

    grouped = scale.shape[-1] > 1  # activations have scales for each group

    def group(x: jax.Array, w: Codes, x_scale: jax.Array | None) -> jax.Array:
        """One group of columns: `w.scale` and `w.zero_point` are (kept-like...)."""
        operands = (x, w.codes) if x_first else (w.codes, x)
        total = _product(*operands, numbers)
        if z_x is not None:
            total = total - on_x(z_x) * on_w(jnp.sum(w.codes, axis=-1, dtype=jnp.int32))
        if w.zero_point is not None:
            sums = jnp.sum(x, axis=-1, dtype=jnp.int32) - (0 if z_x is None else z_x * x.shape[-1])
            kind = w.zero_point.dtype  # with a floating zero point the integers end here
            total = total.astype(kind) - on_x(sums.astype(kind)) * on_w(w.zero_point)
        total = total.astype(jnp.float32) * on_w(w.scale)
        return total if x_scale is None else total * on_x(x_scale)

    out = _over_groups(group, codes, w, scale if grouped else None)
    out = out if grouped else out * on_x(scale[..., 0])
    if split is None:
        return out
    large, scaled = outlier_product(split, w.codes, w.scale, w.zero_point, order, n_batch, x_first)
    return out + (large if scaled else large * on_w(w.scale[..., 0]))


def _numbers(n_batch: int, places: Sequence[int], x_last: int, w_last: int, x_first: bool) -> Any:
    contract, batch = ((x_last,), (w_last,)), (tuple(range(n_batch)), tuple(places))
    return (contract, batch) if x_first else (contract[::-1], batch[::-1])


def _product(a: jax.Array, b: jax.Array, numbers: Any) -> jax.Array:
    """int8 x int8 -> int32, or f8 x f8 -> float32; by precision, for XLA's default adds fewer bits of FP8 products up on a GPU."""
    if a.dtype == jnp.int8:
        return lax.dot_general(a, b, numbers, preferred_element_type=jnp.int32)
    return lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _over_groups(group: Any, x: jax.Array, w: Codes, x_scale: jax.Array | None) -> jax.Array:
    """Sums a function of one group of columns over all groups, one at a time: all at once would hold a result for each."""
    count = w.scale.shape[-1]
    if count == 1:
        return group(x, jax.tree.map(lambda a: a if a is w.codes else a[..., 0], w), None)

    def cut(a: jax.Array) -> jax.Array:  # (..., count * n) -> (count, ..., n)
        return jnp.moveaxis(a.reshape(*a.shape[:-1], count, -1), -2, 0)

    def step(total: jax.Array, part: tuple[jax.Array, Codes, jax.Array | None]) -> tuple[jax.Array, None]:
        return total + group(*part), None

    zero_point = None if w.zero_point is None else jnp.moveaxis(w.zero_point, -1, 0)
    of_x = None if x_scale is None else jnp.moveaxis(x_scale, -1, 0)
    parts = cut(x), Codes(cut(w.codes), jnp.moveaxis(w.scale, -1, 0), zero_point), of_x
    first = group(*jax.tree.map(lambda a: a[0], parts))
    return lax.scan(step, first, jax.tree.map(lambda a: a[1:], parts))[0]


def _why_no_conv(eqn: Any, q: QTensor, act: ActSpec) -> str:
    params, w = eqn.params, jax.eval_shape(weight_codes, q)
    if w.scale.shape[-1] != 1 or w.zero_point is not None:
        return "a convolution whose weights have a zero point, or scales in groups"
    if q.perm is not None or q.input_scale is not None or q.rotation is not None:
        return "a convolution whose input is put in order, divided or rotated"
    if params["dimension_numbers"].rhs_spec[0] in [a + q.ndim for a in q.axes]:
        return "a convolution whose codes run along its outputs"
    spread = any(d != 1 for d in params["lhs_dilation"]) or any(min(width) < 0 for width in params["padding"])
    if spread and not (act.spec.signed and act.spec.symmetric):
        return "a convolution of spread or cut inputs with a zero point"
    return ""


def conv(eqn: Any, x: jax.Array, q: QTensor, act: ActSpec) -> jax.Array:
    """The `conv_general_dilated` of an equation on integers."""
    params = eqn.params
    dims = params["dimension_numbers"]
    w = weight_codes(q)
    asymmetric = not (act.spec.signed and act.spec.symmetric)
    padding = params["padding"]
    if asymmetric:
        # Zeros have a code of their own, so they are there before the rounding.
        widths = [(0, 0)] * x.ndim
        for axis, width in zip(dims.lhs_spec[2:], padding, strict=True):
            widths[axis] = tuple(width)
        x, padding = jnp.pad(x, widths), [(0, 0)] * len(padding)
    axes = conv_axes(eqn, x.ndim) if act.per_token else tuple(range(x.ndim))
    static = [None if a is None else a.reshape([1] * x.ndim) for a in (q.act_scale, q.act_zero_point)]
    codes, scale, zero_point = encode_activation(x, act, axes, *static)
    kernel = uncanonicalize(w.codes[..., : math.prod(q.sizes)], q.axes, q.sizes)
    names = ("window_strides", "lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count")
    total = lax.conv_general_dilated(
        codes, kernel, padding=padding, dimension_numbers=dims, preferred_element_type=jnp.int32, **{n: params[n] for n in names}
    )

    def place(a: jax.Array, out_axis: int) -> jax.Array:
        return a.reshape([-1 if i == out_axis else 1 for i in range(total.ndim)])

    if zero_point is not None:
        sums = jnp.sum(w.codes[..., : math.prod(q.sizes)], axis=-1, dtype=jnp.int32)
        total = total - place(zero_point, dims.out_spec[0]) * place(sums, dims.out_spec[1])
    # Per tensor there is one scale for all channels, which broadcasts.
    return total.astype(jnp.float32) * place(w.scale[..., 0], dims.out_spec[1]) * place(scale, dims.out_spec[0])


def conv_axes(eqn: Any, ndim: int) -> tuple[int, ...]:
    """The axes of a convolution's input that one example has for itself."""
    return tuple(i for i in range(ndim) if i != eqn.params["dimension_numbers"].lhs_spec[0])


def _why_no_ragged_dot(eqn: Any, q: QTensor, ndim: int) -> str:
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch) = dims.dot_dimension_numbers
    plain = tuple(contract[0]) == (1,) and not batch[0] and tuple(dims.lhs_ragged_dimensions) == (0,) and ndim == 2
    if not plain or q.ndim != 3 or tuple(a + 3 for a in q.axes) != tuple(contract[1]) or tuple(dims.rhs_group_dimensions) != (0,):
        return "experts whose rows are not (rows, K), or their weights not (experts, K, N) in some order"
    return ""


def ragged_dot(eqn: Any, x: jax.Array, q: QTensor, act: ActSpec, sizes: jax.Array) -> jax.Array:
    """Experts that share a list of rows, on integers.

    Works through blocks of rows that belong to one expert: rows / BLOCK + experts of them, so the arithmetic does not grow with
    rows times experts, as it does in a masked product over all experts.
    """
    if not act.static and not act.per_token:  # one range for all rows, not for those of a block
        scale, zero_point = block_params(x.reshape(1, -1), act.spec)
        q = dataclasses.replace(q, act_scale=scale[None], act_zero_point=None if zero_point is None else zero_point[None])
    rows, experts = x.shape[0], sizes.shape[0]
    ends = jnp.cumsum(sizes)
    counts = -(-sizes // BLOCK)
    last = jnp.cumsum(counts)

    def step(out: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        expert = jnp.minimum(jnp.searchsorted(last, block, side="right"), experts - 1)
        first = ends[expert] - sizes[expert] + (block - last[expert] + counts[expert]) * BLOCK
        one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, jnp.where(a.shape[0] == 1, 0, expert), 0, keepdims=False), q)
        mine = (first + jnp.arange(BLOCK) < ends[expert]) & (block < last[-1])
        x = lax.dynamic_slice_in_dim(padded, first, BLOCK)
        if act.outliers is not None:  # which columns are outliers is not for the rows of other experts to say
            x = jnp.where(mine[:, None], x, jnp.zeros((), x.dtype))
        y = _matmul(x, one, act, (), x_first=True)
        old = lax.dynamic_slice_in_dim(out, first, BLOCK)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None], y, old), first, 0), None

    padded = jnp.pad(x, ((0, BLOCK), (0, 0)))
    out = jnp.zeros((rows + BLOCK, q.shape[-1] if q.axes == (-2,) else q.shape[-2]), jnp.float32)
    return lax.scan(step, out, jnp.arange(-(-rows // BLOCK) + experts))[0][:rows]


def product(site: Site, eqn: Any, operands: Sequence[Any]) -> jax.Array | None:
    """The product of a site on integers or FP8, in the dtype that the equation gives; None if `why_no_product` has something against it."""
    q, x = operands[site.operand].q, operands[1 - site.operand]
    act = q.act
    if act is None or why_no_product(site, eqn, q, x.ndim):
        return None
    if site.op == "dot_general":
        out = dot(eqn, x, q, act, site.operand)
    elif site.op == "conv_general_dilated":
        out = conv(eqn, x, q, act)
    else:
        out = ragged_dot(eqn, x, q, act, jnp.asarray(operands[2]))  # a constant is a NumPy array
    return out.astype(eqn.outvars[0].aval.dtype)
