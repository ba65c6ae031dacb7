"""Streaming Hessians and their factor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.ptq.hessian import factorize, hessian_init, hessian_merge, hessian_update, hessian_value


def samples(n=300, k=24):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((n, k)) * np.exp(rng.standard_normal(k))).astype(np.float32)


def expected(x):
    return 2 / len(x) * np.float64(x).T @ np.float64(x)


def test_a_stream_equals_all_at_once():
    x = samples()
    state = hessian_init(24)
    for start, stop in ((0, 1), (1, 100), (100, 300)):
        state = jax.jit(hessian_update)(state, x[start:stop])
    assert state.count == 300
    np.testing.assert_allclose(hessian_value(state), expected(x), rtol=1e-4, atol=1e-5)


def test_merging_is_seeing_both():
    x = samples()
    a, b = hessian_update(hessian_init(24), x[:50]), hessian_update(hessian_init(24), x[50:])
    np.testing.assert_allclose(hessian_value(hessian_merge(a, b)), expected(x), rtol=1e-4, atol=1e-5)


def test_masked_samples_do_not_count_even_when_not_finite():
    x = samples()
    mask = np.arange(300) % 3 == 0
    dirty = np.where(mask[:, None], x, np.nan)
    state = hessian_update(hessian_init(24), dirty, mask)
    assert state.count == mask.sum()
    np.testing.assert_allclose(hessian_value(state), expected(x[mask]), rtol=1e-4, atol=1e-5)


def test_sixteen_bit_inputs_are_summed_in_float32():
    x = jnp.full((70000, 1), 1.0, jnp.bfloat16)
    assert hessian_update(hessian_init(1), x).total.item() == 70000.0


def test_no_sample_is_zero():
    assert np.all(np.asarray(hessian_value(hessian_init(3))) == 0)


def test_leading_axes_are_refused():
    with pytest.raises(ValueError, match=r"`x` must have the shape \(samples, 3\), got \(2, 4, 3\)"):
        hessian_update(hessian_init(3), jnp.zeros((2, 4, 3)))


def test_factor_rebuilds_the_damped_hessian():
    h = expected(samples()).astype(np.float32)
    mean = np.mean(np.diag(h))
    f = factorize(jnp.asarray(h), jnp.asarray(mean), 0.05, 0.01, 3)
    assert np.all(np.triu(f.coupling) == 0) and f.retries == 0
    r = ((np.asarray(f.coupling, np.float64) + np.eye(24)) * np.asarray(f.pivot, np.float64)[:, None]).T
    np.testing.assert_allclose(r @ r.T, h + 0.05 * mean * np.eye(24), rtol=1e-4, atol=1e-5 * mean)


def test_noise_in_place_of_a_pivot_counts_as_failure():
    # Rank 2 of 24: without damping rounding leaves tiny positive pivots that a plain Cholesky may accept.
    x = samples(2)
    h = expected(x).astype(np.float32)
    f = factorize(jnp.asarray(h), jnp.float32(np.mean(np.diag(h))), 0.0, 0.01, 10)
    assert f.retries >= 1 and f.damping == pytest.approx(0.01 * (2 ** int(f.retries) - 1))
