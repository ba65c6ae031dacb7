"""QTensor, a packed array that is a pytree, and how a float array becomes one."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.core.activations import ActSpec
from qjax.core.adapter import Adapter, adapter_matrix, flattened, unflattened
from qjax.core.hadamard import OnlineRotation
from qjax.core.layout import canonicalize, logical_blocks, padded_size, stacked_positions, uncanonicalize
from qjax.core.learned import Learned, learn_canonical, learned_values
from qjax.core.packing import pack, unpack
from qjax.core.reductions import divide
from qjax.core.rounding import (
    Ranges,
    block_decode,
    block_encode,
    block_params,
    check_shape,
    checked,
    padding,
    round_cast,
    tensor_scale,
)
from qjax.core.scales import read_scale, store_scale
from qjax.core.specs import BlockSpec, CastSpec, FloatSpec, IntSpec, LearnedSpec, Spec, signed_codes

ARRAYS = (
    "codes", "scale", "zero_point", "perm", "act_scale", "act_zero_point", "input_scale", "nested_scale", "nested_offset", "levels",
    "adapter_left", "adapter_right",
)  # fmt: skip


class Form(Protocol):
    """A layout of codes that some kernel reads; hashable."""

    def plain(self, q: "QTensor") -> "QTensor":
        """Brings the codes back."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*ARRAYS, "laid"],
    meta_fields=["spec", "axes", "sizes", "dtype", "act", "rotation", "form"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized array. Built by `quantize` or `qjax.core.assemble`, which validate; this constructor checks nothing.

    Canonical layout: the kept axes in logical order, then one last axis with the contracted axes flattened (K values,
    Kpad with padding). Leading axes may be added or removed by `vmap` and `scan`, so only the sizes of the contracted
    axes are static and axes are counted from the end.

    Invariants:
      codes: uint8 (kept..., ceil(Kpad * bits / 8)), see `pack`; for 8 bits int8 or uint8 (kept..., Kpad); for a cast
        the array itself (kept..., K).
      scale: as many axes as `codes`: every kept axis full, 1, or divided by the block; the last one counts blocks. Of
        `spec.scale_dtype`; or uint8, the bytes of E8M0 and E4M3 scales and the codes of double quantization. See `scales()`. None
        for a cast.
      zero_point: int8 or uint8 like the codes, or `spec.zero_dtype`; the shape of `scale`; None when symmetric.
      perm: int32 (stacked axes full, others 1, K) or None: stored position j holds the flattened index perm[j].
      spec: what it was quantized to.
      axes: negative logical positions of the contracted axes, in the order in which they are flattened.
      sizes: their sizes, in that order.
      dtype: the logical dtype; `w = decode(codes)` in float32 and one cast to it.
      act: what becomes of the activations that it meets; None leaves them as they are.
      act_scale: float32 (stacked axes full, others 1, 1), the scale of static activations; else None.
      act_zero_point: int32 of the shape of `act_scale`, or None.
      input_scale: float32 (stacked axes full, others 1, K), positive, or None: s, by which the product divides its input. The
        codes stand for s w, and `dequantize` divides, so that it gives w. In the logical order of the flattened contracted
        values, whatever `perm` says.
      nested_scale: float32 (stacked axes full, others 1, blocks), what the codes of double quantization multiply, see `nest`;
        or (stacked axes full, others 1, 1), g, what E4M3 scales are divided by; else None.
      nested_offset: float32 (stacked axes full, others 1, 1), what double quantization adds; else None.
      rotation: by what the product rotates its input x, after it is divided: x -> R^T x along the flattened contracted values, or
        None. The codes stand for R^T w (or R^T s w), and `dequantize` rotates back, so that it gives w.
      levels: `spec.level_dtype` (kept-like..., 2^bits), ascending: the table of a learned spec, for each row or for all; or None.
      adapter_left, adapter_right: floating (kept..., r) and (kept-like..., K r), or None: `adapter` takes them apart. They belong to what
        the codes stand for, in front of `input_scale`, in the logical order of the contracted values.
    """

    codes: Any
    scale: Any
    zero_point: Any
    perm: Any
    spec: Spec
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: np.dtype
    act: ActSpec | None = None
    act_scale: Any = None
    act_zero_point: Any = None
    input_scale: Any = None
    nested_scale: Any = None
    nested_offset: Any = None
    rotation: OnlineRotation | None = None
    levels: Any = None
    adapter_left: Any = None
    adapter_right: Any = None
    laid: Any = None
    form: Form | None = None

    def plain(self) -> "QTensor":
        """The same with its codes as `qjax.core.pack` lays them, whatever layout they have."""
        return self if self.form is None else self.form.plain(self)

    @property
    def adapter(self) -> Adapter | None:
        """The low-rank float part L R of the weight, see `qjax.core.Adapter`; None if there is none."""
        if self.adapter_left is None:
            return None
        return unflattened(self.adapter_left, self.adapter_right)

    def with_adapter(self, adapter: Adapter | None) -> "QTensor":
        """The same with another low-rank part: `w ~= decode(codes) + L R`.

        Args:
          adapter: left (kept..., r), right (kept-like..., r, K); None takes it away.

        Returns:
          A `QTensor`.

        Raises:
          ValueError: shapes that do not fit.

        >>> q = quantize(jnp.zeros((4, 2)), IntSpec(4), axes=(0,))
        >>> q.with_adapter(Adapter(jnp.ones((2, 1)), jnp.ones((1, 1, 4)))).dequantize().tolist()[0]
        [1.0, 1.0]
        """
        left, right = flattened(adapter, self.codes.shape[:-1], math.prod(self.sizes))
        return dataclasses.replace(self, adapter_left=left, adapter_right=right)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return _logical_shape(self.codes.shape[:-1], self.axes, self.sizes)

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return len(self.codes.shape) - 1 + len(self.axes)

    @property
    def size(self) -> int:
        """The number of logical elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that all the arrays inside take, padding included; of arrays that several weights are laid out in, its own share."""
        own, of_all = getattr(self.form, "share", (1, 1))
        bytes_of = lambda tree: sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))  # noqa: E731
        return bytes_of(self) - bytes_of(self.laid) + bytes_of(self.laid) * own // of_all

    @property
    def bits_per_weight(self) -> float:
        """`nbytes * 8 / size`: scales, zero points, permutation and padding included."""
        return self.nbytes * 8 / self.size if self.size else 0.0

    def codes_unpacked(self) -> jax.Array:
        """The codes (kept..., K) without padding: int8 or uint8, for a cast the 16-bit floats.

        >>> quantize(jnp.float32([[7.5], [-7.5]]), IntSpec(4), axes=(0,)).codes_unpacked().tolist()
        [[7, -8]]
        """
        return _unpack(self.plain())[..., : math.prod(self.sizes)]

    def codes_padded(self) -> jax.Array:
        """The codes (kept..., Kpad), in stored order: int8 or uint8, for a cast the 16-bit floats."""
        return _unpack(self.plain())

    def scales(self) -> jax.Array:
        """The scales as float32 numbers, however they are stored; the shape of `scale`.

        >>> from qjax.core.named_specs import mxfp4
        >>> quantize(jnp.full((32, 1), 8.0), mxfp4(), axes=(0,)).scales().tolist()
        [[2.0]]
        """
        if self.scale is None or isinstance(self.spec, CastSpec):
            raise TypeError(f"{self.spec} has no scales: its codes are the numbers, or name them")
        if self.form is not None:
            return self.plain().scales()
        if isinstance(self.spec, LearnedSpec):
            return self.scale.astype(jnp.float32)
        return read_scale(self.scale, self.nested_scale, self.nested_offset, self.spec)

    def dequantize(self) -> jax.Array:
        """The array of `shape` and `dtype` that the codes stand for.

        `(code - zero_point) * scale`, `levels[code] * scale` or `levels[code]`, rotated back, with L R added and divided by `input_scale`
        if there are such, in float32, in this order, then one cast.

        >>> quantize(jnp.float32([[7.5], [-7.5]]), IntSpec(4), axes=(0,)).dequantize().tolist()
        [[7.0], [-8.0]]
        """
        return _dequantize(self)

    def _packed(self, *_: Any) -> Any:
        remedy = "run the function as qjax.quantized(fn)(params, ...), or .dequantize() it"
        raise TypeError(f"{self!r} is packed and has no arithmetic: {remedy}")

    __matmul__ = __rmatmul__ = __add__ = __radd__ = __mul__ = __rmul__ = __getitem__ = _packed

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.dequantize(), dtype=dtype)

    def __repr__(self) -> str:
        if not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in (self.codes, *jax.tree.leaves(self))):
            return f"QTensor({self.spec}, holding {', '.join(type(a).__name__ for a in jax.tree.leaves(self))})"
        shape = ",".join(map(str, self.shape))
        cost = f"{self.nbytes:,} bytes, {self.bits_per_weight:.3g} bits/weight"
        act = "" if self.act is None else f", activations {self.act}"
        rotated = "" if self.rotation is None else f", input by {self.rotation}"
        laid = "" if self.form is None else f", laid out for {self.form}"
        return f"QTensor({self.spec}, {self.dtype}[{shape}], {cost}{act}{rotated}{laid})"


def _logical_shape(kept: Sequence[int], axes: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    ndim = len(kept) + len(axes)
    contracted = {axis + ndim: size for axis, size in zip(axes, sizes, strict=True)}
    rest = iter(kept)
    return tuple(contracted[i] if i in contracted else next(rest) for i in range(ndim))


def quantize(
    w: Any, spec: Spec, axes: Sequence[int], stacked: Sequence[int] = (), *, name: str = "w", ranges: Ranges = block_params
) -> QTensor:
    """Round `w` to the nearest code, with scales from the extreme values of each block.

    Integers: see `affine_params` and `affine_encode`. Tables: see `codebook_params` and `codebook_encode`. Floats: see `float_scale`
    and `float_encode`. Codes are computed with scales as they are before double quantization.

    Args:
      w: floating array of any shape.
      spec: what to quantize to.
      axes: the axes that the operation contracts, in the order in which they are flattened: (-2,) for a kernel (K, N)
        or stacked kernels (L, K, N), (-3, -2) for a projection (heads, head_dim, model), (-1,) for an embedding (V, D).
      stacked: kept axes that hold independent arrays (layers of a scan, experts); per tensor they keep their own scale.
      name: what an error calls the array.
      ranges: another way to choose scales and zero points: a pure function of (blocks (..., group), spec), and where the spec has
        a scale of the whole tensor of that, too; where it has scales from means and the last block is padded, `real=` says which values
        of a block count, bool (G, group).

    Returns:
      A `QTensor` with the shape and dtype of `w`.

    Raises:
      TypeError: `w` is not floating.
      ValueError: `w` is empty, or holds NaN or infinity (checked on concrete arrays only, as is a scale that overflows
        `scale_dtype`); an axis out of range; a group that does not divide the contracted values.

    >>> from qjax.core.factories import int4
    >>> quantize(jnp.ones((256, 16), jnp.bfloat16), int4(group_size=128), axes=(0,))
    QTensor(int4(group_size=128), bfloat16[256,16], 2,176 bytes, 4.25 bits/weight)
    """
    w, axes, stacked = checked(w, spec, axes, stacked, name)
    q = quantize_moved(w, spec, axes, stacked, ranges)
    check_overflow(q, name)
    return q


def quantized_shapes(
    w: jax.ShapeDtypeStruct, spec: Spec, axes: Sequence[int], stacked: Sequence[int] = (), *, name: str = "w", ranges: Ranges = block_params
) -> QTensor:
    """What `quantize` gives, from a shape alone; weights of one shape are traced once.

    >>> from qjax.core.factories import int8
    >>> quantized_shapes(jax.ShapeDtypeStruct((16, 4), jnp.float32), int8(), (0,)).codes
    ShapeDtypeStruct(shape=(4, 16), dtype=int8)
    """
    axes, stacked = check_shape(w, spec, axes, stacked, name)
    return quantize_unchecked.eval_shape(w, spec, axes, stacked, ranges)  # pyright: ignore[reportFunctionMemberAccess]


def check_overflow(q: QTensor, name: str) -> None:
    """Refuses infinite scales or levels, which their dtype could not hold. Looks at concrete arrays only."""
    argument, array = ("dtype", q.codes) if q.scale is None else ("scale_dtype", q.scale)
    if q.levels is not None and q.scale is None:
        argument, array = "level_dtype", q.levels
    if array.dtype in (jnp.float32, jnp.uint8) or isinstance(array, Tracer):
        return
    with jax.ensure_compile_time_eval():
        if bool(jnp.any(jnp.isinf(array))):
            raise ValueError(f"`{argument}`={array.dtype.name!r} cannot hold the range of `{name}`; take a wider one, such as 'float32'")


@functools.partial(jax.jit, static_argnames=("spec", "axes", "stacked", "ranges"), inline=True)
def quantize_unchecked(
    w: jax.Array, spec: Spec, axes: tuple[int, ...], stacked: tuple[int, ...] = (), ranges: Ranges = block_params
) -> QTensor:
    """`quantize` without a look at the numbers, the same inside and outside of `jit`: NaN comes back as NaN, where the format has it.

    >>> quantize_unchecked(jnp.float32([[1.0, jnp.nan]]), IntSpec(4), (-2,)).dequantize().tolist()
    [[0.9333333969116211, nan]]
    """
    sizes, dtype = tuple(w.shape[a] for a in axes), np.dtype(w.dtype)
    if isinstance(spec, CastSpec):
        return QTensor(round_cast(canonicalize(w, axes), spec), None, None, None, spec, axes, sizes, dtype)
    if isinstance(spec, LearnedSpec):
        found = learn_canonical(canonicalize(w, axes), spec, stacked_positions(axes, stacked, w.ndim))
        scale = None if found.scale is None else found.scale.astype(spec.scale_dtype)
        levels = found.levels.astype(spec.level_dtype)
        return QTensor(pack_codes(found.codes, spec), scale, None, None, spec, axes, sizes, dtype, levels=levels)
    blocked, to_canonical, _ = logical_blocks(w, spec, axes, stacked)
    positions = stacked_positions(axes, stacked, w.ndim)
    of_tensor = tensor_scale(blocked, spec, positions)
    scale, zero_point = ranges(blocked, spec, *of_tensor, **padding(math.prod(sizes), spec))
    codes = block_encode(blocked, scale, zero_point, spec)
    scale, nested_scale, nested_offset = store_scale(scale[..., 0], spec, positions, *(g[..., 0] for g in of_tensor))
    if zero_point is not None:
        zero_point = zero_point[..., 0].astype(zero_dtype(spec))
    return QTensor(
        pack_codes(to_canonical(codes), spec), scale, zero_point, None, spec, axes, sizes, dtype,
        nested_scale=nested_scale, nested_offset=nested_offset,
    )  # fmt: skip


def quantize_moved(
    w: jax.Array, spec: Spec, axes: tuple[int, ...], stacked: tuple[int, ...] = (), ranges: Ranges = block_params
) -> QTensor:
    """`quantize_unchecked` to the bit, of large arrays of numbers in two programs: first (kept..., K) lies in memory, then it is rounded.

    XLA for CPUs fuses a transposition into all that reads it, and then searches and rounds strided values at a half of the speed or less.

    >>> quantize_moved(jnp.ones((512, 256)), IntSpec(4), (-2,)).shape
    (512, 256)
    """
    if isinstance(w, Tracer) or w.size < _WORTH_MOVING or axes == (-1,):
        return quantize_unchecked(w, spec, axes, stacked, ranges)
    rows = _moved(w, axes)
    own = tuple(position - rows.ndim for position in stacked_positions(axes, stacked, w.ndim))
    q = quantize_unchecked(rows, spec, (-1,), own, ranges)
    return dataclasses.replace(q, axes=axes, sizes=tuple(w.shape[a] for a in axes))


_WORTH_MOVING = 1 << 16  # numbers; below, a second program costs more than it saves
_moved = jax.jit(canonicalize, static_argnums=1)


def with_plain_scales(q: QTensor) -> QTensor:
    """The same numbers with float32 scales in place of nested ones, so that any part of them stands for itself.

    >>> from qjax.core.named_specs import nf4
    >>> with_plain_scales(quantize(jnp.ones((64, 1)), nf4(double_quant=True), axes=(0,))).spec == nf4()
    True
    """
    if q.nested_scale is None:
        return q
    spec = dataclasses.replace(q.spec, **{"scale_dtype": "float32"} if isinstance(q.spec, FloatSpec) else {"double_quant": False})
    return dataclasses.replace(q, scale=q.scales(), nested_scale=None, nested_offset=None, spec=spec)


def _code_dtype(spec: Spec):
    return jnp.int8 if signed_codes(spec) else jnp.uint8


def zero_dtype(spec: Spec):
    """The dtype in which zero points are stored."""
    return spec.zero_dtype if isinstance(spec, IntSpec) and spec.float_zero else _code_dtype(spec)


def pack_codes(codes: jax.Array, spec: Spec) -> jax.Array:
    """Codes (kept..., Kpad) as `QTensor` stores them."""
    return codes.astype(_code_dtype(spec)) if spec.bits == 8 else pack(codes, spec.bits)


def _unpack(q: QTensor) -> jax.Array:
    if q.spec.bits >= 8 or isinstance(q.spec, CastSpec):
        return jnp.asarray(q.codes)
    return unpack(q.codes, q.spec.bits, padded_size(math.prod(q.sizes), q.spec), signed_codes(q.spec))


def _decode(codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, spec: BlockSpec) -> jax.Array:
    """Codes (kept..., Kpad) and scales (kept-like..., G) to float32 (kept..., Kpad)."""
    blocked = [i for i, (n, count) in enumerate(zip(codes.shape, scale.shape, strict=True)) if count not in (1, n)]
    # One axis at a time, the last first: so an axis that is cut over explicit axes of a mesh stays cut.
    split = codes
    for i in reversed(blocked):
        split = split.reshape(*split.shape[:i], scale.shape[i], -1, *split.shape[i + 1 :])
    behind = [i + 1 + turn for turn, i in enumerate(blocked)]
    scale, zero_point = jax.tree.map(lambda a: jnp.expand_dims(a, behind), (scale, zero_point))
    out = block_decode(split, scale, zero_point, spec)
    for i in blocked:
        out = out.reshape(*out.shape[:i], codes.shape[i], *out.shape[i + 2 :])
    return out


@functools.partial(jax.jit, inline=True)
def _dequantize(q: QTensor) -> jax.Array:
    q = q.plain()
    if isinstance(q.spec, CastSpec):
        w = _unpack(q).astype(jnp.float32)
    elif isinstance(q.spec, LearnedSpec):
        w = learned_values(Learned(_unpack(q), q.scale, q.levels))[..., : math.prod(q.sizes)]
    else:
        w = _decode(_unpack(q), q.scales(), q.zero_point, q.spec)[..., : math.prod(q.sizes)]
    if q.perm is not None:
        w = jnp.take_along_axis(w, jnp.argsort(q.perm, axis=-1), axis=-1)
    if q.rotation is not None:
        w = q.rotation.undo(w)
    if q.adapter is not None:
        w = w + adapter_matrix(q.adapter)
    if q.input_scale is not None:
        w = divide(w, q.input_scale)
    return uncanonicalize(w, q.axes, q.sizes).astype(q.dtype)
