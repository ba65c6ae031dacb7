"""The factor that GPTQ sweeps with."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.ptq.factorize import factorize


def samples(n=300, k=24):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((n, k)) * np.exp(rng.standard_normal(k))).astype(np.float32)


def expected(x):
    return 2 / len(x) * np.float64(x).T @ np.float64(x)


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
