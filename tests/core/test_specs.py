import dataclasses
import inspect

import pytest

import qjax.core as core
from qjax.core import (
    CastSpec,
    CodebookSpec,
    IntSpec,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    bf16,
    codebook,
    fp4,
    fp16,
    int4,
    integer,
    nf4,
    uint4,
)


@pytest.mark.parametrize("bits", range(2, 9))
def test_ranges(bits):
    half = 2 ** (bits - 1)
    full = {"scale_rule": "full"}
    assert (IntSpec(bits).qmin, IntSpec(bits).qmax) == (-half, half - 1)
    assert (IntSpec(bits, **full).qmin, IntSpec(bits, **full).qmax) == (-(half - 1), half - 1)
    for symmetric in (True, False):
        unsigned = IntSpec(bits, signed=False, symmetric=symmetric, **full)
        assert (unsigned.qmin, unsigned.qmax) == (0, 2 * half - 1)
    assert IntSpec(bits, symmetric=False, **full).qmin == -half  # the rule does not touch asymmetric codes


@pytest.mark.parametrize("bits", range(2, 9))
def test_named_factories(bits):
    assert getattr(core, f"int{bits}")() == IntSpec(bits)
    assert getattr(core, f"uint{bits}")() == IntSpec(bits, signed=False, symmetric=False)
    assert getattr(core, f"int{bits}").__name__ == f"int{bits}"
    wanted = set(inspect.signature(integer).parameters) - {"bits", "signed"}
    assert set(inspect.signature(getattr(core, f"uint{bits}")).parameters) == wanted


def test_granularities():
    assert int4().granularity == int4(per="channel").granularity == PerChannel()
    assert int4(per="tensor").granularity == PerTensor()
    assert int4(per="token").granularity == PerToken()
    assert int4(group_size=128).granularity == PerGroup(128)
    assert int4(block=(16, 32)).granularity == PerBlock(16, 32)
    assert codebook([-1, 0, 0.5, 1]).granularity == PerGroup(64)
    assert codebook([-1, 0, 0.5, 1], per="channel").granularity == PerChannel()


def test_specs_are_values():
    assert int4(group_size=128) == int4(group_size=128) != int4(group_size=64)
    assert len({int4(), int4(), uint4(), nf4(), nf4(64), fp4(), bf16(), fp16()}) == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        int4().bits = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (int4(group_size=128), "int4(group_size=128)"),
        (uint4(block=(16, 32), pad=True), "uint4(block=(16, 32), pad=True)"),
        (integer(3, signed=False, symmetric=True), 'uint3(per="channel", symmetric=True)'),
        (
            int4(scale_rule="full", scale_dtype="float16"),
            'int4(per="channel", scale_rule="full", scale_dtype="float16")',
        ),
        (nf4(32, scale_dtype="bfloat16"), 'nf4(group_size=32, scale_dtype="bfloat16")'),
        (bf16(), "bf16()"),
        (fp16(), "fp16()"),
    ],
)
def test_text_is_how_one_would_write_it(spec, text):
    assert str(spec) == text
    assert eval(text, vars(core)) == spec


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IntSpec(1), ValueError, "`bits` must be an int from 2 to 8, got 1"),
        (lambda: IntSpec(True), ValueError, "`bits` must be an int from 2 to 8, got True"),
        (lambda: IntSpec(4, signed=1), TypeError, "`signed` must be True or False, got 1"),
        (lambda: IntSpec(4, symmetric=None), TypeError, "`symmetric` must be True or False, got None"),
        (lambda: IntSpec(4, granularity=128), TypeError, "`granularity` must be one of the Per"),
        (lambda: IntSpec(4, scale_rule="max"), ValueError, "`scale_rule` must be one of 'half', 'full', .*, got 'max'"),
        (lambda: int4(scale_dtype="float64"), ValueError, "`scale_dtype` must be one of .*, got 'float64'"),
        (lambda: int4(pad=1), TypeError, "`pad` must be True or False, got 1"),
        (lambda: int4(per="row"), ValueError, "`per` must be one of .*, got 'row'"),
        (lambda: int4(per="tensor", group_size=8), ValueError, "give one of `per`, `group_size` and `block`"),
        (lambda: int4(group_size=0), ValueError, "`group_size` must be at least 1, got 0"),
        (lambda: int4(group_size=12.0), TypeError, "`group_size` must be an int, got 12.0"),
        (lambda: int4(block=16), TypeError, r"`block` must be a tuple \(kept, contracted\), got 16"),
        (lambda: int4(block=(4, -1)), ValueError, r"`block\[1\]` must be at least 1, got -1"),
        (lambda: CodebookSpec("c", [0.0, 1.0, 0.5, -1.0]), TypeError, "`levels` must be a tuple"),
        (lambda: codebook([0.0, 1.0, 0.5]), ValueError, r"`levels` must hold 2\^bits numbers .*, got 3"),
        (lambda: codebook([0.0, 1.0, 0.5, 1.5]), ValueError, "`levels` must lie in -1 .. 1"),
        (lambda: codebook([0.0, 1.0, 0.5, float("nan")]), ValueError, "`levels` must lie in -1 .. 1"),
        (lambda: codebook([0.0, 1.0, 0.5, 0.5]), ValueError, "`levels` must differ as float32 numbers"),
        (lambda: CastSpec("float32"), ValueError, "`dtype` must be one of 'bfloat16', 'float16', got 'float32'"),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()
