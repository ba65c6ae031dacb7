"""Divergence against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.evaluation import divergence, token_divergence


def kl_in_float64(p_logits, q_logits):
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in map(np.float64, (p_logits, q_logits)))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3, 2.0, 10.0])
def test_kl_at_every_size_of_change(size):
    rng = np.random.default_rng(0)
    p = rng.normal(0, 2, (40, 500)).astype(np.float32)
    q = (p + rng.normal(0, size, p.shape)).astype(np.float32)
    found, agrees = token_divergence(jnp.asarray(p), jnp.asarray(q))
    np.testing.assert_allclose(found, kl_in_float64(p, q), rtol=2e-3 if size < 1e-3 else 2e-5)
    np.testing.assert_array_equal(agrees, p.argmax(-1) == q.argmax(-1))


def test_small_divergences_are_not_drowned_by_rounding():
    rng = np.random.default_rng(1)
    p = rng.normal(0, 2, (200, 4096)).astype(np.float32)
    q = p + rng.normal(0, 1e-4, p.shape).astype(np.float32)
    exact = kl_in_float64(p, q)
    found = np.asarray(token_divergence(jnp.asarray(p), jnp.asarray(q))[0])
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    naive = np.asarray(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
    assert np.abs(found - exact).max() < 0.02 * exact.mean()
    assert np.abs(naive - exact).max() > exact.mean()  # what the formula avoids


def test_extremes():
    p = jnp.array([[100.0, 0.0, -jnp.inf], [0.0, 0.0, 0.0], [300.0, 0.0, 0.0]])
    same, agrees = token_divergence(p, p)
    np.testing.assert_array_equal(same, 0.0)
    assert agrees.all()
    far, _ = token_divergence(jnp.array([0.0, 200.0]), jnp.array([200.0, 0.0]))
    assert far == pytest.approx(200.0)
    impossible, _ = token_divergence(jnp.array([0.0, 0.0]), jnp.array([0.0, -jnp.inf]))
    assert np.isinf(impossible)
    slope = jax.grad(lambda q: token_divergence(jnp.array([0.0, 200.0]), q)[0])(jnp.array([200.0, 0.0]))
    np.testing.assert_allclose(slope, [1.0, -1.0], atol=1e-6)


def test_streams_over_batches_and_scores_the_predicted_positions():
    rng = np.random.default_rng(2)
    tables = [jnp.asarray(rng.normal(0, 2, (9, 9)), jnp.float32) for _ in range(2)]
    rows = rng.integers(0, 9, (5, 4))
    seen = []

    def apply(table, tokens):
        seen.append(tokens.shape)
        return table[tokens]

    found = divergence(apply, tables[0], apply, tables[1], rows, batch_size=2)
    expected = kl_in_float64(np.asarray(tables[0])[rows[:, :-1]], np.asarray(tables[1])[rows[:, :-1]])
    np.testing.assert_allclose(found.kl, expected, rtol=1e-5)
    assert found.mean_kl == pytest.approx(expected.mean(), rel=1e-5)
    same = np.asarray(tables[0]).argmax(1)[rows[:, :-1]] == np.asarray(tables[1]).argmax(1)[rows[:, :-1]]
    assert found.top1_agreement == pytest.approx(same.mean())
    assert set(seen) == {(2, 4)}
    self = divergence(apply, tables[0], apply, tables[0], rows)
    assert self.mean_kl == 0.0
    assert self.top1_agreement == 1.0


def test_wrong_arguments_are_named():
    rows = np.zeros((2, 3), int)
    with pytest.raises(ValueError, match="cannot be compared with"):
        divergence(lambda t, x: t[x], jnp.zeros((4, 4)), lambda t, x: t[x], jnp.zeros((4, 5)), rows)
    with pytest.raises(ValueError, match="`apply` must give logits"):
        divergence(lambda t, x: t[x], jnp.zeros((4, 4)), lambda t, x: t[x][0], jnp.zeros((4, 4)), rows)
