"""What every observer promises, whatever it remembers: one suite, all observers pass it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibration import (
    AllFinite,
    ColumnPower,
    MovingAverage,
    OutlierColumns,
    Rows,
    SampleRows,
    SecondMoment,
    absmax,
    channel_stats,
    entropy,
    feature_stats,
    histogram,
    minmax,
    moving_average,
    mse,
    outlier_columns,
    percentile,
    sample_rows,
)
from qjax.core import int8, integer, uint4

STACK, K = 3, 7
RANGES = [minmax(), moving_average(), absmax(), percentile(99), entropy(64, 16), mse(4)]
STATISTICS = [
    SecondMoment(), ColumnPower(), AllFinite(), channel_stats(), feature_stats(), histogram(64), sample_rows(600), outlier_columns(8.0, 2),
]  # fmt: skip
OBSERVERS = [*STATISTICS, *RANGES]
# An average over calls and a count of calls know where a call ends, the first also which came first, a sample which row is which; they
# are tested by themselves.
BY_CALL = (MovingAverage, SampleRows, OutlierColumns)
every_observer = pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
every_range = pytest.mark.parametrize("observer", RANGES, ids=lambda o: type(o).__name__)
every_observer_of_data = pytest.mark.parametrize(
    "observer", [o for o in OBSERVERS if not isinstance(o, BY_CALL)], ids=lambda o: type(o).__name__
)
SPECS = {"symmetric": int8(), "asymmetric": uint4(), "unsigned symmetric": integer(8, signed=False, symmetric=True)}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def rows(samples=12, seed=0, stack=STACK):
    x = np.random.default_rng(seed).standard_normal((stack, samples, K))
    return Rows(jnp.asarray(x * np.arange(1, K + 1), jnp.float32))


def owned(samples=12, seed=0):
    """Rows that experts share; the last one belongs to nobody and holds what must not be read."""
    owner = np.random.default_rng(seed).integers(0, STACK, samples)
    owner[-1] = -1
    x = np.array(rows(samples, seed, stack=1).x)
    x[0, -1] = np.nan
    return Rows(jnp.asarray(x), jnp.asarray(owner, jnp.int32), STACK)


def seen(observer, *batches):
    state = observer.init(STACK, K)
    for batch in batches:
        state = observer.update(state, batch)
    return state


def assert_close(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)


@every_observer
def test_it_is_a_value(observer):
    assert hash(observer) == hash(type(observer)(**vars(observer))) and observer == type(observer)(**vars(observer))


@every_observer
def test_the_state_is_arrays_whose_size_does_not_depend_on_the_data(observer):
    state = observer.init(STACK, K)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, seen(observer, rows(2)), seen(observer, rows(500)))
    assert all(leaf.shape[0] == STACK for leaf in jax.tree.leaves(state))


@every_observer
@pytest.mark.parametrize("data", [rows, owned])
def test_jit_equals_eager(observer, data):
    experts = data().experts
    update = jax.jit(lambda state, x, owner: observer.update(state, Rows(x, owner, experts)))
    assert_close(update(observer.init(STACK, K), data().x, data().owner), seen(observer, data()))


@every_observer
@pytest.mark.parametrize("data", [rows, owned])
def test_scan_over_batches_equals_a_loop(observer, data):
    batches = [data(seed=i) for i in range(4)]
    xs = jnp.stack([b.x for b in batches])
    owners = None if batches[0].owner is None else jnp.stack([b.owner for b in batches])

    def step(state, batch):
        return observer.update(state, Rows(*batch, batches[0].experts)), None

    assert_close(jax.lax.scan(step, observer.init(STACK, K), (xs, owners))[0], seen(observer, *batches))


@every_observer_of_data
@pytest.mark.parametrize("data", [rows, owned])
def test_merging_is_seeing_both_in_any_order(observer, data):
    parts = [data(5 + i, i) for i in range(3)]
    a, b, c = (seen(observer, part) for part in parts)
    whole = seen(observer, *parts)
    assert_close(observer.merge(observer.merge(a, b), c), whole)
    assert_close(observer.merge(a, observer.merge(c, b)), whole)
    assert_close(observer.merge(whole, observer.init(STACK, K)), whole)


@every_observer
@pytest.mark.parametrize("data", [rows, owned])
def test_merging_with_nothing_changes_nothing(observer, data):
    state = seen(observer, data(6, 1), data(6, 2))
    chex.assert_trees_all_equal(observer.merge(state, observer.init(STACK, K)), state)
    chex.assert_trees_all_equal(observer.merge(observer.init(STACK, K), state), state)


@every_observer_of_data
def test_one_call_equals_many(observer):
    whole = rows(30)
    assert_close(seen(observer, whole), seen(observer, *(Rows(whole.x[:, i : i + 10]) for i in (0, 10, 20))))


@every_observer
def test_rows_of_nobody_change_nothing(observer):
    state = seen(observer, rows())
    nobody = Rows(jnp.full((1, 4, K), jnp.nan), jnp.full((4,), -1, jnp.int32), STACK)
    chex.assert_trees_all_equal(observer.update(state, nobody), state)


@every_observer
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_data_that_are_not_finite_show_in_the_state_and_stay(observer, bad):
    x = rows().x.at[1, 3, 2].set(bad)
    state = seen(observer, rows(seed=1), Rows(x), rows(seed=2))
    finite = [np.isfinite(np.asarray(leaf)).reshape(STACK, -1).all(1) for leaf in jax.tree.leaves(state)]
    np.testing.assert_array_equal(np.all(finite, axis=0), [True, False, True])


@every_observer
def test_parts_do_not_see_each_other(observer):
    data = rows()
    alone = [observer.update(observer.init(1, K), Rows(data.x[i : i + 1])) for i in range(STACK)]
    assert_close(seen(observer, data), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *alone))


@every_observer
def test_an_expert_sees_its_own_rows(observer):
    data = owned(40)
    for expert in range(STACK):
        mine = data.x[:, np.asarray(data.owner) == expert]
        part = jax.tree.map(lambda leaf, i=expert: leaf[i : i + 1], seen(observer, data))
        assert_close(part, observer.update(observer.init(1, K), Rows(mine)))


@every_observer
def test_vmap_is_a_loop_over_sites(observer):
    states = jax.vmap(lambda _: observer.init(STACK, K))(jnp.arange(4))
    xs = jnp.stack([rows(seed=i).x for i in range(4)])
    many = jax.vmap(lambda state, x: observer.update(state, Rows(x)))(states, xs)
    for i in range(4):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], many), seen(observer, Rows(xs[i])))


@every_observer
def test_one_trace_per_shape(observer):
    update = jax.jit(chex.assert_max_traces(lambda state, x: observer.update(state, Rows(x)), n=1))
    state = observer.init(STACK, K)
    for i in range(3):
        state = update(state, rows(seed=i).x)
    chex.clear_trace_counter()


@every_range
@every_spec
def test_a_range_holds_zero_and_its_sides_are_those_of_the_spec(observer, spec):
    state = seen(observer, rows(30))
    lo, hi = observer.range(state, spec)
    assert lo.shape == hi.shape == (STACK,) and lo.dtype == hi.dtype == jnp.float32
    assert (lo <= 0).all() and (hi > 0).all()
    if spec.symmetric:
        np.testing.assert_array_equal(lo, -hi if spec.signed else jnp.zeros_like(hi))
    assert (hi <= jnp.max(jnp.abs(rows(30).x), axis=(1, 2))).all()


@every_range
@every_spec
def test_no_data_has_no_range(observer, spec):
    data = owned()
    state = seen(observer, data._replace(owner=jnp.where(data.owner == 1, 0, data.owner)))
    lo, hi = observer.range(state, spec)
    np.testing.assert_array_equal((lo == 0) & (hi == 0), [False, True, False])


@every_range
@every_spec
def test_all_zeros_have_no_range(observer, spec):
    lo, hi = observer.range(seen(observer, Rows(jnp.zeros((STACK, 5, K)))), spec)
    assert not lo.any() and not hi.any()


@every_range
@every_spec
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_range_of_data_that_are_not_finite_is_not_finite(observer, spec, bad):
    lo, hi = observer.range(seen(observer, Rows(rows().x.at[1, 3, 2].set(bad))), spec)
    np.testing.assert_array_equal(jnp.isfinite(lo) & jnp.isfinite(hi), [True, False, True])


@every_range
def test_a_range_under_jit_and_vmap(observer, spec=SPECS["asymmetric"]):
    states = [seen(observer, rows(seed=i)) for i in range(3)]
    alone = [jax.jit(lambda state: observer.range(state, spec))(state) for state in states]
    many = jax.vmap(lambda state: observer.range(state, spec))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    for i, state in enumerate(states):
        chex.assert_trees_all_equal(alone[i], observer.range(state, spec))
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], many), alone[i], rtol=1e-6)
