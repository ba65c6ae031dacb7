"""Perplexity against NumPy in float64, on a model that is a table of logits."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.evaluation import perplexity, perplexity_of, token_losses

VOCABULARY = 11


def bigram(table, tokens):
    return table[tokens]


@pytest.fixture(scope="module")
def table():
    return jnp.asarray(np.random.default_rng(0).normal(0, 3, (VOCABULARY, VOCABULARY)), jnp.float32)


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(1).integers(0, VOCABULARY, (7, 5))


def losses_in_float64(table, rows):
    logits = np.asarray(table, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_p[rows[:, :-1], rows[:, 1:]]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_losses_and_perplexity(table, rows, batch_size):
    expected = losses_in_float64(table, rows)
    found = token_losses(bigram, table, rows, batch_size)
    assert found.shape == (7, 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert perplexity(bigram, table, rows, batch_size) == pytest.approx(np.exp(expected.mean()), rel=1e-6)


def test_large_logits_do_not_overflow(table, rows):
    shifted = token_losses(bigram, table + 1000.0, rows)
    np.testing.assert_allclose(shifted, token_losses(bigram, table, rows), atol=2e-4)


def test_bfloat16_logits_are_scored_in_float32(table, rows):
    narrow = table.astype(jnp.bfloat16)
    expected = losses_in_float64(narrow.astype(jnp.float32), rows)
    np.testing.assert_allclose(token_losses(bigram, narrow, rows), expected, rtol=2e-6)


def test_mean_of_losses_is_in_float64():
    losses = np.full(3_000_000, 1.1, np.float32)
    assert perplexity_of(losses) == pytest.approx(np.exp(np.float64(np.float32(1.1))), rel=1e-12)


def test_no_more_logits_than_a_batch_and_one_trace(table, rows):
    seen = []

    def apply(params, tokens):
        seen.append(tokens.shape)
        return params[tokens]

    token_losses(apply, table, rows, 2)
    token_losses(apply, table, rows, 2)
    assert seen == [(2, 5)]


def test_a_broken_model_is_not_hidden(table, rows):
    assert np.isnan(perplexity(bigram, table.at[3].set(jnp.nan), rows))


def test_wrong_arguments_are_named(table, rows):
    with pytest.raises(ValueError, match="`tokens` hold the id 10 but the logits have 6 entries"):
        perplexity(bigram, jnp.zeros((11, 6)), rows)
    with pytest.raises(ValueError, match=r"`apply` must give logits of shape \(7, 5, 'V'\)"):
        perplexity(lambda params, tokens: params[tokens][:, -1], table, rows)
    with pytest.raises(ValueError, match=r"`apply` must give logits of shape .* not tuple"):
        perplexity(lambda params, tokens: (params[tokens], None), table, rows)
    with pytest.raises(ValueError, match="`tokens` must be ids"):
        perplexity(bigram, table, rows[0])


def test_evaluation_does_not_import_flax():
    # A fresh process that cannot import them; the package's own __init__ may, so it is stood in for by its path.
    folder = Path(str(import_module("qjax.evaluation").__file__)).parent.parent
    code = f"""
import sys, types
sys.modules.update(flax=None, tokenizers=None)
package = sys.modules["qjax"] = types.ModuleType("qjax")
package.__path__ = [{str(folder)!r}]
import qjax.evaluation
"""
    subprocess.run([sys.executable, "-c", code], check=True)
