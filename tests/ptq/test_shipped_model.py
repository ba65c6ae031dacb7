"""Perplexities of the shipped model, quantized, against numbers made with torch and gptqmodel 7.7.

tests/cli/demo_figures.py compares float32, int8, int4(group_size=128) and GPTQ in groups of 128, which `qjax demo` measures anyway.
"""

import jax.numpy as jnp
import pytest

import qjax
from qjax.evaluation import batches, calibration_windows, encode, perplexity, windows
from qjax.models import Llama, books_llama, calibration_lines, heldout_text


@pytest.fixture(scope="module")
def measure():
    checkpoint = books_llama()
    apply, params = Llama(checkpoint.config).apply, {"params": checkpoint.params}
    text = windows(encode(checkpoint.tokenizer, heldout_text()))
    data = [jnp.asarray(b) for b in batches(calibration_windows(checkpoint.tokenizer, calibration_lines()), 8)]

    def run(spec, method=None):
        policy = qjax.Policy([qjax.Rule("*embed*", weight=None), qjax.Rule("*", weight=spec, method=method)])
        packed = qjax.quantize(apply, params, policy, calibration=data).params
        return perplexity(qjax.quantized(apply), packed, text)

    return run


ROUNDING = [
    (qjax.int4(), 47.506),
    (qjax.int3(group_size=128), 49.245),
    (qjax.int2(group_size=64), 59.871),
]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "expected"), ROUNDING, ids=str)
def test_rounding(measure, spec, expected):
    assert measure(spec) == pytest.approx(expected, abs=0.001)


@pytest.mark.slow
def test_gptq_is_better_than_gptqmodel(measure):
    assert measure(qjax.int2(group_size=64), qjax.gptq()) < 54.514


@pytest.mark.slow
def test_gptq_with_the_ranges_of_the_paper_is_gptqmodels(measure):
    # The order of sums alone moves this by .07: see experiments/gptq_model.
    assert measure(qjax.int3(group_size=128), qjax.gptq(mse=False)) == pytest.approx(48.235, abs=0.1)
