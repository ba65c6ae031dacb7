"""Specs by the names that they were published under: tables of 4 bits, FP8, MX, NVFP4, ternary and binary weights."""

import statistics
from typing import Literal

from qjax.core.factories import Per, granularity_of
from qjax.core.granularity import PerGroup
from qjax.core.specs import CodebookSpec, ElementName, ExponentRule, FloatSpec, IntSpec, ScaleDtype, ScaleFormat

# The table of bitsandbytes (`get_4bit_type("nf4")`), every digit. It is not Phi^-1((2i+1)/32), which has no exact zero.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Not sorted: a sign bit, then 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4. Codes 0 and 8 both stand for 0.
FP4_LEVELS = tuple(sign * v / 12.0 + 0.0 for sign in (1.0, -1.0) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
# Equation 4 of QLoRA in its plain form: symmetric, without a zero.
_QUANTILES = tuple(statistics.NormalDist().inv_cdf((2 * i + 1) / 32) for i in range(16))
QUANTILE_LEVELS = tuple(q / _QUANTILES[-1] for q in _QUANTILES)


def nf4(
    group_size: int = 64,
    *,
    table: Literal["bitsandbytes", "quantile"] = "bitsandbytes",
    double_quant: bool = False,
    scale_dtype: ScaleDtype = "float32",
    pad: bool = False,
) -> CodebookSpec:
    """NormalFloat, 4 bits: quantiles of a normal distribution.

    Args:
      group_size: values that share a scale.
      table: "bitsandbytes", which has an exact zero; or "quantile", level i is Phi^-1((2 i + 1) / 32) over the largest of them: symmetric
        and without a zero, so that zeros do not stay zero.
      double_quant: store scales in 8 bits, in blocks of 256 (see `nest`): .5 bits a weight become .127.
      scale_dtype: the dtype that scales are stored in.
      pad: pad with zeros what the group does not divide.

    Returns:
      A `CodebookSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    Source: QLoRA (arXiv 2305.14314), equation 4 for the quantiles; the table with a zero is that of bitsandbytes.

    >>> print(nf4(), nf4(table="quantile", double_quant=True))
    nf4(group_size=64) nf4_quantile(group_size=64, double_quant=True)
    """
    tables = {"bitsandbytes": ("nf4", NF4_LEVELS), "quantile": ("nf4_quantile", QUANTILE_LEVELS)}
    if table not in tables:
        raise ValueError(f"`table` must be 'bitsandbytes' or 'quantile', got {table!r}")
    name, levels = tables[table]
    return CodebookSpec(name, levels, PerGroup(group_size), scale_dtype, pad, double_quant=double_quant)


def fp4(
    group_size: int = 64, *, double_quant: bool = False, scale_dtype: ScaleDtype = "float32", pad: bool = False
) -> CodebookSpec:
    """bitsandbytes' FP4 (not OCP's E2M1, see `mxfp4`): a sign and eight magnitudes, in the order of its codes.

    Args:
      group_size: as for `nf4`.
      double_quant: as for `nf4`.
      scale_dtype: as for `nf4`.
      pad: as for `nf4`.

    Returns:
      A `CodebookSpec`.

    Source: bitsandbytes' `get_4bit_type("fp4")`.

    >>> fp4().levels[1] == 1 / 192
    True
    """
    return CodebookSpec("fp4", FP4_LEVELS, PerGroup(group_size), scale_dtype, pad, double_quant=double_quant)


def ternary(
    *,
    scale_rule: Literal["absmean", "twn"] = "absmean",
    per: Per | None = None,
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
    scale_dtype: ScaleDtype = "float32",
    pad: bool = False,
) -> IntSpec:
    """Weights of -1, 0 and 1 times a scale, 2 bits: `clip(round(w / scale), -1, 1)`.

    Args:
      scale_rule: "absmean", the mean of |w|; or "twn", the mean of those |w| that exceed .7 of that mean.
      per: as for `integer`.
      group_size: as for `integer`.
      block: as for `integer`.
      scale_dtype: as for `integer`.
      pad: as for `integer`; the zeros that fill the last group do not count in its mean.

    Returns:
      An `IntSpec` of 2 bits. With `qjax.dynamic(qjax.int8())` activations its products run on integers.

    Raises:
      ValueError, TypeError: naming the argument.

    Source: BitNet b1.58 (arXiv 2402.17764), equations 1 to 3; there the scale is one a tensor (`per="tensor"`). Ternary Weight Networks
    (arXiv 1605.04711), equation 6. There a weight becomes 0 below the threshold from which the scale was taken; here every weight goes
    to the nearest level, which with the same scale is never further away.

    >>> print(ternary(), ternary(group_size=128, scale_rule="twn"))
    ternary(per="channel") ternary(group_size=128, scale_rule="twn")
    """
    if scale_rule not in ("absmean", "twn"):
        raise ValueError(f"`scale_rule` must be 'absmean' or 'twn', got {scale_rule!r}")
    return IntSpec(2, granularity=granularity_of(per, group_size, block), scale_rule=scale_rule, scale_dtype=scale_dtype, pad=pad)


def binary(
    *,
    per: Per | None = None,
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
    double_quant: bool = False,
    scale_dtype: ScaleDtype = "float32",
    pad: bool = False,
) -> CodebookSpec:
    """The sign of a weight times the mean of |w|, 1 bit. There is no zero: a zero weight becomes minus the scale.

    Args:
      per: as for `integer`.
      group_size: as for `integer`.
      block: as for `integer`.
      double_quant: as for `nf4`.
      scale_dtype: as for `integer`.
      pad: as for `ternary`.

    Returns:
      A `CodebookSpec` of two levels.

    Raises:
      ValueError, TypeError: naming the argument.

    Source: XNOR-Net (arXiv 1603.05279), equation 6: for a sign the mean of |w| is the scale with the least squared error.

    >>> print(binary(group_size=32))
    binary(group_size=32)
    """
    granularity = granularity_of(per, group_size, block)
    return CodebookSpec("binary", (-1.0, 1.0), granularity, scale_dtype, pad, "absmean", double_quant)


def floating(
    element: ElementName,
    *,
    per: Per | None = None,
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
    scale_dtype: ScaleFormat = "float32",
    exponent_rule: ExponentRule = "floor",
    pad: bool = False,
) -> FloatSpec:
    """Small floats of any kind, with any kind of scale, see `FloatSpec`; those with a name have a function of that name.

    Args:
      element: "e2m1", "e2m3", "e3m2", "e4m3", "e5m2" or "int8".
      per: as for `integer`.
      group_size: as for `integer`.
      block: as for `integer`.
      scale_dtype: "float32", "float16", "bfloat16", "e8m0" or "e4m3".
      exponent_rule: as for `mxfp4`.
      pad: as for `integer`.

    Returns:
      A `FloatSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> print(floating("e3m2", group_size=64, scale_dtype="bfloat16"))
    floating("e3m2", group_size=64, scale_dtype="bfloat16")
    """
    return FloatSpec(element, granularity_of(per, group_size, block), scale_dtype, exponent_rule, pad)


def fp8_e4m3(
    *,
    per: Per | None = None,
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
    scale_dtype: ScaleDtype = "float32",
    pad: bool = False,
) -> FloatSpec:
    """FP8 with 4 bits of exponent and 3 of mantissa, up to 448: `scale = absmax / 448`, nearest even, saturating.

    Args:
      per: "channel" (the default), "tensor" or "token".
      group_size: values along the contracted axes that share a scale, such as the 128 of DeepSeek-V3's activations.
      block: (kept, contracted) tile that shares a scale, such as the (128, 128) of DeepSeek-V3's weights.
      scale_dtype: as for `integer`.
      pad: as for `integer`.

    Returns:
      A `FloatSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    Source: Micikevicius et al., arXiv 2209.05433, and OCP's 8-bit floating point specification; blocks: DeepSeek-V3 (arXiv 2412.19437).

    >>> print(fp8_e4m3(block=(128, 128)))
    fp8_e4m3(block=(128, 128))
    """
    return FloatSpec("e4m3", granularity_of(per, group_size, block), scale_dtype, pad=pad)


def fp8_e5m2(
    *,
    per: Per | None = None,
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
    scale_dtype: ScaleDtype = "float32",
    pad: bool = False,
) -> FloatSpec:
    """FP8 with 5 bits of exponent and 2 of mantissa, up to 57344; keywords as for `fp8_e4m3`.

    Args:
      per: as for `fp8_e4m3`.
      group_size: as for `fp8_e4m3`.
      block: as for `fp8_e4m3`.
      scale_dtype: as for `fp8_e4m3`.
      pad: as for `fp8_e4m3`.

    Returns:
      A `FloatSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> fp8_e5m2().bits
    8
    """
    return FloatSpec("e5m2", granularity_of(per, group_size, block), scale_dtype, pad=pad)


def _mx(element: ElementName, exponent_rule: ExponentRule, pad: bool) -> FloatSpec:
    return FloatSpec(element, PerGroup(32), "e8m0", exponent_rule, pad)


def mxfp4(*, exponent_rule: ExponentRule = "floor", pad: bool = False) -> FloatSpec:
    """MXFP4: E2M1 in blocks of 32 that share a power of two, 4.25 bits a weight.

    Args:
      exponent_rule: "floor" as in the standard, whose largest values saturate; "round" takes the next power of two where they would
        round beyond the largest number (from a mantissa of 1.75 on), see `float_scale`.
      pad: pad with zeros what 32 does not divide.

    Returns:
      A `FloatSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    Source: OCP Microscaling formats v1.0; "round" is the rule of compressed-tensors.

    >>> print(mxfp4(), mxfp4(exponent_rule="round"))
    mxfp4() mxfp4(exponent_rule="round")
    """
    return _mx("e2m1", exponent_rule, pad)


def mxfp6(element: Literal["e2m3", "e3m2"] = "e2m3", *, exponent_rule: ExponentRule = "floor", pad: bool = False) -> FloatSpec:
    """MXFP6: E2M3 or E3M2 in blocks of 32 that share a power of two, 6.25 bits a weight.

    Args:
      element: "e2m3" or "e3m2".
      exponent_rule: as for `mxfp4`.
      pad: as for `mxfp4`.

    Returns:
      A `FloatSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> print(mxfp6("e3m2"))
    mxfp6("e3m2")
    """
    if element not in ("e2m3", "e3m2"):
        raise ValueError(f"`element` of mxfp6 must be 'e2m3' or 'e3m2', got {element!r}")
    return _mx(element, exponent_rule, pad)


def mxfp8(element: Literal["e4m3", "e5m2"] = "e4m3", *, exponent_rule: ExponentRule = "floor", pad: bool = False) -> FloatSpec:
    """MXFP8: E4M3 or E5M2 in blocks of 32 that share a power of two, 8.25 bits a weight.

    Args:
      element: "e4m3" or "e5m2".
      exponent_rule: as for `mxfp4`.
      pad: as for `mxfp4`.

    Returns:
      A `FloatSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> print(mxfp8())
    mxfp8("e4m3")
    """
    if element not in ("e4m3", "e5m2"):
        raise ValueError(f"`element` of mxfp8 must be 'e4m3' or 'e5m2', got {element!r}")
    return _mx(element, exponent_rule, pad)


def mxint8(*, exponent_rule: ExponentRule = "floor", pad: bool = False) -> FloatSpec:
    """MXINT8: integers of -127 .. 127 over 64 in blocks of 32 that share a power of two, 8.25 bits a weight.

    Args:
      exponent_rule: as for `mxfp4`.
      pad: as for `mxfp4`.

    Returns:
      A `FloatSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> print(mxint8())
    mxint8()
    """
    return _mx("int8", exponent_rule, pad)


def nvfp4(*, pad: bool = False) -> FloatSpec:
    """NVFP4: E2M1 in blocks of 16 with an E4M3 scale, over one float32 scale a tensor, 4.5 bits a weight.

    With `g = 448 * 6 / absmax` of the tensor the scale of a block is `e4m3(absmax_block / 6 * g) / g`.

    Args:
      pad: pad with zeros what 16 does not divide.

    Returns:
      A `FloatSpec`.

    Raises:
      TypeError: naming the argument.

    Source: NVIDIA, "Pretraining large language models with NVFP4" (arXiv 2509.25149); g is stored as compressed-tensors does. Unlike
    there the scale of a block is at least 2^-9, the smallest E4M3 number, so that no block loses all its values.

    >>> print(nvfp4())
    nvfp4()
    """
    return FloatSpec("e2m1", PerGroup(16), "e4m3", pad=pad)
