"""Memory of long work: live values above a limit go to disk, statistics do not grow with the data, nothing stays behind."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.ptq.streams import Weights
from tests.program.cases import normal

WIDTH, ROWS = 32, 64
VALUE = ROWS * WIDTH * 4  # bytes of one activation of one batch
GPTQ = qjax.Policy([qjax.Rule("*", weight=qjax.int4(), method=qjax.gptq())])


def fn(p, x):
    for layer in p:
        x = x + jnp.tanh(x @ layer["a"]) @ layer["b"]
    return x


PARAMS = [{"a": normal(WIDTH, WIDTH, seed=i), "b": normal(WIDTH, WIDTH, seed=50 + i)} for i in range(2)]


def data(count):
    return [normal(ROWS, WIDTH, seed=100 + i) for i in range(count)]


def activations():
    """Arrays on the device that have the shape of an activation, counted by looking."""
    return sum(x.shape == (ROWS, WIDTH) for x in jax.live_arrays())


def peak_of(count, **options):
    batches, seen = data(count), []
    before = activations()
    result = qjax.quantize(fn, PARAMS, GPTQ, batches, progress=lambda event: seen.append(activations() - before), **options)
    return result, max(seen)


@pytest.fixture(scope="module")
def whole():
    return peak_of(6)


@pytest.mark.parametrize("limit", [0, 5 * VALUE])
def test_live_values_stay_below_the_limit_and_the_result_is_the_same(whole, tmp_path, limit):
    result, peak = peak_of(6, spill=qjax.Spill(limit, tmp_path))
    chex.assert_trees_all_equal(result.params, whole[0].params)
    assert whole[1] >= 6  # each batch has x and tanh(x a) between sites
    assert peak * VALUE <= limit + 2 * VALUE < whole[1] * VALUE  # between sites; one batch may be at work
    memory = result.report.memory
    assert memory["live"] <= limit + 4 * VALUE  # at work: what a batch had and what it gets, two values each
    assert memory["spilled"] > 0 == whole[0].report.memory["spilled"]
    assert list(tmp_path.iterdir()) == []


def test_files_go_after_an_error_too(tmp_path, monkeypatch):
    seen = []

    def failing(*arguments):
        seen.extend(tmp_path.rglob("*"))
        raise ValueError("as it happens")

    bad = [*data(2), jnp.full((ROWS, WIDTH), jnp.nan)]
    with pytest.raises(ValueError, match="batch 2 gives the input of '0/a'"):
        qjax.quantize(fn, PARAMS, GPTQ, bad, spill=qjax.Spill(0, tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Weights, "finish_part", lambda self, task, *rest: failing() if task.leaf.path == "0/b" else None)
    with pytest.raises(ValueError, match="as it happens"):
        qjax.quantize(fn, PARAMS, GPTQ, data(2), spill=qjax.Spill(0, tmp_path))
    assert len(seen) > 2 and list(tmp_path.iterdir()) == []


def test_live_values_of_every_kind_come_back_as_they_were(tmp_path):
    def mixed(p, x, key):
        h = (x @ p["a"]).astype(jnp.bfloat16)
        positive, level = h > 0, (h * 10).astype(jnp.int8)
        noise = jax.random.normal(key, (WIDTH,))
        return (h.astype(jnp.float32) @ p["b"]) * positive + level + noise

    params = {"a": PARAMS[0]["a"], "b": PARAMS[0]["b"]}
    batches = [(x, jax.random.key(i)) for i, x in enumerate(data(2))]
    plain = qjax.quantize(mixed, params, GPTQ, batches)
    spilled = qjax.quantize(mixed, params, GPTQ, batches, spill=qjax.Spill(0, tmp_path))
    chex.assert_trees_all_equal(plain.params, spilled.params)
    assert spilled.report.memory["spilled"] > 0


@pytest.mark.parametrize("limit", [-1, 1.5, True])
def test_the_limit_is_a_number_of_bytes(limit):
    with pytest.raises(ValueError, match="`limit` must be a number of bytes"):
        qjax.Spill(limit)


def test_observation_does_not_grow_with_the_data():
    """All that is alive on the device besides what the caller holds, after the last batch of each pass."""
    policies = {
        "rescale": qjax.Policy([qjax.Rule("*", weight=qjax.int4(), method=qjax.awq(clip=False, rows=16))]),
        "ranges": qjax.Policy([qjax.Rule("*", weight=qjax.int8(), activation=qjax.static(qjax.int8(), qjax.entropy(64, 16)))]),
        "calibrate": GPTQ,
    }
    scaled = {"norm": 1 + jnp.abs(normal(WIDTH)), **PARAMS[0]}
    for phase, policy in policies.items():
        sizes = []
        for count in (2, 5):
            batches, seen = data(count), []
            mine = {id(x) for x in jax.live_arrays()}

            def look(event, phase=phase, seen=seen, mine=mine):
                if event.phase == phase:
                    fresh = [x for x in jax.live_arrays() if id(x) not in mine and x.shape != (ROWS, WIDTH)]
                    seen.append(sum(x.nbytes for x in fresh))

            normed = lambda p, x: jnp.tanh((x * p["norm"]) @ p["a"]) @ p["b"]  # noqa: E731
            qjax.quantize(normed, scaled, policy, batches, progress=look)
            sizes.append(max(seen))
        assert sizes[0] > 0 and abs(sizes[1] - sizes[0]) < 0.1 * sizes[0], (phase, sizes)


def test_live_values_of_a_plan_are_those_counted(whole):
    plan = qjax.plan(fn, PARAMS, GPTQ, data(6), rates=qjax.Rates(1e9, 1e8))
    assert plan.live == 6 * 2 * VALUE  # x, and tanh(x a) or its product
    assert plan.live <= whole[0].report.memory["live"] <= plan.live + 2 * VALUE
    assert plan.statistics == WIDTH * WIDTH * 4 + 4 + 4
    assert np.isfinite(plan.seconds)
