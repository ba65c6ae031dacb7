"""What a site asks of a kernel, and its operands as plain arrays: any `dot_general` as y (P, M, N) = x (P, M, K) w (P, N, K)^T.

P are the axes that both operands have (experts); M the other axes of the activation; N the other axes of the weight; K what is
contracted, in the order in which the weight flattens it, padded as its codes are. A `ragged_dot` is y (M, N) = x (M, K) with the part of
w (P, N, K) that a row belongs to.
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

_WINDOWS = 1 << 19  # values: windows of a convolution that are more cost more to copy out than the kernels gain (measured on a CPU)


class Operands(NamedTuple):
    """What a kernel is given. Without P where `request.parts` is 1.

    Attributes:
      x: float32 or bfloat16 (P, M, K), as `request.dtype` says; for a kernel that rotates rows itself float32 where they were divided.
      codes: of the weight, (P, N, K * bits / 8) bytes as `qjax.core.pack` lays them; int8 or uint8 (P, N, K) where they have 8 bits.
      scale: float32 (P, N, G), G = 1 where `request.weight.group_size` is None.
      zero_point: int32 of the shape of `scale`, or None where the kind is not "uint".
      levels: float32 (2^bits,), the table, or None where the kind is not "codebook".
      laid: the weight in the kernel's layout; then codes, scale and zero point are None.
      sizes: int32 (P,), how many rows of x (M, K) belong to each part, where `request.ragged`; else None.
      act_scale: float32 (P or 1, 1, 1), the scale of static activations, or None.
      act_zero_point: int32 of the shape of `act_scale`, or None.
    """

    x: jax.Array
    codes: jax.Array | None
    scale: jax.Array | None
    zero_point: jax.Array | None
    levels: jax.Array | None
    laid: Any = None
    sizes: jax.Array | None = None
    act_scale: jax.Array | None = None
    act_zero_point: jax.Array | None = None


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
    sizes = [size(dim) for dim in site.view.dims]
    if site.op == "conv_general_dilated":
        if 0 in site.out_shape:
            return "it is empty"
        if device.platform != "cpu":
            return f"a convolution, which is left to XLA on {device.platform}"
        n = _features(site)
        return _asked(q, device, weight, activation, math.prod(site.out_shape) // n, n, _both(dtype, out_dtype))
    ragged = site.op == "ragged_dot_general"
    if ragged and activation is not None and activation[0] != "int8":
        return f"experts that share a list of rows, with activations {q.act}, which are not one scale a row, found as they come"
    own, along = {x for _, x in (*site.pairs, *site.batch)}, {0} if ragged else {w for w, _ in site.batch}
    m = math.prod(n for i, n in enumerate(site.x_shape) if i not in own)
    parts = math.prod(sizes[w] for w in along)
    n = math.prod(sizes[w] for w in range(len(sizes)) if w not in along and w not in {w for w, _ in site.pairs})
    if 0 in (m, parts, n):
        return "it is empty"
    if site.sharded and (math.prod(site.out_shape) != m * n * (1 if ragged else parts) or _met(site) != math.prod(q.sizes)):
        return "each device has a part of it inside a shard_map"
    return _asked(q, device, weight, activation, m, n, _both(dtype, out_dtype), parts, ragged)


def _asked(
    q: QTensor, device: Device, weight: Weight, activation: Any, m: int, n: int, dtype: Any, parts: int = 1, ragged: bool = False
) -> Request:
    k, act = padded_size(math.prod(q.sizes), q.spec), None if activation is None else activation[0]
    rotation = None if q.rotation is None or q.perm is not None else math.prod(q.sizes)
    return Request(device, m, n, k, weight, dtype, act, parts, ragged, rotation)  # pyright: ignore[reportArgumentType]


def _both(dtype: Any, out_dtype: Any) -> str:
    return "bfloat16" if {np.dtype(dtype).name, np.dtype(out_dtype).name} == {"bfloat16"} else "float32"


def _met(site: Site) -> int:
    """How many values a row of the activation has."""
    return math.prod(site.x_shape[x] for _, x in site.pairs)


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
    """What becomes of activations in kernels, as `Request.activation` says, and ""; (None, why they have no word for it); None if nothing.

    >>> from qjax.core import dynamic, int4, int8, static
    >>> [activation_of(act)[0] for act in (dynamic(int8()), static(int8()), dynamic(int4()))]
    ['int8', 'int8 codes', 'int8 codes']
    """
    if act is None:
        return None
    if isinstance(act.spec, FloatSpec):
        if act.static or act.spec.granularity != PerToken():
            return None, f"activations {act} are not one scale a row, found as they come"
        fits = act.spec.element == "e4m3" and act.spec.scale_dtype not in ("e8m0", "e4m3")
        return ("fp8", "") if fits else (None, f"activations {act} are not FP8 with a float scale")
    if act.outliers is not None:
        return "int8 + outliers", ""
    by_rows = not act.static and act.per_token and act.spec.bits == 8 and act.spec.signed and act.spec.symmetric
    return ("int8" if by_rows else "int8 codes"), ""


def rows_alone(act: ActSpec | None) -> bool:
    """Whether what becomes of a row does not depend on the others: then rows of several products may stand in one."""
    return act is None or (act.outliers is None and (act.static or act.per_token))


def reach_of(act: ActSpec | None) -> float:
    """How many steps of int8 the largest magnitude of a row is: 127.5 reaches half a step beyond the codes, 127 leaves -128 out.

    >>> from qjax.core import dynamic, int8
    >>> reach_of(dynamic(int8())), reach_of(dynamic(int8(scale_rule="full")))
    (127.5, 127.0)
    """
    return 127.0 if act is not None and isinstance(act.spec, IntSpec) and act.spec.scale_rule == "full" else 127.5


def operands_of(
    site: Site, eqn: Any, request: Request, q: QTensor, x: jax.Array, sizes: jax.Array | None = None, rotate: bool = True
) -> Operands:
    """Brings the operands of a site into the form that kernels take.

    Args:
      site: one for which `request_of` gave a request, and `why_not_operands` nothing against it.
      eqn: its equation.
      request: that request; with a multiple of its rows where x has a leading axis more than the equation says.
      q: the weight, without an adapter.
      x: the activation, floating (E, shape of the equation's operand...).
      sizes: of a `ragged_dot`, int32 (P,), for which E is 1.
      rotate: whether rows are rotated here; else their values get the signs of the rotation alone, see `OnlineRotation.signed`.

    Returns:
      The arrays; the rows of each of the E follow those of the one before.
    """
    flat, places, free = _axes(site, eqn, q, x.ndim - 1)
    pair = dict(site.pairs)
    batch = [a for _, a in _in_order(site, eqn)]
    lead = () if request.parts == 1 else (request.parts,)
    order = [*(a + 1 for a in batch), 0, *(a + 1 for a in free), *(pair[a] + 1 for a in flat)]
    x = x.transpose(order).reshape(1 if request.ragged else request.parts, request.m, -1)
    x = _as_stored(x, q, places, rotate)
    # What was divided in float32 is rounded once, when it has been rotated.
    x = x if not rotate and x.dtype == jnp.float32 else x.astype(request.dtype)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, request.k - x.shape[-1])])
    x = x.reshape(*(() if request.ragged else lead), request.m, request.k)
    static = [None if a is None else of_part(a, q, places) for a in (q.act_scale, q.act_zero_point)]
    if q.form is not None:
        return Operands(x, None, None, None, levels_of(q), q.laid, sizes, *static)
    return Operands(x, *rows_of(q, (*lead, request.n)), levels_of(q), None, sizes, *static)


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


def check_result(kernel: Any, request: Request, y: Any) -> None:
    """Refuses what a kernel gave where it is not the product that was asked for.

    Raises:
      ValueError: naming the kernel, what came and what was wanted.
    """
    wanted = (request.m, request.n) if request.parts == 1 or request.ragged else (request.parts, request.m, request.n)
    if getattr(y, "shape", None) != wanted:
        raise ValueError(f"kernel {kernel.name!r} gave {getattr(y, 'shape', y)} for a product of {wanted}: `run` must give y {wanted}")


def result_of(site: Site, eqn: Any, q: QTensor, y: jax.Array, times: int) -> jax.Array:
    """y (P, times * M, N) as the equation gives it, (times, batch..., free of the left operand..., free of the right one...)."""
    aval = eqn.outvars[0].aval
    if site.op == "ragged_dot_general":
        return y.astype(aval.dtype).reshape(times, *aval.shape)
    _, places, free = _axes(site, eqn, q, len(site.x_shape))
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
    if site.op == "ragged_dot_general":
        why = _no_ragged(site)
        if why:
            return why
    elif site.op == "conv_general_dilated":
        why = why_not_windows(site, q)
        if why:
            return why
    elif site.op != "dot_general":
        return {"gather": "a lookup"}.get(site.op, site.op)
    if site.custom_rule:
        return "it stands inside a custom derivative rule"
    if site.op != "conv_general_dilated" and axes_of([site.view.dims[w] for w, _ in site.pairs]) != set(site.contracted):
        return "it is contracted over a part of its axes"
    for what in (dtype, out_dtype):
        if np.dtype(what).name not in ("float32", "bfloat16", "float16"):
            return f"{np.dtype(what).name} is no dtype of kernels"
    if q.adapter_left is not None:
        return "its low-rank part has no product of its own"
    return ""


def why_not_windows(site: Site, q: QTensor) -> str:
    """Why a convolution is no product of rows by rows, each row a window; "" if it is."""
    if site.groups != 1:
        return "a convolution in groups"
    copied = math.prod(site.out_shape) // _features(site) * math.prod(q.sizes)
    if copied > _WINDOWS and sum(n != 1 for n in q.sizes) > 1:
        return f"a convolution whose windows are {copied} values, which cost more to copy out than is gained: {_WINDOWS} at most"
    if q.act is not None and not q.act.static:
        return "a convolution, of which all windows of an example share a scale"
    return "a convolution inside a shard_map" if site.sharded else ""


def _features(site: Site) -> int:
    """The channels that a convolution makes."""
    return math.prod(size(dim) for dim in site.view.dims if not axes_of([dim]) <= set(site.contracted))


def _no_ragged(site: Site) -> str:
    """Why experts that share a list of rows are none that kernels take, x (rows, K) and w (experts, K, N) or (experts, N, K)."""
    dims = [axes_of([dim]) for dim in site.view.dims]
    plain = len(site.x_shape) == 2 and len(dims) == 3 and not site.batch and [x for _, x in site.pairs] == [1]
    if not plain or not dims[0] or not dims[0] <= set(site.stacked) or {w for w, _ in site.pairs} == {0}:
        return "experts that share a list of rows in another form than (rows, K) and (experts, K, N)"
    return ""


def why_not_operands(site: Site, eqn: Any, q: QTensor) -> str:
    """Why a weight as it is met, a view of the parameter, cannot be brought into rows without moving its codes; "" if it can."""
    if site.op == "conv_general_dilated":
        return "a convolution whose input is dilated"
    contract, _ = _numbers(eqn)
    flat = [a + q.ndim for a in q.axes]
    if site.op == "ragged_dot_general":
        dims = eqn.params["ragged_dot_dimension_numbers"]
        if tuple(dims.lhs_ragged_dimensions) != (0,) or tuple(dims.rhs_group_dimensions) != (0,):
            return "experts that share a list of rows in another form than (rows, K) and (experts, K, N)"
    if sorted(flat) != sorted(contract[site.operand]):
        return "what is contracted is not what shares its scales"
    kept = [i for i in range(q.ndim) if i not in flat]
    places = [kept.index(w) for w, _ in _in_order(site, eqn)]
    if places != list(range(len(places))):
        return "its experts are not the first axis of the stored weight"
    each = [a for a in (q.input_scale, q.perm, q.act_scale) if a is not None]
    if any(n != 1 for a in each for i, n in enumerate(a.shape[:-1]) if i not in places):
        return "parts of it that meet the same rows want them in another form each"
    if q.levels is not None and math.prod(q.levels.shape[:-1]) != 1:
        return "its parts have tables of their own"
    return ""


def _numbers(eqn: Any) -> Any:
    if eqn.primitive.name == "ragged_dot_general":
        return eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return eqn.params["dimension_numbers"]


def _in_order(site: Site, eqn: Any) -> list[tuple[int, int]]:
    """(dim of the weight, dim of the activation) that run along together, in the order of the result."""
    _, batch = _numbers(eqn)
    return list(zip(batch[site.operand], batch[1 - site.operand], strict=True))


def _axes(site: Site, eqn: Any, q: QTensor, x_ndim: int) -> tuple[list[int], list[int], list[int]]:
    """The weight's contracted axes as they are flattened, which of its kept axes are parts, the activation's axes that are rows."""
    flat = [a + q.ndim for a in q.axes]
    kept = [i for i in range(q.ndim) if i not in flat]
    together = _in_order(site, eqn)
    own = {a for _, a in (*site.pairs, *together)}
    return flat, [kept.index(w) for w, _ in together], [i for i in range(x_ndim) if i not in own]


def of_part(a: jax.Array, q: QTensor, places: list[int]) -> jax.Array:
    """What a weight has for each of its parts, (kept-like..., L), of those at `places`: (P or 1, 1, L)."""
    lead = [n if i in places else 1 for i, n in enumerate(a.shape[:-1])]
    if math.prod(lead) != 1:
        a = jnp.broadcast_to(a, (*(q.codes.shape[i] if i in places else 1 for i in range(a.ndim - 1)), a.shape[-1]))
    return a.reshape(-1, 1, a.shape[-1])


def _as_stored(x: jax.Array, q: QTensor, places: list[int], rotate: bool) -> jax.Array:
    """x (P, M, K) as the codes want it: divided, rotated or with the signs for that, in stored order."""
    if q.input_scale is not None:
        x = divide(x.astype(jnp.float32), of_part(q.input_scale, q, places))
    if q.rotation is not None:
        x = q.rotation.apply(x.astype(jnp.float32)) if rotate else q.rotation.signed(x)
    if q.perm is not None:
        perm = of_part(q.perm, q, places)
        x = jnp.take_along_axis(x, jnp.broadcast_to(perm, (x.shape[0], 1, x.shape[-1])), axis=-1)
    return x


def levels_of(q: QTensor) -> jax.Array | None:
    """The table of a codebook, float32 (2^bits,); None for other formats."""
    if isinstance(q.spec, CodebookSpec):
        return jnp.float32(q.spec.levels)
    if isinstance(q.spec, FloatSpec) and q.spec.bits < 8:
        return decode_minifloat(jnp.arange(2**q.spec.bits), MINIFLOATS[q.spec.element])
    return None if q.levels is None else q.levels.reshape(-1).astype(jnp.float32)
