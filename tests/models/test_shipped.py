"""The shipped model's perplexities against a number made with transformers."""

import numpy as np
import pytest

from qjax.evaluation import calibration_windows, encode, perplexity, windows
from qjax.models import Llama, books_llama, calibration_lines, heldout_text


@pytest.fixture(scope="module")
def books():
    checkpoint = books_llama()
    return checkpoint, Llama(checkpoint.config).apply, windows(encode(checkpoint.tokenizer, heldout_text()))


def test_windows_of_the_protocol(books):
    _, _, rows = books
    assert rows.shape == (226, 256)
    assert rows[0, 0] == 1
    assert rows.dtype == np.int32


def test_calibration_lines_all_fill_a_window(books):
    checkpoint, _, _ = books
    rows = calibration_windows(checkpoint.tokenizer, calibration_lines(), count=200)
    assert rows.shape == (200, 256)
    assert set(rows[:, 0].tolist()) == {1}


@pytest.mark.slow
def test_float_perplexity(books):
    checkpoint, apply, rows = books
    assert perplexity(apply, {"params": checkpoint.params}, rows) == pytest.approx(47.051, abs=0.002)
