"""Functions that build specs: integers of every width, tables, casts. `named_specs` has those that were published under a name."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from qjax.core.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qjax.core.specs import CastSpec, CodebookSpec, IntSpec, LearnedSpec, ScaleDtype, ScaleRule, ZeroDtype, check_choice

Per = Literal["tensor", "channel", "token"]


def granularity_of(per: Per | None, group_size: int | None, block: tuple[int, int] | None) -> Granularity:
    """The granularity that the three arguments of most factories mean.

    >>> granularity_of(None, 128, None)
    PerGroup(size=128)
    """
    if sum(v is not None for v in (per, group_size, block)) > 1:
        raise ValueError(f"give one of `per`, `group_size` and `block`, got {per=}, {group_size=}, {block=}")
    if group_size is not None:
        return PerGroup(group_size)
    if block is not None:
        if not isinstance(block, tuple) or len(block) != 2:
            raise TypeError(f"`block` must be a tuple (kept, contracted), got {block!r}")
        return PerBlock(*block)
    check_choice("per", per, (None, *get_args(Per)))
    return {None: PerChannel(), "channel": PerChannel(), "tensor": PerTensor(), "token": PerToken()}[per]


def integer(
    bits: int,
    *,
    signed: bool = True,
    symmetric: bool | None = None,
    per: Per | None = None,
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
    scale_rule: ScaleRule = "half",
    scale_dtype: ScaleDtype = "float32",
    pad: bool = False,
    zero_dtype: ZeroDtype = "int",
) -> IntSpec:
    """Integers of 2 to 8 bits; `int4(...)` is `integer(4, ...)` and `uint4(...)` is `integer(4, signed=False, ...)`.

    Args:
      bits: 2 to 8.
      signed: signed codes.
      symmetric: without a zero point; by default signed codes are symmetric and unsigned ones are not.
      per: "channel" (the default), "tensor" or "token".
      group_size: values along the contracted axes that share a scale, instead of `per`.
      block: (kept, contracted) tile that shares a scale, instead of `per`.
      scale_rule: "half" or "full", see `IntSpec`.
      scale_dtype: "float32", "float16" or "bfloat16".
      pad: pad a contracted axis that the group does not divide.
      zero_dtype: "int", or the floating dtype of zero points, see `IntSpec`.

    Returns:
      The spec.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> print(integer(3, group_size=64))
    int3(group_size=64)
    """
    symmetric = signed if symmetric is None else symmetric
    granularity = granularity_of(per, group_size, block)
    return IntSpec(bits, signed, symmetric, granularity, scale_rule, scale_dtype, pad, zero_dtype)


def _integer_factory(bits: int, signed: bool) -> Callable[..., IntSpec]:
    def factory(
        *,
        per: Per | None = None,
        group_size: int | None = None,
        block: tuple[int, int] | None = None,
        symmetric: bool = signed,
        scale_rule: ScaleRule = "half",
        scale_dtype: ScaleDtype = "float32",
        pad: bool = False,
        zero_dtype: ZeroDtype = "int",
    ) -> IntSpec:
        return integer(
            bits, signed=signed, symmetric=symmetric, per=per, group_size=group_size, block=block,
            scale_rule=scale_rule, scale_dtype=scale_dtype, pad=pad, zero_dtype=zero_dtype,
        )  # fmt: skip

    kind = "signed, symmetric" if signed else "unsigned, asymmetric"
    factory.__name__ = factory.__qualname__ = f"{'' if signed else 'u'}int{bits}"
    factory.__doc__ = f"""{bits}-bit integers, {kind}, per channel unless told otherwise; keywords as for `integer`.

    >>> {factory.__name__}(group_size=32).bits
    {bits}
    """
    return factory


int2, int3, int4, int5, int6, int7, int8 = (_integer_factory(bits, signed=True) for bits in range(2, 9))
uint2, uint3, uint4, uint5, uint6, uint7, uint8 = (_integer_factory(bits, signed=False) for bits in range(2, 9))


def codebook(
    levels: Sequence[float],
    *,
    name: str = "codebook",
    per: Per | None = None,
    group_size: int | None = None,
    block: tuple[int, int] | None = None,
    scale_dtype: ScaleDtype = "float32",
    pad: bool = False,
) -> CodebookSpec:
    """A table of 2^bits levels in -1 .. 1, groups of 64 unless told otherwise.

    Args:
      levels: in the order of the codes, see `CodebookSpec`.
      name: what reports call it.
      per: as for `integer`.
      group_size: as for `integer`.
      block: as for `integer`.
      scale_dtype: as for `integer`.
      pad: as for `integer`.

    Returns:
      A `CodebookSpec`.

    Raises:
      TypeError, ValueError: naming the argument.

    >>> print(codebook([-1, -1/3, 1/3, 1], name="quaternary", group_size=32))
    quaternary(group_size=32)
    """
    default = per is None and group_size is None and block is None
    granularity = PerGroup(64) if default else granularity_of(per, group_size, block)
    return CodebookSpec(name, tuple(float(v) for v in levels), granularity, scale_dtype, pad)


def learned(
    bits: int,
    *,
    per: Literal["channel", "tensor"] | None = None,
    group_size: int | None = None,
    level_dtype: ScaleDtype = "float16",
    scale_dtype: ScaleDtype = "float32",
    pad: bool = False,
) -> LearnedSpec:
    """A table of levels that is fitted to the weight, by `qjax.kmeans()` or, without data, by any rounding.

    Args:
      bits: 2 to 4.
      per: "channel" (the default), a table for each output, as SqueezeLLM has it: 2^bits levels that K weights share. "tensor": one.
      group_size: one table for the tensor, and a scale for so many values along the contracted axes, as nf4 has it.
      level_dtype: "float16", "float32" or "bfloat16".
      scale_dtype: of the scales of groups.
      pad: pad a contracted axis that the group does not divide.

    Returns:
      A `LearnedSpec`.

    Raises:
      ValueError, TypeError: naming the argument.

    >>> print(learned(3), learned(4, group_size=64))
    learned(3, per="channel") learned(4, group_size=64)
    """
    return LearnedSpec(bits, granularity_of(per, group_size, None), level_dtype, scale_dtype, pad)


def bf16() -> CastSpec:
    """A plain cast to bfloat16.

    Returns:
      A `CastSpec`.

    >>> bf16().bits
    16
    """
    return CastSpec("bfloat16")


def fp16() -> CastSpec:
    """A plain cast to float16.

    Returns:
      A `CastSpec`.

    >>> fp16().bits
    16
    """
    return CastSpec("float16")
