"""The estimate of a product's cost: what follows from counts."""

import dataclasses

import pytest
from qjax_kernels.request import Device, Request, Weight
from qjax_kernels.tpu.chips import CHIPS
from qjax_kernels.tpu.cost import RATES, estimate

DECODE = Request(Device("tpu", "v6e"), 16, 4096, 4096, Weight("int", 4, 128))


def test_bytes_are_those_of_the_operands():
    cost = estimate(DECODE)
    weight, scales, x, y = 4096 * 4096 // 2, 32 * 4096 * 4, 16 * 4096 * 2, 16 * 4096 * 2
    assert cost.bytes == weight + scales + 4 * x + y  # x once for each 1024 columns
    assert cost.seconds == max(cost.compute, cost.memory)
    integer = estimate(dataclasses.replace(DECODE, weight=Weight("int", 8), activation="int8"))
    assert integer.bytes == 2 * weight + 4 * 4096 * 4 + x + y and integer.kernel == "W8A8"


def test_experts_multiply():
    one, eight = estimate(DECODE), estimate(dataclasses.replace(DECODE, parts=8))
    assert (eight.steps, eight.bytes, eight.compute) == (8 * one.steps, 8 * one.bytes, 8 * one.compute)


@pytest.mark.parametrize("chip", CHIPS)
def test_prefill_of_packed_weights_is_bound_by_arithmetic_and_vector_memory_holds_a_tile(chip):
    request = dataclasses.replace(DECODE, device=Device("tpu", chip), m=4096)
    assert estimate(request).compute > estimate(request).memory
    for kernel in RATES[chip]:
        assert estimate(request, kernel).vmem < 16 * 2**20


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="no rates on tpu7x"):
        estimate(dataclasses.replace(DECODE, device=Device("tpu", "tpu7x"), activation="int8"))
    with pytest.raises(ValueError, match="'codebook'"):
        estimate(dataclasses.replace(DECODE, weight=Weight("codebook", 4)))
