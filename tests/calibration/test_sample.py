"""A sample of rows: fair, bounded, and the same however the data is cut."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibration import Rows, sample_rows


def data(rows, k=3):
    return jnp.arange(rows * k, dtype=jnp.float32).reshape(1, rows, k)


@pytest.mark.parametrize("cut", [1, 7, 50, 99])
def test_the_cut_of_the_data_changes_no_bit(cut):
    observer, x = sample_rows(16), data(100)
    whole = observer.update(observer.init(1, 3), Rows(x))
    state = observer.init(1, 3)
    for first in range(0, 100, cut):
        state = observer.update(state, Rows(x[:, first : first + cut]))
    chex.assert_trees_all_equal(state, whole)
    assert whole.count.tolist() == [100] and bool(whole.held.all())
    np.testing.assert_array_equal(whole.x[0], x[0][whole.index[0]])


def test_every_row_is_as_likely_as_another():
    observer = sample_rows(256)
    state = observer.update(observer.init(1, 3), Rows(data(4096)))
    index = np.asarray(state.index[0])
    assert len(set(index)) == 256
    quarters = np.histogram(index, bins=4, range=(0, 4096))[0]
    assert (abs(quarters - 64) < 4 * np.sqrt(64 * 0.75)).all(), quarters


def test_experts_keep_their_own_rows():
    owner = jnp.asarray(np.random.default_rng(0).integers(-1, 3, 200), jnp.int32)
    observer, x = sample_rows(8), data(200)
    state = observer.update(observer.init(3, 3), Rows(x, owner, 3))
    for expert in range(3):
        mine = x[0][np.asarray(owner) == expert]
        assert int(state.count[expert]) == len(mine)
        np.testing.assert_array_equal(state.x[expert], mine[state.index[expert]])


def test_merged_samples_hold_rows_of_both():
    observer = sample_rows(32)
    a, b = (observer.update(observer.init(1, 3), Rows(data(500) + 10_000 * i)) for i in range(2))
    both = observer.merge(a, b)
    assert both.count.tolist() == [1000] and len(set(np.asarray(both.x[0, :, 0]))) == 32
    assert 8 <= int((both.x[0, :, 0] >= 10_000).sum()) <= 24


def test_a_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        sample_rows(0)
