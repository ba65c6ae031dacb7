"""How the activations of a site are quantized: ranges taken as they come, or known beforehand."""

import dataclasses
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from qjax.core.affine import affine_decode, affine_encode, affine_params
from qjax.core.floating import float_decode, float_encode
from qjax.core.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qjax.core.layout import padded_size
from qjax.core.rounding import block_params, tensor_scale
from qjax.core.specs import FloatSpec, IntSpec

FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}  # whose bits our codes are
_PER = {"token": PerToken(), "tensor": PerTensor()}


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Columns of an activation that are multiplied in 16 bit, because a few of their values would coarsen all others.

    Attributes:
      threshold: a column with any |x| at or above it is an outlier.
      capacity: how many of them one product takes, those with the largest values first; the others stay integers. None: not
        known before calibration.
    """

    threshold: float
    capacity: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"`threshold` must be a positive number such as 6.0, got {self.threshold}")
        if self.capacity is not None and (isinstance(self.capacity, bool) or int(self.capacity) != self.capacity or self.capacity < 1):
            raise ValueError(f"`capacity` must be a number of columns, at least 1, or None, got {self.capacity!r}")

    def __str__(self) -> str:
        return f"16 bit from {self.threshold:g}, {'calibrated' if self.capacity is None else f'at most {self.capacity}'} columns"


class RangeFinder(Protocol):
    """What finds a static range: see `qjax.calibration`, whose observers do."""

    def range(self, state: Any, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class ActSpec:
    """What the activations of a site become. Built by `dynamic` and `static`.

    Attributes:
      spec: integers or floats, per token or per tensor; dynamic floats also in groups of a row.
      static: whether the range is known beforehand.
      observer: what finds a static range (see `qjax.calibration`); None takes the extreme values, or there is nothing to find.
      outliers: columns that are left out of the integers (see `qjax.llm_int8`), or None.
    """

    spec: IntSpec | FloatSpec
    static: bool = False
    observer: RangeFinder | None = None
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        _check_spec(self.spec, self.static)
        in_groups = self.is_float and isinstance(self.spec.granularity, PerGroup)
        if (self.spec.granularity not in _PER.values() and not in_groups) or (self.static and self.spec.granularity != PerTensor()):
            raise ValueError(f"`spec` of activations must be per {'tensor' if self.static else 'token or tensor'}, got {self.spec}")
        if self.observer is not None and (not hasattr(self.observer, "range") or isinstance(self.observer, type)):
            raise TypeError(f"`observer` must find ranges, such as qjax.minmax() or qjax.entropy(), got {self.observer!r}")
        if self.outliers is not None and (not self.per_token or self.is_float):
            given = "static" if self.static else self.spec
            raise ValueError(f"`outliers` need a scale for every row, as in qjax.dynamic(qjax.int8()), got {given}")

    @property
    def per_token(self) -> bool:
        """Whether every row has a scale of its own, or several."""
        return self.spec.granularity != PerTensor()

    @property
    def is_float(self) -> bool:
        """Whether its codes are small floats."""
        return isinstance(self.spec, FloatSpec)

    def __str__(self) -> str:
        if not self.static:
            return f"dynamic({self.spec})" if self.outliers is None else f"dynamic({self.spec}, {self.outliers})"
        return f"static({self.spec})" if self.observer is None else f"static({self.spec}, {self.observer})"


def dynamic(spec: IntSpec | FloatSpec, per: Literal["token", "tensor"] = "token") -> ActSpec:
    """Quantizes activations with ranges that are found anew in every call.

    Args:
      spec: integers of 2 to 8 bits without a granularity of their own, such as `qjax.int8()`; or floats, such as `qjax.fp8_e4m3()`,
        which may have groups along the contracted axes: `qjax.fp8_e4m3(group_size=128)`, `qjax.mxfp4()`, `qjax.nvfp4()`. The last
        group of a row is padded with zeros. NVFP4's scale of the whole tensor is one for every row here.
      per: "token": a scale for every row that meets the weight (for a convolution every example); "tensor": one for all.

    Returns:
      An `ActSpec` for `qjax.Rule(activation=...)`.

    Raises:
      TypeError: `spec` is not of integers or floats.
      ValueError: `per` is neither; integers with groups, anything with blocks; ternary.

    Example:
      >>> import qjax
      >>> str(dynamic(qjax.int8()))
      'dynamic(int8(per="token"))'
    """
    if per not in _PER:
        raise ValueError(f"`per` must be 'token' or 'tensor', got {per!r}")
    return ActSpec(_whole(spec, per))


def static(spec: IntSpec | FloatSpec, observer: RangeFinder | None = None) -> ActSpec:
    """Quantizes activations with one range for all of a site's data, found by calibration and stored with the weight.

    Args:
      spec: integers of 2 to 8 bits, such as `qjax.int8()`, or `qjax.uint8()`, asymmetric, for what comes behind a ReLU; or FP8 with a
        float scale: `qjax.fp8_e4m3()`, `qjax.fp8_e5m2()`. What lies beyond the range becomes the largest number.
      observer: how the range is found; None takes the extreme values, which is right for FP8, whose small numbers stay as exact however
        large the range is.

    Returns:
      An `ActSpec` for `qjax.Rule(activation=...)`.

    Raises:
      TypeError, ValueError: as `dynamic`; floats that are no FP8 with a float scale.

    Example:
      >>> import qjax
      >>> str(static(qjax.uint8())), str(static(qjax.fp8_e4m3()))
      ('static(uint8(per="tensor"))', 'static(fp8_e4m3(per="tensor"))')

    Source: of FP8, Micikevicius et al. 2022 (arXiv 2209.05433), section 3: one scale a tensor brings the largest magnitude to the
    largest number.
    """
    return ActSpec(_whole(spec, "tensor", True), True, observer)


def _check_spec(spec: Any, static: bool) -> None:
    if not isinstance(spec, IntSpec | FloatSpec):
        raise TypeError(f"`spec` of activations must be integers such as qjax.int8() or floats such as qjax.fp8_e4m3(), got {spec!r}")
    if static and isinstance(spec, FloatSpec) and (spec.element not in FLOAT8 or spec.scale_dtype in ("e8m0", "e4m3")):
        raise TypeError(f"`spec` of static activations must be integers such as qjax.int8(), or FP8 with a float scale such as "
                        f"qjax.fp8_e4m3(), got {spec!r}: take qjax.dynamic")  # fmt: skip
    if isinstance(spec, IntSpec) and spec.float_zero:
        raise ValueError(f'`spec` of activations must have integer zero points (zero_dtype="int"), got {spec}')
    if spec.by_mean:
        raise ValueError(f"`spec` of activations must not be ternary, whose scales come from a mean, got {spec}: take qjax.int8()")


def _whole(spec: Any, per: str, static: bool = False) -> Any:
    _check_spec(spec, static)
    if isinstance(spec, FloatSpec) and isinstance(spec.granularity, PerGroup) and per == "token":
        return dataclasses.replace(spec, pad=True)
    if spec.granularity not in (PerChannel(), *_PER.values()):
        raise ValueError(f"`spec` of activations must have no groups, got {spec}: write qjax.int8() or qjax.fp8_e4m3()")
    return dataclasses.replace(spec, granularity=_PER[per])


def encode_activation(
    x: jax.Array, act: ActSpec, axes: tuple[int, ...], scale: jax.Array | None = None, zero_point: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Rounds activations: `clip(round(x / scale) + zero_point, qmin, qmax)`; floats as `float_encode`.

    Args:
      x: floating, any shape.
      act: what it becomes.
      axes: the axes that share a scale: the contracted ones per token, all of them per tensor. Not read where `scale` is given.
      scale: float32, broadcasts against `x`: a static scale, or that of more values than these; None finds it.
      zero_point: the static zero point, or None.

    Returns:
      (codes int8, scale float32 and zero point int32 or None, both with as many axes as `x`). Unsigned codes are moved
      down by half their range, and the zero point with them, so that all codes are int8. Codes of FP8 are of jax's dtype for it; where
      groups of a row have scales, `axes` is the last axis, their number is that of the scale's last axis, and their length divides.

    Example:
      >>> import qjax
      >>> codes, scale, _ = encode_activation(jnp.float32([[1.0, -2.0]]), dynamic(qjax.int8(scale_rule="full")), (1,))
      >>> codes.tolist(), round(scale.item() * 127, 4)
      ([[64, -127]], 2.0)
    """
    x = x.astype(jnp.float32)
    if isinstance(act.spec, FloatSpec):
        return _encode_float8(x, act.spec, axes, scale)
    if scale is None:
        moved = jnp.moveaxis(x, axes, range(-len(axes), 0))
        scale, zero_point = affine_params(moved.reshape(*moved.shape[: x.ndim - len(axes)], -1), act.spec)
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
        scale = scale.reshape(shape)
        zero_point = None if zero_point is None else zero_point.reshape(shape)
    codes = affine_encode(x, scale, zero_point, act.spec)
    if not act.spec.signed:
        half = 2 ** (act.spec.bits - 1)
        codes, zero_point = codes - half, (0 if zero_point is None else zero_point) - half
        zero_point = jnp.broadcast_to(jnp.asarray(zero_point, jnp.int32), scale.shape)
    return codes.astype(jnp.int8), scale, zero_point


def round_activation(
    x: jax.Array, act: ActSpec, axes: tuple[int, ...], scale: jax.Array | None = None, zero_point: jax.Array | None = None
) -> jax.Array:
    """What the codes of `encode_activation` stand for: the same arguments, the shape and dtype of `x`.

    Example:
      >>> import qjax
      >>> round_activation(jnp.float32([[1.0, -2.0]]), dynamic(qjax.int2(scale_rule="full")), (1,)).tolist()
      [[0.0, -2.0]]
    """
    if isinstance(act.spec, FloatSpec):
        return _round_float(x.astype(jnp.float32), act.spec, axes, scale).astype(x.dtype)
    return affine_decode(*encode_activation(x, act, axes, scale, zero_point)).astype(x.dtype)


def _encode_float8(
    x: jax.Array, spec: FloatSpec, axes: tuple[int, ...], scale: jax.Array | None
) -> tuple[jax.Array, jax.Array, None]:
    if isinstance(spec.granularity, PerGroup):
        blocked = x.reshape(*x.shape[:-1], -1, spec.granularity.size)
        scale = _row_scale(blocked, spec) if scale is None else scale[..., None]
        codes, scale = float_encode(blocked, scale, spec).reshape(x.shape), scale[..., 0]
    else:
        if scale is None:
            moved = jnp.moveaxis(x, axes, range(-len(axes), 0))
            scale = _row_scale(moved.reshape(*moved.shape[: x.ndim - len(axes)], 1, -1), spec)
            scale = scale.reshape([1 if i in axes else n for i, n in enumerate(x.shape)])
        codes = float_encode(x, scale, spec)
    return jax.lax.bitcast_convert_type(codes.astype(jnp.uint8), FLOAT8[spec.element]), scale, None


def _round_float(x: jax.Array, spec: FloatSpec, axes: tuple[int, ...], scale: jax.Array | None) -> jax.Array:
    """Decoded at once: there is a float product behind it."""
    if scale is not None:
        return float_decode(float_encode(x, scale, spec), scale, spec)
    last = range(-len(axes), 0)
    moved = jnp.moveaxis(x, axes, last)
    rows = moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)
    k = rows.shape[-1]
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else k
    padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, padded_size(k, spec) - k)])
    blocked = padded.reshape(*rows.shape[:-1], -1, size)
    scale = _row_scale(blocked, spec)
    rounded = float_decode(float_encode(blocked, scale, spec), scale, spec).reshape(padded.shape)[..., :k]
    return jnp.moveaxis(rounded.reshape(moved.shape), last, axes)


def _row_scale(blocked: jax.Array, spec: FloatSpec) -> jax.Array:
    """The scales (rows..., G, 1) of blocks (rows..., G, group): a row is a tensor of its own, and knows nothing of its neighbours."""
    return block_params(blocked, spec, *tensor_scale(blocked, spec, range(blocked.ndim - 2)))[0]


def round_inliers(x: jax.Array, act: ActSpec, axes: tuple[int, ...], rows: tuple[int, ...]) -> jax.Array:
    """`round_activation` of all columns but the outliers, which stay as they are: what a product of both parts stands for.

    Args:
      x: floating, any shape.
      act: dynamic, per token, with `outliers`; their capacity is not looked at.
      axes: the axes that share a scale: the contracted ones.
      rows: the axes over which a column runs.

    Returns:
      An array of the shape and dtype of `x`.

    Example:
      >>> import qjax
      >>> act = ActSpec(dynamic(qjax.int2(scale_rule="full")).spec, outliers=Outliers(6.0))
      >>> round_inliers(jnp.float32([[1.0, 0.4, 9.5]]), act, (1,), (0,)).tolist()
      [[1.0, 0.0, 9.5]]
    """
    if act.outliers is None:
        return round_activation(x, act, axes)
    large = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=rows, keepdims=True, initial=0.0) >= act.outliers.threshold
    return jnp.where(large, x, round_activation(jnp.where(large, jnp.zeros_like(x), x), act, axes))
