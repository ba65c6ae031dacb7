"""The estimate of a product's cost: what follows from counts."""

import dataclasses
import json
import pathlib

import pytest
from qjax_kernels.request import Device, Request, Weight
from qjax_kernels.tpu.chips import CHIPS
from qjax_kernels.tpu.cost import RATES, estimate

COUNTS = pathlib.Path(__file__).parents[3] / "experiments" / "kernels" / "tpu_static" / "0.0.42.1.json"
NAMES = {"W4A16": "W4A16 g128", "W8A16": "W8A16 g128"}  # of rates, as the counts call them
DECODE = Request(Device("tpu", "v6e"), 16, 4096, 4096, Weight("int", 4, 128))


def test_bytes_are_those_of_the_operands():
    cost = estimate(DECODE)
    weight, scales, x, y = 4096 * 4096 // 2, 32 * 4096 * 4, 16 * 4096 * 2, 16 * 4096 * 2
    assert cost.bytes == weight + scales + 4 * x + y  # x once for each 1024 columns
    assert cost.seconds == max(cost.compute, cost.memory)
    integer = estimate(dataclasses.replace(DECODE, weight=Weight("int", 8), activation="int8"))
    assert integer.bytes == 2 * weight + 4 * 4096 * 4 + x + y and integer.kernel == "W8A8"


@pytest.mark.parametrize("chip", CHIPS)
def test_rates_are_those_of_the_committed_counts(chip):
    counted = {(row["kernel"], tuple(row["tile"] or ())): row["body"] for row in json.loads(COUNTS.read_text()) if row["chip"] == chip}
    unseen = {"v5e": 0.20, "v5p": 0.20, "v6e": 0.27, "tpu7x": 0.32}[chip]
    for kernel, rate in RATES[chip].items():
        for m, n, k, least, most in ((16, 1024, 1024, 0.99, 1.01), (256, 1024, 1024, 0.99, 1.01), (128, 512, 512, 1 - unseen, 1.0)):
            rated = rate.weights * n * k / 1024 + rate.products * m * n * k / CHIPS[chip].macs
            assert least <= rated / counted[NAMES.get(kernel, kernel), (m, n, k)] <= most, (kernel, m)


def test_fp8_has_rates_of_its_own_and_float32_rows_have_none():
    eight = dataclasses.replace(DECODE, device=Device("tpu", "tpu7x"), weight=Weight("fp8", 8))
    assert estimate(eight).kernel == "W8A16 fp8" and estimate(dataclasses.replace(eight, activation="fp8")).kernel == "W8A8 fp8"
    wide = dataclasses.replace(DECODE, dtype="float32")
    with pytest.raises(ValueError, match="float32 ones take six passes"):
        estimate(wide)
    assert estimate(dataclasses.replace(wide, weight=Weight("int", 8), activation="int8")).kernel == "W8A8"


def test_experts_multiply():
    one, eight = estimate(DECODE), estimate(dataclasses.replace(DECODE, parts=8))
    assert (eight.steps, eight.bytes, eight.compute) == (8 * one.steps, 8 * one.bytes, 8 * one.compute)


@pytest.mark.parametrize("chip", CHIPS)
def test_prefill_of_packed_weights_is_bound_by_arithmetic_and_vector_memory_holds_a_tile(chip):
    request = dataclasses.replace(DECODE, device=Device("tpu", chip), m=4096)
    assert estimate(request).compute > estimate(request).memory
    for kernel in RATES[chip]:
        assert estimate(request, kernel).vmem < 16 * 2**20


@pytest.mark.parametrize("chip", CHIPS)
def test_no_product_is_faster_than_its_matrix_unit(chip):
    """Beside the float product at its best, with each operand read once, bfloat16 rows gain nothing where arithmetic binds."""
    square, peak = dataclasses.replace(DECODE, device=Device("tpu", chip), m=4096), 4096**3 / (CHIPS[chip].macs * CHIPS[chip].clock)
    plain = estimate(square, "bf16")
    assert plain.seconds == plain.compute == pytest.approx(peak) and plain.bytes == 2 * 3 * 4096**2
    for kernel in RATES[chip]:
        eight = 2 if kernel in ("W8A8", "W4A8", "W8A8 fp8") else 1
        assert estimate(square, kernel).compute >= 0.999 * peak / eight, kernel


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="no rates on tpu7x"):
        estimate(dataclasses.replace(DECODE, device=Device("tpu", "tpu7x"), activation="int8"))
    with pytest.raises(ValueError, match="'codebook'"):
        estimate(dataclasses.replace(DECODE, weight=Weight("codebook", 4)))
