"""The shipped model's perplexities against numbers made with transformers and torch."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.evaluation import calibration_windows, encode, perplexity, windows
from qjax.models import Llama, books_llama, calibration_lines, heldout_text


@pytest.fixture(scope="module")
def books():
    checkpoint = books_llama()
    return checkpoint, Llama(checkpoint.config).apply, windows(encode(checkpoint.tokenizer, heldout_text()))


def rounded_by_hand(params, bits, group_size):
    """Rounds every linear kernel (in, out), with NumPy alone: scale = absmax / (2^(bits - 1) - 0.5)."""
    limit, found = 2 ** (bits - 1), {}
    for name, value in params.items():
        if isinstance(value, dict):
            found[name] = rounded_by_hand(value, bits, group_size)
        elif name == "kernel":
            w = np.asarray(value, np.float32)
            groups = w.reshape(-1, group_size or w.shape[0], w.shape[1])
            scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(limit - 0.5)
            codes = np.clip(np.rint(groups / scale), -limit, limit - 1)
            found[name] = jnp.asarray((codes * scale).reshape(w.shape))
        else:
            found[name] = value
    return found


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


def test_float_perplexity(books):
    checkpoint, apply, rows = books
    assert perplexity(apply, {"params": checkpoint.params}, rows) == pytest.approx(47.051, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group_size", "expected"), [(8, None, 47.057), (4, 128, 47.423), (3, 128, 49.245)])
def test_rounded_perplexity(books, bits, group_size, expected):
    checkpoint, apply, rows = books
    params = rounded_by_hand(checkpoint.params, bits, group_size)
    assert perplexity(apply, {"params": params}, rows) == pytest.approx(expected, abs=0.002)
