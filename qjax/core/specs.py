"""What a number is quantized to: frozen, hashable, validated when built. A spec holds no array and computes nothing."""

import dataclasses
import math
import numbers
from typing import Literal, TypeGuard, get_args

import numpy as np

from qjax.core.elements import MINIFLOATS
from qjax.core.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor

ScaleRule = Literal["half", "full", "absmean", "twn"]
TableRule = Literal["absmax", "absmean"]
ExponentRule = Literal["floor", "round"]
ElementName = Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int8"]
ScaleFormat = Literal["float32", "float16", "bfloat16", "e8m0", "e4m3"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]
ZeroDtype = Literal["int", "float32", "float16", "bfloat16"]


def check_choice(argument: str, value: object, choices: tuple) -> None:
    """Refuses a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flag(argument: str, value: object) -> None:
    """Refuses a value that is neither True nor False: "no" and 0 would be read as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}` must be True or False, got {value!r}")


def check_count(argument: str, value: object, least: int) -> None:
    """Refuses a value that is no whole number, or less than the least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{argument}` must be an int of at least {least}, got {value!r}")


def as_count(argument: str, value: object, least: int) -> int:
    """The argument as an int, if it is a whole number, one of NumPy's among them; what `check_count` refuses is refused.

    >>> as_count("steps", np.int64(3), 0)
    3
    """
    value = int(value) if isinstance(value, np.integer) else value
    check_count(argument, value, least)
    return value  # pyright: ignore[reportReturnType]  # by `check_count`


def check_number(argument: str, value: object, least: float = 0.0, below: float = math.inf, positive: bool = False) -> None:
    """Refuses a value that is no number, or not finite, not `positive`, less than the least, or not below a limit.

    >>> check_number("rate", "x", below=1)
    Traceback (most recent call last):
    TypeError: `rate` must be a number of at least 0 and below 1, got 'x'
    """
    what = "a positive number" if positive else f"a number of at least {least:g}" + f" and below {below:g}" * (below < math.inf)
    if not is_number(value):
        raise TypeError(f"`{argument}` must be {what}, got {value!r}")
    if not least <= value < below or (positive and not value > 0):
        raise ValueError(f"`{argument}` must be {what}, got {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, NumPy's among them; True and False are none.

    >>> is_number(1), is_number(np.float32(0.5)), is_number(True), is_number("1")
    (True, True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_common(granularity: object, scale_dtype: object, pad: object, scale_dtypes: object = ScaleDtype) -> None:
    if not isinstance(granularity, Granularity):
        raise TypeError(f"`granularity` must be one of the Per... classes, e.g. PerGroup(128), got {granularity!r}")
    check_choice("scale_dtype", scale_dtype, get_args(scale_dtypes))
    check_flag("pad", pad)


def _describe(granularity: Granularity) -> str:
    match granularity:
        case PerGroup(size):
            return f"group_size={size}"
        case PerBlock(kept, contracted):
            return f"block=({kept}, {contracted})"
        case _:
            return f'per="{type(granularity).__name__.removeprefix("Per").lower()}"'


@dataclasses.dataclass(frozen=True)
class IntSpec:
    """Integers of 2 to 8 bits: `w ~= (code - zero_point) * scale`.

    Symmetric: the zero point is exactly 0 and `scale = absmax / (qmax + 1/2)` (`scale_rule="half"`) or `absmax / qmax`
    (`"full"`, which also gives up the code -2^(bits-1)). Symmetric and unsigned is for data that is never negative:
    negative values become 0 and only the largest value sets the scale. Asymmetric: `scale = (hi - lo) / (2^bits - 1)`
    with `lo = min(w, 0)` and `hi = max(w, 0)`, whatever `scale_rule` says. Codes round half to even, then clip.

    Args:
      bits: 2 to 8.
      signed: codes in -2^(bits-1) .. 2^(bits-1)-1, else in 0 .. 2^bits-1.
      symmetric: without a zero point.
      granularity: which values share a scale.
      scale_rule: "half" (compressed-tensors, GPTQ: int4 divides by 7.5) or "full" (AWQ: by 7). "absmean" and "twn" are those of
        `ternary`, for 2 bits.
      scale_dtype: the dtype that scales are stored in; they are rounded to it before codes are computed. Below 6e-5
        float16 has fewer and fewer digits; what it would make 0 is its smallest positive number, 6e-8.
      pad: pad the contracted axis with zeros up to a multiple of the group instead of refusing.
      zero_dtype: of an asymmetric spec's zero points. "int": a code, as wide as they are, and 0 is exact. A floating dtype:
        any number, `code = round(w / scale + zero_point)`, so 0 is no level of the grid in general (see `qjax.hqq`).

    Raises:
      ValueError, TypeError: naming the argument.

    >>> IntSpec(4).qmin, IntSpec(4).qmax
    (-8, 7)
    >>> IntSpec(9)
    Traceback (most recent call last):
    ValueError: `bits` must be an int from 2 to 8, got 9
    """

    bits: int
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = PerChannel()  # noqa: RUF009  # frozen
    scale_rule: ScaleRule = "half"
    scale_dtype: ScaleDtype = "float32"
    pad: bool = False
    zero_dtype: ZeroDtype = "int"

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"`bits` must be an int from 2 to 8, got {self.bits!r}")
        for argument in ("signed", "symmetric"):
            check_flag(argument, getattr(self, argument))
        check_choice("scale_rule", self.scale_rule, get_args(ScaleRule))
        check_choice("zero_dtype", self.zero_dtype, get_args(ZeroDtype))
        if self.symmetric and self.float_zero:
            what = f'`zero_dtype`="{self.zero_dtype}" needs a zero point'
            raise ValueError(f"{what}: give symmetric=False (uint4(...) has it), or leave it out")
        if self.by_mean and not (self.bits == 2 and self.signed and self.symmetric):
            rule = f"`scale_rule`={self.scale_rule!r}"
            raise ValueError(f"{rule} is for ternary weights, 2 bits, signed and symmetric: take 'half' or 'full'")
        _check_common(self.granularity, self.scale_dtype, self.pad)

    @property
    def by_mean(self) -> bool:
        """Whether scales come from the mean of the magnitudes, as those of ternary weights do, and not from the largest."""
        return self.scale_rule in ("absmean", "twn")

    @property
    def qmin(self) -> int:
        """The smallest code."""
        narrow = self.symmetric and self.scale_rule != "half"
        return (-(2 ** (self.bits - 1)) + narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def float_zero(self) -> bool:
        """Whether zero points are floating."""
        return self.zero_dtype != "int"

    def __str__(self):
        parts = [_describe(self.granularity)]
        parts += [f"symmetric={self.symmetric}"] * (self.symmetric != self.signed)
        parts += [f'scale_rule="{self.scale_rule}"'] * (self.symmetric and self.scale_rule in ("full", "twn"))
        parts += [f'scale_dtype="{self.scale_dtype}"'] * (self.scale_dtype != "float32") + ["pad=True"] * self.pad
        parts += [f'zero_dtype="{self.zero_dtype}"'] * self.float_zero
        name = "ternary" if self.by_mean else f"{'' if self.signed else 'u'}int{self.bits}"
        return f"{name}({', '.join(parts)})"


@dataclasses.dataclass(frozen=True)
class CodebookSpec:
    """A table of levels: `w ~= levels[code] * scale`, where `scale` is the largest magnitude of the block.

    Args:
      name: what reports call it.
      levels: 2^bits finite numbers in -1 .. 1, in the order of the codes (not necessarily sorted), all different as
        float32 numbers; only zero may repeat.
      granularity, scale_dtype, pad: as for `IntSpec`.
      scale_rule: "absmax", or "absmean": the mean of the magnitudes.
      double_quant: store scales in 8 bits, see `nest`.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> CodebookSpec("three", (-1.0, 0.0, 1.0))
    Traceback (most recent call last):
    ValueError: `levels` must hold 2^bits numbers with bits from 1 to 8, got 3
    """

    name: str
    levels: tuple[float, ...]
    granularity: Granularity = PerGroup(64)  # noqa: RUF009  # frozen
    scale_dtype: ScaleDtype = "float32"
    pad: bool = False
    scale_rule: TableRule = "absmax"
    double_quant: bool = False

    def __post_init__(self):
        if not isinstance(self.levels, tuple):
            raise TypeError(f"`levels` must be a tuple (a spec is hashable), got {type(self.levels).__name__}")
        if len(self.levels) not in [2**bits for bits in range(1, 9)]:
            raise ValueError(f"`levels` must hold 2^bits numbers with bits from 1 to 8, got {len(self.levels)}")
        if not all(math.isfinite(v) and abs(v) <= 1 for v in self.levels):
            raise ValueError(f"`levels` must lie in -1 .. 1 (they multiply the block's absmax), got {self.levels}")
        ordered = np.sort(np.asarray(self.levels, np.float32))
        if np.any((np.diff(ordered) == 0) & (ordered[1:] != 0)):
            raise ValueError(f"`levels` must differ as float32 numbers (only zero may repeat), got {self.levels}")
        _check_common(self.granularity, self.scale_dtype, self.pad)
        check_choice("scale_rule", self.scale_rule, get_args(TableRule))
        check_flag("double_quant", self.double_quant)
        if self.double_quant and self.scale_dtype != "float32":
            raise ValueError(f"`scale_dtype` must stay 'float32' with double_quant=True, which stores 8 bits, got {self.scale_dtype!r}")

    @property
    def bits(self) -> int:
        """Bits a code takes."""
        return len(self.levels).bit_length() - 1

    @property
    def by_mean(self) -> bool:
        """Whether scales come from the mean of the magnitudes and not from the largest."""
        return self.scale_rule == "absmean"

    def __str__(self):
        parts = [_describe(self.granularity)] + ["double_quant=True"] * self.double_quant
        parts += [f'scale_dtype="{self.scale_dtype}"'] * (self.scale_dtype != "float32") + ["pad=True"] * self.pad
        return f"{self.name}({', '.join(parts)})"


@dataclasses.dataclass(frozen=True)
class FloatSpec:
    """Small floats: `w ~= number(code) * scale`, where `scale` brings the largest magnitude of the block to the largest number.

    Args:
      element: the numbers, by exponent and mantissa bits: "e2m1" (FP4, up to 6), "e2m3", "e3m2" (FP6, up to 7.5 and 28), "e4m3",
        "e5m2" (FP8, up to 448 and 57344); "int8", integers of -127 .. 127 over 64.
      granularity, pad: as for `IntSpec`.
      scale_dtype: "float32", "float16" or "bfloat16" (`scale = absmax / largest`); "e8m0", a power of two in one byte, as in the MX
        formats; "e4m3", an FP8 number in one byte, over one float32 number a tensor, as in NVFP4. See `float_scale`.
      exponent_rule: "floor" or "round", how "e8m0" finds its exponent; see `float_scale`.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> print(FloatSpec("e4m3"), FloatSpec("e2m1", PerGroup(32), "e8m0"), FloatSpec("e2m1", PerGroup(16), "e4m3"), sep=", ")
    fp8_e4m3(per="channel"), mxfp4(), nvfp4()
    >>> FloatSpec("e4m4")
    Traceback (most recent call last):
    ValueError: `element` must be one of 'e2m1', 'e2m3', 'e3m2', 'e4m3', 'e5m2', 'int8', got 'e4m4'
    """

    element: ElementName
    granularity: Granularity = PerChannel()  # noqa: RUF009  # frozen
    scale_dtype: ScaleFormat = "float32"
    exponent_rule: ExponentRule = "floor"
    pad: bool = False

    def __post_init__(self):
        check_choice("element", self.element, get_args(ElementName))
        _check_common(self.granularity, self.scale_dtype, self.pad, ScaleFormat)
        check_choice("exponent_rule", self.exponent_rule, get_args(ExponentRule))
        if self.exponent_rule != "floor" and self.scale_dtype != "e8m0":
            raise ValueError(f"`exponent_rule`={self.exponent_rule!r} is for scale_dtype='e8m0', got {self.scale_dtype!r}")

    @property
    def bits(self) -> int:
        """Bits a code takes."""
        return 8 if self.element == "int8" else MINIFLOATS[self.element].bits

    @property
    def by_mean(self) -> bool:
        """Whether scales come from the mean of the magnitudes: they come from the largest."""
        return False

    @property
    def symmetric(self) -> bool:
        """Whether it is without a zero point."""
        return True

    @property
    def signed(self) -> bool:
        """Whether it holds negative numbers."""
        return True

    @property
    def largest(self) -> float:
        """The largest number."""
        return 127 / 64 if self.element == "int8" else MINIFLOATS[self.element].largest

    def __str__(self):
        pad = ["pad=True"] * self.pad
        if self.scale_dtype == "e8m0" and self.granularity == PerGroup(32):
            kind = {"int8": "int8", "e2m1": "fp4"}.get(self.element, f"fp{self.bits}")
            parts = [f'"{self.element}"'] * (self.bits > 4 and self.element != "int8")
            return f"mx{kind}({', '.join([*parts, *self._rule(), *pad])})"
        if self.scale_dtype == "e4m3" and self.element == "e2m1" and self.granularity == PerGroup(16):
            return f"nvfp4({', '.join(pad)})"
        parts = [_describe(self.granularity)] + [f'scale_dtype="{self.scale_dtype}"'] * (self.scale_dtype != "float32")
        parts += [*self._rule(), *pad]
        if self.element in ("e4m3", "e5m2") and self.scale_dtype in get_args(ScaleDtype):
            return f"fp8_{self.element}({', '.join(parts)})"
        return f'floating({", ".join([f"{chr(34)}{self.element}{chr(34)}", *parts])})'

    def _rule(self) -> list[str]:
        return ['exponent_rule="round"'] * (self.exponent_rule == "round")


@dataclasses.dataclass(frozen=True)
class CastSpec:
    """A plain cast to a 16-bit float, without scales.

    >>> CastSpec("float64")
    Traceback (most recent call last):
    ValueError: `dtype` must be one of 'bfloat16', 'float16', got 'float64'
    """

    dtype: Literal["bfloat16", "float16"]

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("bfloat16", "float16"))

    @property
    def bits(self) -> int:
        """Bits a value takes."""
        return 16

    def __str__(self):
        return {"bfloat16": "bf16()", "float16": "fp16()"}[self.dtype]


@dataclasses.dataclass(frozen=True)
class LearnedSpec:
    """A table of 2^bits levels that is fitted to the weight: `w ~= levels[code]`, or `levels[code] * scale` with groups.

    The granularity says how many tables there are: per channel one for each row of contracted values, per tensor one; with groups
    one a tensor too, for the weights divided by the largest magnitude of their group, which is their `scale`.

    Args:
      bits: 2 to 4.
      granularity: per channel, per tensor, or groups.
      level_dtype: the dtype that levels are stored in; below 6e-5 float16 has fewer and fewer digits.
      scale_dtype: that of the scales of groups.
      pad: as for `IntSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> LearnedSpec(5)
    Traceback (most recent call last):
    ValueError: `bits` of a learned table must be 2, 3 or 4, got 5
    """

    bits: int
    granularity: Granularity = PerChannel()  # noqa: RUF009  # frozen
    level_dtype: ScaleDtype = "float16"
    scale_dtype: ScaleDtype = "float32"
    pad: bool = False

    def __post_init__(self):
        if isinstance(self.bits, bool) or self.bits not in (2, 3, 4):
            raise ValueError(f"`bits` of a learned table must be 2, 3 or 4, got {self.bits!r}")
        _check_common(self.granularity, self.scale_dtype, self.pad)
        check_choice("level_dtype", self.level_dtype, get_args(ScaleDtype))
        if not isinstance(self.granularity, (PerChannel, PerTensor, PerGroup)):
            raise ValueError(f'`granularity` of a learned table must be per "channel", per "tensor" or groups, got {self.granularity}')

    @property
    def per_row(self) -> bool:
        """Whether every row of contracted values has a table of its own."""
        return isinstance(self.granularity, PerChannel)

    @property
    def grouped(self) -> bool:
        """Whether groups have scales."""
        return isinstance(self.granularity, PerGroup)

    def __str__(self):
        parts = [_describe(self.granularity)]
        parts += [f'level_dtype="{self.level_dtype}"'] * (self.level_dtype != "float16")
        parts += [f'scale_dtype="{self.scale_dtype}"'] * (self.scale_dtype != "float32") + ["pad=True"] * self.pad
        return f"learned({self.bits}, {', '.join(parts)})"


BlockSpec = IntSpec | CodebookSpec | FloatSpec  # codes and scales, block by block
Spec = BlockSpec | LearnedSpec | CastSpec


def signed_codes(spec: Spec) -> bool:
    """Whether codes are in two's complement.

    >>> signed_codes(IntSpec(4)), signed_codes(CodebookSpec("two", (-1.0, 1.0)))
    (True, False)
    """
    return (isinstance(spec, IntSpec) and spec.signed) or (isinstance(spec, FloatSpec) and spec.element == "int8")


def has_global_scale(spec: Spec) -> TypeGuard[FloatSpec]:
    """Whether its scales are bytes over one float32 number a tensor.

    >>> has_global_scale(FloatSpec("e2m1", PerGroup(16), "e4m3"))
    True
    """
    return isinstance(spec, FloatSpec) and spec.scale_dtype == "e4m3"
