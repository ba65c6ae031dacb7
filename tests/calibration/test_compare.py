"""`compare`: a planted shift is found where it is, and nowhere else."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.calibration import Rows, histogram, outside, total_variation
from tests.program.cases import normal

LAYERS = ("one", "two", "three")


def residual(p, x):
    """Three blocks of a norm, two products and a residual."""
    for name in LAYERS:
        layer = p[name]
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * layer["scale"]
        x = x + jnp.tanh(y @ layer["up"]) @ layer["down"]
    return x


def parameters():
    return {
        name: {"scale": jnp.ones(16), "up": 0.5 * normal(16, 24, seed=i), "down": 0.5 * normal(24, 16, seed=i + 10)}
        for i, name in enumerate(LAYERS)
    }


def data(seed, batches=6):
    return [np.asarray(normal(40, 16, seed=100 * seed + i)) for i in range(batches)]


def calibrated(params, batches, **options):
    return qjax.calibrate(residual, params, batches, observer=qjax.percentile(99.9), **options)


@pytest.fixture(scope="module")
def usual():
    return calibrated(parameters(), data(1))


def test_the_same_data_and_other_data_of_the_same_kind_have_not_shifted(usual):
    same = qjax.compare(usual, usual)
    assert same.shifted == () and all(row.distance == 0 and row.stretch == 1 for row in same.rows)
    for seed in (2,):
        other = qjax.compare(usual, calibrated(parameters(), data(seed)))
        assert other.shifted == () and len(other.rows) == 6 and all(row.distance > 0 for row in other.rows)
    few = qjax.compare(usual, calibrated(parameters(), data(4, batches=1)))
    assert few.shifted == () and few.rows[0].floor > other.rows[0].floor


def test_one_norm_scaled_is_found_and_nothing_else(usual):
    """The rows of the weights that read it are divided, so that all other activations are what they were."""
    params = parameters()
    params["two"]["scale"] = params["two"]["scale"] * 3
    params["two"]["up"] = params["two"]["up"] / 3
    found = qjax.compare(usual, calibrated(params, data(2)))
    assert found.shifted == ("two/up",) and found.rows[0].name == "two/up"
    worst = found.rows[0]
    assert worst.distance > 0.3 and worst.stretch == pytest.approx(3, rel=0.1) and worst.outside > 0.1
    assert "of the values lie elsewhere" in worst.verdict and "times as wide" in worst.verdict
    assert all(row.verdict == "within the floor" for row in found.rows[1:])
    document = json.loads(found.to_json())
    assert document["shifted"] == ["two/up"] and document["rows"][0]["distance"] == worst.distance
    assert "1 of 6 inputs have shifted" in str(found)


def test_an_outlier_channel_shows_in_the_width(usual):
    params = parameters()
    params["three"]["scale"] = params["three"]["scale"].at[5].set(100.0)
    params["three"]["up"] = params["three"]["up"].at[5].divide(100.0)
    found = qjax.compare(usual, calibrated(params, data(2)))
    assert found.shifted == ("three/up",) and found.rows[0].stretch > 10 and "times as wide" in found.rows[0].verdict


SEEDS = 100


def alone(seed, rows, scale=1.0, batches=1):
    """A calibration of one site for each of a hundred data sets; made together, as the parts of a stack, to compile once."""
    x = scale * np.random.default_rng(seed).standard_normal((SEEDS, rows, 8)).astype(np.float32)
    product = lambda p, x: jnp.einsum("nri,nio->nro", x, p["w"])  # noqa: E731
    whole = qjax.calibrate(product, {"w": jnp.ones((SEEDS, 8, 4))}, np.split(x, batches, axis=1))
    assert len(whole.rows) == SEEDS
    bins = [{"w": jax.tree.map(lambda x, i=i: x[i : i + 1], whole.bins["w"])} for i in range(SEEDS)]
    rows = [dataclasses.replace(row, name="w") for row in whole.rows]
    return [dataclasses.replace(whole, rows=(row,), bins=own) for row, own in zip(rows, bins, strict=True)]


@pytest.fixture(scope="module")
def references():
    return alone(0, 1024, batches=2)


@pytest.mark.parametrize("rows", [1, 2, 4, 16, 256])
def test_few_rows_of_the_same_kind_have_not_shifted(references, rows):
    found = [qjax.compare(a, b).shifted for a, b in zip(references, alone(rows, rows), strict=True)]
    assert sum(map(bool, found)) <= 3


@pytest.mark.parametrize(("scale", "rows"), [(3.0, 16), (1 / 3, 32)])
def test_few_rows_of_another_width_have(references, scale, rows):
    found = [qjax.compare(a, b).shifted for a, b in zip(references, alone(7, rows, scale), strict=True)]
    assert sum(map(bool, found)) >= 97


@pytest.mark.slow
def test_one_layer_of_a_scan_is_found():
    def scanned(p, x):
        def layer(x, w):
            y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * w["scale"]
            return x + jnp.tanh(y @ w["up"]) @ w["down"], None

        return jax.lax.scan(jax.checkpoint(layer), x, p)[0]

    stacked = jax.tree.map(lambda *w: jnp.stack(w), *parameters().values())
    planted = stacked | {"scale": stacked["scale"].at[1].multiply(0.3), "up": stacked["up"].at[1].divide(0.3)}
    a, b = (qjax.calibrate(scanned, p, data(seed), "up") for p, seed in ((stacked, 1), (planted, 2)))
    assert qjax.compare(a, b).shifted == ("up[1]",)


def test_without_halves_or_data_nothing_is_judged(usual):
    one = calibrated(parameters(), data(1)[:1])
    found = qjax.compare(one, usual)
    assert {row.shifted for row in found.rows} == {None} and "one batch" in found.notes[0]
    assert found.rows[0].distance > 0 and "no floor" in found.rows[0].verdict


@pytest.mark.slow
def test_a_branch_that_one_of_them_does_not_take():
    def branch(p, x):
        return jax.lax.cond(x.mean() > 0, lambda x: x @ p["yes"], lambda x: x @ p["no"], x)

    params = {"yes": normal(4, 3), "no": normal(4, 3)}
    up = [np.abs(np.asarray(normal(8, 4, seed=i))) for i in range(2)]
    a, b = (qjax.calibrate(branch, params, batches) for batches in (up, [-x for x in up]))
    verdicts = {row.name: row.verdict for row in qjax.compare(a, b).rows}
    assert verdicts == {"yes": "no data of the second reached it", "no": "no data of the first reached it"}


def test_what_cannot_be_compared_is_refused(usual):
    with pytest.raises(TypeError, match=r"`b` must be what qjax\.calibrate returns, got dict"):
        qjax.compare(usual, {})
    with pytest.raises(ValueError, match="`b` is of other sites than `a`: one/down, three/down, two/down in one"):
        qjax.compare(usual, dataclasses.replace(usual, rows=tuple(row for row in usual.rows if row.site.endswith("up"))))
    other = dataclasses.replace(usual, rows=tuple(dataclasses.replace(row, observer=str(qjax.minmax())) for row in usual.rows))
    with pytest.raises(ValueError, match=r"`b` has .*MinMax.* at 'one/up', `a` has .*Percentile.*same observer and spec"):
        qjax.compare(usual, other)


def bins(x, per_side=64):
    return histogram(per_side).update(histogram(per_side).init(1, 1), Rows(jnp.asarray(x, jnp.float32).reshape(1, -1, 1)))


VALUES = st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(VALUES, VALUES, st.integers(-20, 20))
def test_the_distance_is_one_and_has_no_unit(x, y, power):
    x, y = np.resize(np.float32(x), 20), np.resize(np.float32(y), 20)
    distance = total_variation(bins(x), bins(y)).item()
    assert 0 <= distance <= 1 + 1e-12 and distance == total_variation(bins(y), bins(x)).item()
    assert total_variation(bins(x), bins(x)).item() == 0
    small = np.abs(np.concatenate([x, y]))
    if (small[small > 0] > 1e-3).all():
        scaled = total_variation(bins(x * np.float32(2.0**power)), bins(y * np.float32(2.0**power))).item()
        assert scaled == pytest.approx(distance, abs=1e-12)


def test_the_distance_of_bins_of_other_widths_and_numbers():
    x, y = np.float32([1, 2, 3, -40]), np.float32([1, 2, 3, -40, 1000, 1000, 1000, 1000])
    for per_side in (64, 8192):
        assert total_variation(bins(x, 8192), bins(np.tile(x, 3), per_side)).item() == 0
    assert total_variation(bins(x, 8192), bins(y, 8192)).item() == pytest.approx(0.5)
    assert np.isnan(total_variation(bins(x), histogram(64).init(1, 1))).all()


@settings(max_examples=40, deadline=None)
@given(VALUES, st.floats(0, 120), st.floats(0, 120))
def test_the_share_outside_is_right_to_one_bin(x, lo, hi):
    x = np.resize(np.float32(x), 20)
    state = bins(x, 1024)
    width = 2.0 ** int(state.exponent[0])
    found = outside(state, np.array([-lo]), np.array([hi])).item()
    assert np.mean((x > hi + width) | (x < -lo - width)) - 1e-9 <= found <= np.mean((x >= hi) | (x <= -lo)) + 1e-9
