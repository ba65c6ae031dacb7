"""`calibrate`: ranges that do not know how the data was cut, in memory that does not know how much there was; and bad data by name."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.calibration import Range
from tests.program.cases import CASES, normal

BY_NAME = {case.name: case for case in CASES}
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
X = np.asarray(normal(24, 6)) * np.linspace(0.1, 3, 24, dtype=np.float32)[:, None]
OBSERVERS = {"minmax": qjax.minmax(), "percentile": qjax.percentile(95), "entropy": qjax.entropy(256, 32), "mse": qjax.mse(8)}


def matmul(p, x):
    return x @ p["w"]


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def mixture(p, x):
    """Each row goes to the expert of its first feature's integer part."""
    order = jnp.argsort(x[:, 0])
    sizes = jnp.bincount(x[:, 0].astype(jnp.int32), length=p["experts"].shape[0]).astype(jnp.int32)
    return lax.ragged_dot(x[order], p["experts"], sizes)


W, MLP = {"w": normal(6, 3)}, {"a": normal(6, 9), "b": normal(9, 4, seed=1)}


class Stream:
    """Batches that are made when they are read."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return (np.asarray(X[:4] * (1 + i % 3)) for i in range(self.count))


ORDINARY = {("percentile", "symmetric"), ("entropy", "asymmetric")}
SPECS = {"symmetric": qjax.int8(), "asymmetric": qjax.uint8()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(n, k, marks=[] if (n, k) in ORDINARY else pytest.mark.slow) for n in OBSERVERS for k in SPECS],
)
def test_ranges_and_shares_do_not_depend_on_the_cut(name, kind):
    found = [qjax.calibrate(matmul, W, np.split(X, n), observer=OBSERVERS[name], spec=SPECS[kind]).rows[0] for n in (1, 2, 8)]
    fields = ("lo", "hi", "least", "most", "outside", "rows", "constant_features")
    assert len({tuple(getattr(row, field) for field in fields) for row in found}) == 1
    assert (found[1].moved, found[1].drift) == (found[2].moved, found[2].drift)
    assert (found[0].mean, found[0].std) == pytest.approx((found[2].mean, found[2].std), rel=1e-5)
    assert (found[0].mean, found[0].std) == pytest.approx((X.mean(), X.std()), rel=1e-5)


@pytest.mark.parametrize("observer", [qjax.percentile(99), qjax.moving_average(0.9)], ids=lambda observer: type(observer).__name__)
def test_the_range_is_the_one_that_quantize_stores(observer):
    batches = [X, 2 * X, 3 * X, 10 * X]
    act = qjax.static(qjax.int8(), observer=observer)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8(), activation=act)])
    stored = qjax.quantize(matmul, W, policy, calibration=batches).params["w"].act_scale.item()
    (row,) = qjax.calibrate(matmul, W, batches, policy).rows
    assert (row.spec, row.observer) == (str(act.spec), str(act.observer))
    assert stored == pytest.approx(row.hi / 127.5, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", json.loads((GOLDEN / "calibration_thresholds.json").read_text()).items(), ids=lambda case: case[0])
def test_golden_thresholds_through_a_function(case):
    """Within a bin of 2048 of onnxruntime's, though the data come in eight batches; equal sides under a symmetric spec are ours."""
    (data, method, kind), want = case[0].split("/"), case[1]
    observer = qjax.entropy() if method == "entropy" else qjax.percentile(float(method.removeprefix("percentile")))
    with np.load(GOLDEN / "calibration.npz") as arrays:
        x = arrays[data].astype(np.float32)
    batches = [part.reshape(-1, 1) for part in np.split(x, 8)]
    spec = qjax.int8() if kind == "sym" else qjax.uint8()
    (row,) = qjax.calibrate(matmul, {"w": jnp.ones((1, 2))}, batches, observer=observer, spec=spec).rows
    one_bin = 2 * np.abs(x).max() / 2048
    assert abs(row.hi - want[1]) <= one_bin
    assert row.lo == -row.hi if kind == "sym" else abs(row.lo - want[0]) <= one_bin
    assert row.outside == pytest.approx(np.mean((x > row.hi) | (x < row.lo)), abs=2e-4)


@pytest.mark.parametrize("name", ["percentile", pytest.param("minmax", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_batches(name):
    """Neither at the end of the data, when every array that lives is counted, nor in what is returned."""

    def sizes(count):
        alive = []

        def tell(done, total):
            alive.append(sum(x.nbytes for x in jax.live_arrays()))

        found = qjax.calibrate(mlp, MLP, Stream(count), observer=OBSERVERS[name], progress=tell)
        assert len(alive) == count
        return alive[-1], sum(x.nbytes for x in jax.tree.leaves(found.bins))

    assert sizes(4) == sizes(16)


def test_saturation_is_the_share_that_clipping_loses():
    x = np.concatenate([np.linspace(-1, 1, 990), np.full(10, 50.0)]).astype(np.float32).reshape(-1, 1)
    found = {
        name: qjax.calibrate(matmul, {"w": jnp.ones((1, 2))}, [x], observer=OBSERVERS[name]).rows[0] for name in ("minmax", "percentile")
    }
    assert found["minmax"].outside == 0 and found["minmax"].hi == 50
    clipped = np.mean(np.abs(x) >= found["percentile"].hi)
    assert found["percentile"].outside == pytest.approx(clipped, abs=1e-9) and 0.04 < clipped <= 0.05
    (relu,) = qjax.calibrate(matmul, {"w": jnp.ones((1, 2))}, [x], spec=qjax.core.integer(8, signed=False, symmetric=True)).rows
    assert relu.outside == pytest.approx(np.mean(x < 0), abs=1e-9)


def test_a_range_that_moves_from_half_to_half():
    steady = qjax.calibrate(matmul, W, [X, X]).rows[0]
    assert (steady.moved, steady.drift) == (0.0, 0.0)
    moving = qjax.calibrate(matmul, W, [X, X, 3 * X, 3 * X]).rows[0]
    assert moving.moved == pytest.approx(2 / 6, rel=1e-6) and moving.drift > 0.3


def test_stacked_layers_and_experts_are_rows_of_their_own():
    case = BY_NAME["scan_remat"]
    found = qjax.calibrate(case.fn, case.params, [case.inputs] * 2)
    assert [row.name for row in found.rows] == [f"layers/kernel[{i}]" for i in range(3)]
    assert found.rows[0].most == case.inputs[0].max() and found.rows[1].most < 1 and found.rows[0].rows == 10
    assert "layers/kernel (3 parts)" in str(found)


def test_an_expert_without_data_is_named():
    params = {"experts": normal(4, 6, 5)}
    x = np.abs(X)
    batches = []
    for chosen in ((0, 3), (0, 1)):
        x[:, 0] = np.resize(chosen, 24) + 0.5
        batches.append(x.copy())
    found = qjax.calibrate(mixture, params, batches)
    assert found.unseen == ("experts[2]",)
    by_name = {row.name: row for row in found.rows}
    assert [by_name[f"experts[{i}]"].rows for i in range(4)] == [24, 12, 0, 12]
    assert by_name["experts[2]"].notes == ("no data reached it",) and by_name["experts[2]"].moved is None
    assert "in one half only" in by_name["experts[1]"].notes[0] and by_name["experts[1]"].drift is None
    assert by_name["experts[0]"].moved == 0
    assert "experts[2]" in str(found)
    assert json.loads(found.to_json())["unseen"] == ["experts[2]"]


def test_constant_features_are_named():
    x = X.copy()
    x[:, 2], x[:, 4] = 0.75, 0
    (row,) = qjax.calibrate(matmul, W, [x, x]).rows
    assert (row.constant, row.constant_features) == (2, (2, 4))
    x[3, 2] = np.nextafter(np.float32(0.75), 1)
    assert qjax.calibrate(matmul, W, [x]).rows[0].constant_features == (4,)
    wide = qjax.calibrate(matmul, {"w": jnp.ones((20, 2))}, [np.ones((3, 20), np.float32)])
    assert (wide.rows[0].constant, wide.rows[0].constant_features) == (20, tuple(range(8)))
    assert "20 constant" in str(wide)


def test_one_sample_works_and_says_what_it_cannot():
    found = qjax.calibrate(matmul, W, [X[:1]])
    (row,) = found.rows
    assert (row.rows, row.moved, row.drift, row.constant) == (1, None, None, 0) and row.hi == np.abs(X[0]).max()
    assert found.notes == ("one batch: its halves cannot be compared",) and "one batch" in str(found)
    assert json.loads(found.to_json())["rows"][0]["moved"] is None


def test_what_cannot_be_observed_is_noted():
    case = BY_NAME["tied_embedding"]
    found = qjax.calibrate(case.fn, case.params, [case.inputs])
    assert [row.name for row in found.rows] == ["embed"]
    assert found.notes[0].startswith("not observed: embed (gather): it is looked up")


def test_data_that_are_not_finite_name_the_batch_and_the_site():
    bad = X.copy()
    bad[5, 1] = np.nan
    with pytest.raises(ValueError, match=r"`calibration` batch 2 gives the input of 'a' \(dot_general\) NaN or infinity"):
        qjax.calibrate(mlp, MLP, [X, X, bad, X])
    with pytest.raises(ValueError, match="batch 1 gives the input of 'b'"):
        qjax.calibrate(mlp, MLP, [X, X * np.float32(2e37)])


def test_a_batch_without_rows_is_named():
    with pytest.raises(ValueError, match=r"`calibration` batch 1 \(float32\[0, 3\], float32\[\]\) holds no rows: leave the batch out"):
        qjax.calibrate(lambda p, x, s: x * s @ p, normal(3, 2), [(normal(n, 3), jnp.float32(1)) for n in (2, 0)])


def test_batches_of_other_shapes():
    (row,) = qjax.calibrate(matmul, W, [X[:20], X[20:], X.reshape(2, 12, 6)]).rows
    assert row.rows == 48
    with pytest.raises(ValueError, match=r"`calibration` batch 1 \(float32\[24, 5\]\) does not fit the function: .*contracting"):
        qjax.calibrate(matmul, W, [X, X[:, :5]])

    def either(p, x):
        return x @ p["a"] if x.shape[0] > 3 else x @ p["a"] + x[:, :1] @ p["c"]

    with pytest.raises(ValueError, match=r"batch 1 \(float32\[2, 6\]\) makes .*other sites than batch 0 \(float32\[24, 6\]\): c"):
        qjax.calibrate(either, {"a": normal(6, 3), "c": normal(1, 3)}, [X, X[:2]])


@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        ([], {}, ValueError, "`calibration` is empty"),
        (iter([]), {}, ValueError, "`calibration` is empty"),
        (None, {}, TypeError, "`calibration` must be a list of batches, got NoneType"),
        (X, {}, TypeError, "got ndarray: write calibration="),
        ([jax.ShapeDtypeStruct((4, 6), np.float32)], {}, ValueError, "batch 0 .* holds shapes: ranges need numbers"),
        ([X], {"observer": qjax.calibration.SecondMoment()}, TypeError, "`observer` must find ranges"),
        ([X], {"observer": qjax.minmax}, TypeError, "`observer` must find ranges"),
        ([X], {"spec": qjax.nf4()}, TypeError, "`spec` of activations must be integers"),
        ([X], {"where": 3}, TypeError, "`where` must be a pattern"),
        ([X], {"where": "v"}, ValueError, "^`where` 'v' matches no parameter of the program; what can be observed is w$"),
    ],
)
def test_bad_arguments(data, options, error, match):
    with pytest.raises(error, match=match):
        qjax.calibrate(matmul, W, data, **options)


def test_a_generator_is_read_once_and_progress_is_told():
    told = []
    found = qjax.calibrate(matmul, W, (x for x in np.split(X, 4)), progress=lambda *at: told.append(at))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)] and found.rows[0].rows == 24


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(5, (3, 3), dtype=jnp.bfloat16)(x)))
        return nn.Dense(4)(x.mean((1, 2)))


@pytest.mark.slow
def test_a_convolutional_network_in_bf16():
    model, x = Net(), normal(4, 6, 6, 3)
    variables = model.init(jax.random.key(0), x)
    found = qjax.calibrate(model.apply, variables, [x, x + 1])
    assert [row.name for row in found.rows] == ["Conv_0/kernel", "Dense_0/kernel"]
    assert found.rows[0].rows == 2 * 4 * 36 and found.rows[1].least >= 0 and found.rows[0].moved > 0


def test_the_table_and_the_document_say_what_the_rows_say(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    found = qjax.calibrate(mlp, MLP, np.split(X, 2), observer=qjax.percentile(95))
    (line,) = (line for line in str(found).splitlines() if line.startswith("│ b "))
    row = found.rows[1]
    assert f"{row.lo:.4g} .. {row.hi:.4g}" in line and "%" in line
    document = json.loads(found.to_json())
    assert document["rows"][1]["hi"] == row.hi and document["batches"] == 2
    assert isinstance(found.bins["a"].seen, Range)
