"""Static ranges: found by data flow, stored with the weight, saved with the checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from tests.parameters import every_other
from tests.program.cases import CASES, normal

CANNOT_BE_SEEN = {"shard_map": "split over devices", "while_loops": "condition of a loop"}


def star(activation, weight=None):
    return qjax.Policy([qjax.Rule("*", weight=weight or qjax.int8(), activation=activation)])


def range_of(q, part=()):
    spec = q.act.spec
    scale = np.asarray(q.act_scale)[part].item()
    zero = 0 if q.act_zero_point is None else np.asarray(q.act_zero_point)[part].item()
    half = 0.5 if spec.symmetric and spec.scale_rule == "half" else 0
    return (spec.qmin - zero) * scale, (spec.qmax + half - zero) * scale


@pytest.mark.parametrize("case", every_other(CASES), ids=str)
def test_every_program_with_static_ranges(case):
    policy = star(qjax.static(qjax.int8()))
    if case.name in CANNOT_BE_SEEN:
        with pytest.raises(ValueError, match=CANNOT_BE_SEEN[case.name]):
            qjax.quantize(case.fn, case.params, policy, calibration=[case.inputs])
        return
    result = qjax.quantize(case.fn, case.params, policy, calibration=[case.inputs, case.inputs])
    got, want = jax.jit(qjax.quantized(case.fn))(result.params, *case.inputs), case.fn(case.params, *case.inputs)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(g - w) <= 0.06 * np.linalg.norm(w)


def test_the_range_is_that_of_the_data_behind_the_quantized_prefix():
    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    params, batches = {"a": normal(8, 16), "b": normal(16, 5, seed=1)}, [normal(32, 8, seed=i) for i in (2, 3)]
    packed = qjax.quantize(fn, params, star(qjax.static(qjax.uint8())), calibration=batches).params
    hidden = [jax.nn.relu(x @ packed["a"].dequantize()) for x in batches]
    lo, hi = range_of(packed["b"])
    assert lo == 0.0 and hi == pytest.approx(max(float(h.max()) for h in hidden), rel=1e-5)
    lo, hi = range_of(packed["a"])
    step = (hi - lo) / 255
    assert lo == pytest.approx(min(float(x.min()) for x in batches), abs=step)
    assert hi == pytest.approx(max(float(x.max()) for x in batches), abs=step)


def test_every_layer_of_a_scan_has_its_own_range_and_the_model_runs():
    def scan(p, x):
        return lax.scan(lambda x, w: (4 * jnp.tanh(x @ w), None), x, p["w"])[0]

    def loop(p, x):
        for i in range(3):
            x = 4 * jnp.tanh(x @ p["w"][i])
        return x

    params, x = {"w": 0.3 * normal(3, 8, 8)}, normal(16, 8, seed=1)
    found = [qjax.quantize(f, params, star(qjax.static(qjax.int8())), calibration=[x]).params["w"] for f in (scan, loop)]
    assert found[0].act_scale.shape == (3, 1, 1) and len(np.unique(found[0].act_scale)) == 3
    np.testing.assert_allclose(found[0].act_scale, found[1].act_scale, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(qjax.quantized(scan))({"w": found[0]}, x), jax.jit(qjax.quantized(loop))({"w": found[0]}, x), rtol=1e-5, atol=1e-5
    )


OBSERVERS = [qjax.minmax(), qjax.absmax(), qjax.moving_average(), qjax.percentile(99.0), qjax.entropy(), qjax.mse()]


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
def test_observers_through_the_checkpoint(observer, tmp_path):
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    x = normal(512, 8, seed=1)
    x = x.at[0, 0].set(100.0)
    result = qjax.quantize(fn, {"w": normal(8, 3)}, star(qjax.static(qjax.int8(), observer=observer)), calibration=[x[:256], x[256:]])
    hi = range_of(result.params["w"])[1]
    clips = type(observer).__name__ in ("Percentile", "Entropy", "Mse", "MovingAverage")
    assert (hi < 99.5) == clips  # the moving average is 1 % of the way from 100 to the extreme of the second batch
    qjax.save(tmp_path / "ckpt", result)
    loaded = qjax.load(tmp_path / "ckpt")
    assert loaded.policy == result.policy
    np.testing.assert_array_equal(jax.jit(qjax.quantized(fn))(loaded.params, x), jax.jit(qjax.quantized(fn))(result.params, x))


def test_experts_without_data_take_the_range_of_the_others_and_are_named():
    def fn(p, x):
        return lax.ragged_dot(x, p["w"], jnp.array([5, 0, 7], jnp.int32))

    result = qjax.quantize(fn, {"w": normal(3, 8, 8)}, star(qjax.static(qjax.int8())), calibration=[normal(12, 8)])
    scale = np.asarray(result.params["w"].act_scale).ravel()
    assert scale[1] == max(scale[0], scale[2]) and np.isfinite(scale).all()
    assert any("no calibration data but zeros reached its activations in parts 1" in note for note in result.report.rows[0].notes)


def test_data_that_is_not_finite_names_the_batch_and_the_site():
    x, fn = normal(4, 8), lambda p, x: x @ p["w"]
    batches = [x, x.at[0, 0].set(jnp.inf)]
    with pytest.raises(ValueError, match=r"`calibration` batch 1 gives the input of 'w' \(dot_general\) NaN or infinity"):
        qjax.quantize(fn, {"w": normal(8, 3)}, star(qjax.static(qjax.int8())), calibration=batches)


def test_shapes_are_not_enough_for_static_ranges():
    with pytest.raises(ValueError, match=r"`calibration` holds shapes, but the static range of 'w' needs data"):
        shapes = [jax.ShapeDtypeStruct((4, 8), jnp.float32)]
        qjax.quantize(lambda p, x: x @ p["w"], {"w": normal(8, 3)}, star(qjax.static(qjax.int8())), calibration=shapes)
