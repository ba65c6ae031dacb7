"""The bootstrap against the normal approximation and against its own promise of coverage."""

import numpy as np
import pytest

from qjax.evaluation import paired_bootstrap


def test_half_width_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    a = rng.normal(3, 1, (400, 1))
    b = a + rng.normal(0.02, 0.5, a.shape)
    found = paired_bootstrap(a, b)
    spread = np.std(b - a, ddof=1) / np.sqrt(400)
    assert found.difference == pytest.approx(np.mean(b - a))
    assert found.high - found.difference == pytest.approx(1.96 * spread, rel=0.05)
    assert found.difference - found.low == pytest.approx(1.96 * spread, rel=0.05)


def test_pairing_cancels_what_both_share():
    rng = np.random.default_rng(1)
    a = rng.normal(0, 100, (50, 8))
    found = paired_bootstrap(a, a + 0.01 + rng.normal(0, 0.001, a.shape))
    assert found.low > 0.009
    assert found.excludes_zero
    assert not paired_bootstrap(a, a).excludes_zero


def test_windows_are_drawn_whole():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 1, (60, 1)) * np.ones((1, 50))  # tokens of a window move together
    zero = np.zeros_like(shared)
    by_window = paired_bootstrap(zero, shared)
    by_token = paired_bootstrap(zero.ravel(), shared.ravel())
    ratio = (by_window.high - by_window.low) / (by_token.high - by_token.low)
    assert ratio == pytest.approx(np.sqrt(50), rel=0.1)


def test_coverage():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        b = rng.normal(0.3, 1, 60)
        found = paired_bootstrap(np.zeros(60), b, confidence=0.9, resamples=1000, seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 0.84 < covered / 300 < 0.94


def test_seed_repeats():
    b = np.random.default_rng(4).normal(0, 1, 30)
    zero = np.zeros(30)
    assert paired_bootstrap(zero, b, seed=1) == paired_bootstrap(zero, b, seed=1)
    assert paired_bootstrap(zero, b, seed=1) != paired_bootstrap(zero, b, seed=2)


@pytest.mark.parametrize(
    ("a", "b", "rest", "message"),
    [
        (np.zeros(3), np.zeros(4), {}, "`per_token_b` must be like"),
        (np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), {}, "`per_token_b` must be like"),
        (np.zeros((1, 9)), np.zeros((1, 9)), {}, "`per_token_a` has 1 rows"),
        (np.zeros(3), np.array([0, np.nan, 0]), {}, "`per_token_b` holds values that are not finite"),
        (np.zeros(3), np.zeros(3), {"confidence": 95}, "`confidence` 95"),
    ],
)
def test_wrong_arguments_are_named(a, b, rest, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, **rest)
