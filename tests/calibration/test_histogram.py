"""The histogram is that of one pass with the final width, to the bit, whatever the cut, the order and the magnitudes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.calibration import Bins, Rows, histogram
from qjax.calibration.histogram import add, as_float, counts, widths

N = 64
OBSERVER = histogram(N)
SMALLEST = np.finfo(np.float32).tiny
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def one_pass(x, per_side=N):
    """(counts (2, N), width) in float64 from all values at once."""
    x = np.asarray(x, np.float64).ravel()
    largest = np.abs(x).max()
    width = max(2.0 ** np.frexp(largest)[1] / per_side if largest else 0, 2.0**-126)
    place = np.floor(np.abs(x) / width).astype(int)
    return np.stack([np.bincount(place[side], minlength=per_side) for side in (x < 0, x >= 0)]), width


def feed(observer, *calls):
    state = observer.init(1, 1)
    for x in calls:
        state = observer.update(state, Rows(jnp.asarray(x, jnp.float32).reshape(1, -1, 1)))
    return state


def in_calls(values, cuts, size=24):
    """The values in calls of a fixed size, filled up with rows of nobody."""
    state = OBSERVER.init(1, 1)
    for part in np.split(np.asarray(values, np.float32), np.sort(cuts)):
        x = np.full((1, size, 1), np.nan, np.float32)
        x[0, : len(part), 0] = part
        state = OBSERVER.update(state, Rows(jnp.asarray(x), jnp.where(jnp.arange(size) < len(part), 0, -1), 1))
    return state


def assert_is(state, x):
    wanted, width = one_pass(x, state.low.shape[2])
    np.testing.assert_array_equal(counts(state)[0], wanted)
    assert widths(state).item() == width
    assert (state.seen.lo.item(), state.seen.hi.item(), state.seen.count.item()) == (np.min(x), np.max(x), np.size(x))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_cut_and_any_order(data):
    magnitudes = st.sampled_from([1e-37, 1e-20, 1.0, 3.0, 1e4, 1e38])
    values = data.draw(
        st.lists(
            FINITE | st.builds(np.float32.__mul__, st.floats(-1, 1, width=32).map(np.float32), magnitudes.map(np.float32)),
            min_size=1,
            max_size=24,
        )
    )
    values = [0.0 if abs(v) < SMALLEST else float(v) for v in values]
    cuts = data.draw(st.lists(st.integers(0, len(values)), min_size=3, max_size=3))
    whole, cut = in_calls(values, []), in_calls(values, cuts)
    chex.assert_trees_all_equal(cut, whole)
    chex.assert_trees_all_equal(in_calls(data.draw(st.permutations(values)), cuts), whole)
    first, second = (in_calls(part, []) for part in (values[: cuts[0]], values[cuts[0] :]))
    chex.assert_trees_all_equal(OBSERVER.merge(first, second), whole)
    assert_is(whole, np.float32(values))


def test_a_range_that_grows_over_many_orders_of_magnitude():
    x = np.random.default_rng(0).standard_normal((40, 50)) * np.logspace(-35, 37, 40)[:, None]
    x = x.astype(np.float32)
    assert_is(feed(OBSERVER, *x), x)
    assert_is(feed(OBSERVER, *x[::-1]), x)
    assert_is(feed(histogram(8192), *x[15:20]), x[15:20])


@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, 63.0, 64.0, -(2.0**-126), np.finfo(np.float32).max, np.finfo(np.float32).min])
def test_a_constant(value):
    assert_is(feed(OBSERVER, [value] * 3, [value] * 2), np.full(5, value, np.float32))


def test_zeros_before_between_and_alone():
    assert_is(feed(OBSERVER, np.zeros(5), np.zeros(3)), np.zeros(8))
    assert_is(feed(OBSERVER, np.zeros(5), [1e30, -1.0], np.zeros(3)), np.float32([0.0] * 8 + [1e30, -1.0]))


def test_subnormal_values_are_counted_near_zero():
    state = feed(OBSERVER, np.float32([1e-40, -1e-42, 1e-45, 0.0]))
    assert counts(state)[0, :, 0].sum() == 4 and widths(state).item() == SMALLEST
    state = OBSERVER.update(state, Rows(jnp.full((1, 2, 1), 1.0)))
    assert counts(state)[0, :, 0].sum() == 4 and counts(state)[0, 1, 32] == 2


def test_edges_belong_to_the_bin_beyond_them_on_both_sides():
    x = np.float32([1.0, 2.0, 63.0, 0.0])
    state = counts(feed(OBSERVER, x, -x[:3]))[0]
    np.testing.assert_array_equal(np.flatnonzero(state[1]), [0, 1, 2, 63])
    np.testing.assert_array_equal(state[0, 1:], state[1, 1:])


def test_values_that_are_not_finite_are_in_no_bin_but_in_the_range():
    state = feed(OBSERVER, [1.0, np.inf, -3.0])
    assert counts(state).sum() == 2 and widths(state).item() == 2.0**-4
    assert state.seen.lo.item() == -3.0 and state.seen.hi.item() == np.inf and state.seen.count.item() == 3
    assert np.isnan(feed(OBSERVER, [1.0, np.nan], [2.0]).seen.lo.item())


def test_counts_beyond_32_bits():
    low, high = add((jnp.uint32([2**32 - 1, 5]), jnp.uint32([1, 0])), (jnp.uint32([2, 6]), jnp.uint32([0, 3])))
    assert low.tolist() == [1, 11] and high.tolist() == [2, 3]
    assert as_float(low, high).tolist() == [2.0**33, 3 * 2.0**32]
    state = feed(OBSERVER, [1.0, 2.0, 3.0, 63.0])
    full = state._replace(low=jnp.where(state.low > 0, jnp.uint32(2**32 - 1), 0))
    wider = OBSERVER.update(full, Rows(jnp.array([[[64.0]]])))
    assert wider.low[0, 1, :2].tolist() == [2**32 - 1, 2**32 - 2] and wider.high[0, 1, :2].tolist() == [0, 1]
    twice = OBSERVER.merge(full, full)
    assert twice.low[0, 1, :2].tolist() == [0, 2**32 - 2] and twice.high[0, 1, :2].tolist() == [0, 1]


def test_each_part_has_its_own_width():
    x = np.float32([[[1.0], [0.5]], [[1e9], [3.0]], [[0.0], [0.0]]])
    state = OBSERVER.update(OBSERVER.init(3, 1), Rows(jnp.asarray(x)))
    state = OBSERVER.update(state, Rows(jnp.asarray(x[::-1].copy())))
    for i in range(3):
        part: Bins = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], state)
        assert_is(part, np.concatenate([x[i], x[2 - i]]))


@pytest.mark.parametrize("shared", [False, True])
def test_rows_spread_over_devices(shared):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 40, 3)), jnp.float32)
    owner = jnp.asarray(np.arange(40) % 3 - 1, jnp.int32) if shared else None
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()[:2]), ("d",)), PartitionSpec(None, "d"))
    update = jax.jit(lambda state, x: OBSERVER.update(state, Rows(x, owner, 2 if shared else 0)))
    start = OBSERVER.init(2 if shared else 1, 3)
    chex.assert_trees_all_equal(update(start, jax.device_put(x, sharding)), update(start, x))


@pytest.mark.parametrize(
    ("per_side", "error"), [(100, ValueError), (32, ValueError), (2**21, ValueError), (64.0, TypeError), (True, TypeError)]
)
def test_the_number_of_bins_is_checked(per_side, error):
    with pytest.raises(error, match=f"`per_side` .*{per_side}"):
        histogram(per_side)


def test_too_many_bins_for_a_stack():
    with pytest.raises(ValueError, match=r"`per_side` of 1048576 is too many for a stack of 1024"):
        jax.eval_shape(lambda: histogram(2**20).init(1024, 1))
