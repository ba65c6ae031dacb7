"""Ranges and channel statistics against numpy, and in a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qjax.calibration import (
    Range,
    Rows,
    absmax,
    channel_stats,
    histogram,
    init_states,
    minmax,
    moving_average,
    observe_program,
)
from qjax.core import int8, integer, uint8
from qjax.program import trace

UNSIGNED = integer(8, signed=False, symmetric=True)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(observer, *calls):
    update = jax.jit(observer.update)
    calls = [Rows(jnp.asarray(x, jnp.float32)) for x in calls]
    state = observer.init(calls[0].x.shape[0], calls[0].x.shape[2])
    for rows in calls:
        state = update(state, rows)
    return state


def ends(observer, state, spec):
    return [v.tolist() for v in observer.range(state, spec)]


def test_the_smallest_and_the_largest_value():
    state = run(minmax(), normal(2, 5, 3), 3 * normal(2, 4, 3, seed=1))
    whole = np.concatenate([normal(2, 5, 3), 3 * normal(2, 4, 3, seed=1)], axis=1)
    np.testing.assert_array_equal(state.lo, whole.min((1, 2)))
    np.testing.assert_array_equal(state.hi, whole.max((1, 2)))
    assert state.count.tolist() == [9, 9]


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (int8(), [[-6.0, -3.0, -7.0], [6.0, 3.0, 7.0]]),
        (uint8(), [[-6.0, 0.0, -7.0], [5.0, 3.0, 0.0]]),
        (UNSIGNED, [[0.0] * 3, [5.0, 3.0, 0.0]]),
    ],
)
def test_the_sides_of_a_range(spec, wanted):
    """Both signs, none below zero, none above."""
    state = run(minmax(), [[[-6.0, 5.0]], [[2.0, 3.0]], [[-7.0, -1.0]]])
    assert ends(minmax(), state, spec) == wanted


def test_absmax_ignores_the_sign():
    state = run(absmax(), [[[-6.0, 5.0]], [[2.0, 3.0]]])
    assert ends(absmax(), state, int8()) == ends(absmax(), state, uint8()) == [[-6.0, -3.0], [6.0, 3.0]]
    assert ends(absmax(), state, UNSIGNED) == [[0.0, 0.0], [6.0, 3.0]]


def test_a_moving_average_is_its_formula():
    calls = [normal(1, 6, 4, seed=i) for i in range(5)]
    lo, hi = calls[0].min(), calls[0].max()
    for x in calls[1:]:
        lo, hi = 0.9 * lo + 0.1 * x.min(), 0.9 * hi + 0.1 * x.max()
    state = run(moving_average(0.9), *calls)
    np.testing.assert_allclose([state.lo[0], state.hi[0]], [lo, hi], rtol=1e-6)
    assert state.count.tolist() == [5]
    assert run(moving_average(0.0), *calls).hi.item() == calls[-1].max()


def test_a_moving_average_waits_for_an_expert_that_a_call_does_not_reach():
    observer = moving_average(0.5)
    x = jnp.array([[[2.0], [4.0], [6.0]]])
    state = observer.update(observer.init(2, 1), Rows(x, jnp.array([0, 0, 0]), 2))
    state = observer.update(state, Rows(x, jnp.array([1, 1, 0]), 2))
    assert state.hi.tolist() == [6.0, 4.0] and state.lo.tolist() == [4.0, 2.0] and state.count.tolist() == [2, 1]


def test_moving_averages_merge_by_their_numbers_of_calls():
    a = Range(jnp.float32([-1.0]), jnp.float32([1.0]), jnp.int32([3]))
    b = Range(jnp.float32([-5.0]), jnp.float32([9.0]), jnp.int32([1]))
    merged = moving_average().merge(a, b)
    assert (merged.lo.item(), merged.hi.item(), merged.count.item()) == (-2.0, 3.0, 4)


@pytest.mark.parametrize(
    ("decay", "error"), [(1.0, ValueError), (-0.1, ValueError), (float("nan"), ValueError), ("a", TypeError), (True, TypeError)]
)
def test_a_decay_is_checked(decay, error):
    with pytest.raises(error, match=f"`decay` .*{decay}"):
        moving_average(decay)


def test_channels_against_numpy():
    calls = [normal(2, samples, 5, seed=samples) + 3 for samples in (1, 30)]
    state, whole = run(channel_stats(), *calls), np.concatenate(calls, axis=1)
    np.testing.assert_array_equal(state.absmax, np.abs(whole).max(1))
    np.testing.assert_allclose(state.mean_abs, np.abs(whole).mean(1), rtol=1e-6)
    np.testing.assert_allclose(state.mean, whole.mean(1), rtol=1e-6)
    assert state.count.tolist() == [31, 31]


def test_means_do_not_overflow():
    state = run(channel_stats(), np.full((1, 50, 2), 3e38), np.full((1, 50, 2), 3e38))
    np.testing.assert_allclose(state.mean, 3e38, rtol=1e-5)


def test_no_rows_change_nothing():
    for observer in (minmax(), moving_average(), absmax(), channel_stats(), histogram(64)):
        state = run(observer, normal(2, 5, 3))
        jax.tree.map(np.testing.assert_array_equal, observer.update(state, Rows(jnp.zeros((2, 0, 3)))), state)


@pytest.mark.parametrize("observer", [minmax(), histogram(64)], ids=["minmax", "histogram"])
def test_in_a_program(observer):
    """Layers in a scan, one of them in a loop over time, bfloat16: each sees what numpy says it sees."""

    def fn(params, x):
        def layer(x, w):
            return lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ w) * (i + 1), x), None

        return lax.scan(layer, x, params["w"])[0]

    w, x = jnp.asarray(normal(3, 4, 4), jnp.bfloat16), jnp.asarray(normal(6, 4), jnp.bfloat16)
    program = trace(fn, {"w": w}, x)
    (site,) = program.sites
    states = jax.jit(observe_program(program, {site.key: observer}))(init_states(program, {site.key: observer}), [w, x])
    seen = states[site.key] if isinstance(observer, type(minmax())) else states[site.key].seen
    assert seen.lo.shape == (3, 1) and seen.count.tolist() == [[12]] * 3
    for i in range(3):
        inputs = []
        for turn in range(2):
            inputs.append(np.asarray(x, np.float32))
            x = jnp.tanh(x @ w[i]) * jnp.asarray(turn + 1, x.dtype)
        np.testing.assert_allclose([seen.lo[i, 0], seen.hi[i, 0]], [np.min(inputs), np.max(inputs)], rtol=0.02)
