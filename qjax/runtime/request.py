"""What a site asks of a kernel, and its operands as plain arrays: any `dot_general` as y (P, M, N) = x (P, M, K) w (P, N, K)^T.

P are the axes that both operands have (experts); M the other axes of the activation; N the other axes of the weight; K what is
contracted, in the order in which the weight flattens it, padded as its codes are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from qjax_kernels.request import Device, Request, Weight

from qjax.core import (
    ActSpec,
    CastSpec,
    CodebookSpec,
    FloatSpec,
    IntSpec,
    LearnedSpec,
    PerBlock,
    PerGroup,
    PerToken,
    QTensor,
    Spec,
    divide,
    group_length,
    padded_size,
)
from qjax.core.elements import MINIFLOATS, decode_minifloat
from qjax.program import Site
from qjax.program.labels import axes_of, size


class Operands(NamedTuple):
    """What a kernel is given. Without P where `request.parts` is 1.

    Attributes:
      x: float32 or bfloat16 (P, M, K), as `request.dtype` says.
      codes: of the weight, (P, N, K * bits / 8) bytes as `qjax.core.pack` lays them; int8 or uint8 (P, N, K) where they have 8 bits.
      scale: float32 (P, N, G), G = 1 where `request.weight.group_size` is None.
      zero_point: int32 of the shape of `scale`, or None where the kind is not "uint".
      levels: float32 (2^bits,), the table, or None where the kind is not "codebook".
      laid: the weight in the kernel's layout; then codes, scale and zero point are None.
    """

    x: jax.Array
    codes: jax.Array | None
    scale: jax.Array | None
    zero_point: jax.Array | None
    levels: jax.Array | None
    laid: Any = None


def request_of(site: Site, q: QTensor, device: Device, dtype: Any, out_dtype: Any) -> Request | str:
    """Returns what a site asks for, or why it is no product that kernels are written for.

    Args:
      site: any site.
      q: its weight, arrays or shapes; a view of it or the parameter as it is stored.
      device: where the program will run.
      dtype: of the activation.
      out_dtype: of the result.

    Returns:
      A `Request`, or the reason.
    """
    reason = _no_product(site, q, dtype, out_dtype)
    if reason:
        return reason
    weight, activation = weight_of(q.spec, math.prod(q.sizes)), activation_of(q.act)
    if isinstance(weight, str):
        return weight
    if activation is not None and not activation[0]:
        return activation[1]
    own, along = {x for _, x in (*site.pairs, *site.batch)}, {w for w, _ in site.batch}
    m = math.prod(n for i, n in enumerate(site.x_shape) if i not in own)
    sizes = [size(dim) for dim in site.view.dims]
    parts = math.prod(sizes[w] for w in along)
    n = math.prod(sizes[w] for w in range(len(sizes)) if w not in along and w not in {w for w, _ in site.pairs})
    if 0 in (m, parts, n):
        return "it is empty"
    both = {np.dtype(dtype).name, np.dtype(out_dtype).name} == {"bfloat16"}
    return Request(
        device=device,
        m=m,
        n=n,
        k=padded_size(math.prod(q.sizes), q.spec),
        weight=weight,
        dtype="bfloat16" if both else "float32",
        activation=None if activation is None else activation[0],
        parts=parts,
    )


def weight_of(spec: Spec, k: int) -> Weight | str:
    """How kernels call a spec of k contracted values, or why they have no word for it.

    >>> from qjax.core import int4
    >>> weight_of(int4(group_size=128), 4096), weight_of(int4(group_size=128), 128)
    (Weight(kind='int', bits=4, group_size=128), Weight(kind='int', bits=4, group_size=None))
    """
    if isinstance(spec, CastSpec):
        return f"{spec} has no codes"
    if isinstance(spec.granularity, PerBlock):
        return "a 2-D block of weights shares a scale"
    length = group_length(k, spec) if isinstance(spec.granularity, PerGroup) else None
    group = None if length is None or length >= padded_size(k, spec) else length
    match spec:
        case IntSpec() if spec.float_zero:
            return "its zero points are floats"
        case IntSpec() if spec.signed != spec.symmetric:
            return f"{'signed codes with' if spec.signed else 'unsigned codes without'} zero points"
        case IntSpec():
            return Weight("int" if spec.signed else "uint", spec.bits, group)
        case CodebookSpec():
            return Weight("codebook", spec.bits, group)
        case LearnedSpec():
            return "each of its rows has a table of its own" if spec.per_row else Weight("codebook", spec.bits, group)
        case FloatSpec(element="e4m3") if spec.scale_dtype not in ("e8m0", "e4m3"):
            return Weight("fp8", 8, group)
        case FloatSpec(element="int8"):
            return Weight("int", 8, group)
        case FloatSpec() if spec.bits < 8:
            return Weight("codebook", spec.bits, group)
    return f"{spec} is no format of kernels"


def activation_of(act: ActSpec | None) -> tuple[Any, str] | None:
    """("int8" or "fp8", "") for activations that kernels round themselves; (None, why not) for others; None if they stay float."""
    if act is None:
        return None
    if act.static or act.outliers is not None or act.spec.granularity != PerToken():
        return None, f"activations {act} are not one scale a row, found as they come"
    if isinstance(act.spec, FloatSpec):
        fits = act.spec.element == "e4m3" and act.spec.scale_dtype not in ("e8m0", "e4m3")
        return ("fp8", "") if fits else (None, f"activations {act} are not FP8 with a float scale")
    fits = act.spec.bits == 8 and act.spec.signed and act.spec.symmetric
    return ("int8", "") if fits else (None, f"activations {act} are not symmetric int8")


def reach_of(act: ActSpec | None) -> float:
    """How many steps of int8 the largest magnitude of a row is: 127.5 reaches half a step beyond the codes, 127 leaves -128 out.

    >>> from qjax.core import dynamic, int8
    >>> reach_of(dynamic(int8())), reach_of(dynamic(int8(scale_rule="full")))
    (127.5, 127.0)
    """
    return 127.0 if act is not None and isinstance(act.spec, IntSpec) and act.spec.scale_rule == "full" else 127.5


def operands_of(site: Site, eqn: Any, request: Request, q: QTensor, x: jax.Array) -> Operands:
    """Brings the operands of a site into the form that kernels take.

    Args:
      site: one for which `request_of` gave a request, and `why_not_operands` nothing against it.
      eqn: its equation.
      request: that request; with a multiple of its rows where x has a leading axis more than the equation says.
      q: the weight, without an adapter.
      x: the activation, floating (E, shape of the equation's operand...).

    Returns:
      The arrays; the rows of each of the E follow those of the one before.
    """
    flat, places, free = _axes(site, eqn, q, x.ndim - 1)
    pair = dict(site.pairs)
    batch = [a for _, a in _in_order(site, eqn)]
    lead = () if request.parts == 1 else (request.parts,)
    order = [*(a + 1 for a in batch), 0, *(a + 1 for a in free), *(pair[a] + 1 for a in flat)]
    x = x.transpose(order).reshape(request.parts, request.m, -1)
    x = _as_stored(x, q, places).astype(request.dtype)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, request.k - x.shape[-1])]).reshape(*lead, request.m, request.k)
    if q.form is not None:
        return Operands(x, None, None, None, levels_of(q), q.laid)
    return Operands(x, *rows_of(q, (*lead, request.n)), levels_of(q))


def rows_of(q: QTensor, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Stored codes, float32 scales and int32 zero points of a weight, their kept axes of a `shape` that they flatten to."""

    def rows(a: jax.Array) -> jax.Array:  # (kept-like..., last) -> (shape..., last)
        whole = jnp.broadcast_to(a, (*q.codes.shape[:-1], a.shape[-1]))
        return whole.reshape(*shape, a.shape[-1])

    scale = q.scales() if q.scale is not None else jnp.ones((1,) * q.codes.ndim, jnp.float32)
    if isinstance(q.spec, FloatSpec) and q.spec.element == "int8":
        scale = scale / 64
    zero_point = None if q.zero_point is None else rows(q.zero_point.astype(jnp.int32))
    return rows(q.codes), rows(scale), zero_point


def result_of(site: Site, eqn: Any, q: QTensor, y: jax.Array, times: int) -> jax.Array:
    """y (P, times * M, N) as the equation gives it, (times, batch..., free of the left operand..., free of the right one...)."""
    _, places, free = _axes(site, eqn, q, len(site.x_shape))
    aval = eqn.outvars[0].aval
    n_batch, n_free = len(places), len(free)
    batch = aval.shape[:n_batch]
    sizes = [site.x_shape[i] for i in free]
    rest = [n for i, n in enumerate(q.codes.shape[:-1]) if i not in places]
    y = y.astype(aval.dtype).reshape(*batch, times, *sizes, *rest)
    of_x, of_w = ([n_batch + 1 + i for i in range(n_free)], [n_batch + 1 + n_free + i for i in range(len(rest))])
    first, second = (of_x, of_w) if site.operand == 1 else (of_w, of_x)
    return y.transpose(n_batch, *range(n_batch), *first, *second)


def _no_product(site: Site, q: QTensor, dtype: Any, out_dtype: Any) -> str:
    """Why a site is no product of rows by rows; "" if it is."""
    if site.op != "dot_general":
        names = {"gather": "a lookup", "conv_general_dilated": "a convolution", "ragged_dot_general": "experts that share a list of rows"}
        return names.get(site.op, site.op)
    if site.sharded:
        return "it stands inside a shard_map"
    if site.custom_rule:
        return "it stands inside a custom derivative rule"
    if axes_of([site.view.dims[w] for w, _ in site.pairs]) != set(site.contracted):
        return "it is contracted over a part of its axes"
    for what in (dtype, out_dtype):
        if np.dtype(what).name not in ("float32", "bfloat16", "float16"):
            return f"{np.dtype(what).name} is no dtype of kernels"
    if q.adapter_left is not None:
        return "its low-rank part has no product of its own"
    return ""


def why_not_operands(site: Site, eqn: Any, q: QTensor) -> str:
    """Why a weight as it is met, a view of the parameter, cannot be brought into rows without moving its codes; "" if it can."""
    contract, _ = eqn.params["dimension_numbers"]
    flat = [a + q.ndim for a in q.axes]
    if sorted(flat) != sorted(contract[site.operand]):
        return "what is contracted is not what shares its scales"
    kept = [i for i in range(q.ndim) if i not in flat]
    places = [kept.index(w) for w, _ in _in_order(site, eqn)]
    if places != list(range(len(places))):
        return "its experts are not the first axis of the stored weight"
    each = [a for a in (q.input_scale, q.perm) if a is not None]
    if any(n != 1 for a in each for i, n in enumerate(a.shape[:-1]) if i not in places):
        return "parts of it that meet the same rows want them in another form each"
    if q.levels is not None and math.prod(q.levels.shape[:-1]) != 1:
        return "its parts have tables of their own"
    return ""


def _in_order(site: Site, eqn: Any) -> list[tuple[int, int]]:
    """(dim of the weight, dim of the activation) that run along together, in the order of the result."""
    _, batch = eqn.params["dimension_numbers"]
    return list(zip(batch[site.operand], batch[1 - site.operand], strict=True))


def _axes(site: Site, eqn: Any, q: QTensor, x_ndim: int) -> tuple[list[int], list[int], list[int]]:
    """The weight's contracted axes as they are flattened, which of its kept axes are parts, the activation's axes that are rows."""
    flat = [a + q.ndim for a in q.axes]
    kept = [i for i in range(q.ndim) if i not in flat]
    together = _in_order(site, eqn)
    own = {a for _, a in (*site.pairs, *together)}
    return flat, [kept.index(w) for w, _ in together], [i for i in range(x_ndim) if i not in own]


def _as_stored(x: jax.Array, q: QTensor, places: list[int]) -> jax.Array:
    """x (P, M, K) as the codes want it: divided, rotated, in stored order."""

    def of_part(a: jax.Array) -> jax.Array:  # (kept-like..., K) -> (P or 1, 1, K)
        lead = [n if i in places else 1 for i, n in enumerate(a.shape[:-1])]
        size = math.prod(lead)
        if size != 1:
            a = jnp.broadcast_to(a, (*(q.codes.shape[i] if i in places else 1 for i in range(a.ndim - 1)), a.shape[-1]))
        return a.reshape(-1, 1, a.shape[-1])

    if q.input_scale is not None:
        x = divide(x.astype(jnp.float32), of_part(q.input_scale))
    if q.rotation is not None:
        x = q.rotation.apply(x.astype(jnp.float32))
    if q.perm is not None:
        perm = of_part(q.perm)
        x = jnp.take_along_axis(x, jnp.broadcast_to(perm, (x.shape[0], 1, x.shape[-1])), axis=-1)
    return x


def levels_of(q: QTensor) -> jax.Array | None:
    """The table of a codebook, float32 (2^bits,); None for other formats."""
    if isinstance(q.spec, CodebookSpec):
        return jnp.float32(q.spec.levels)
    if isinstance(q.spec, FloatSpec) and q.spec.bits < 8:
        return decode_minifloat(jnp.arange(2**q.spec.bits), MINIFLOATS[q.spec.element])
    return None if q.levels is None else q.levels.reshape(-1).astype(jnp.float32)
