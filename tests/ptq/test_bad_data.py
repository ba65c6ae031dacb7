"""Bad data, for every method alike: what is wrong is named, with batch and site; what can go on goes on and says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import Policy, Rule
from tests.program.cases import normal

D = 8
INT4, W8A8 = {"weight": qjax.int4()}, {"weight": qjax.int8(), "activation": qjax.static(qjax.int8())}
METHODS = {
    "gptq": {**INT4, "method": qjax.gptq(mse=False)},
    "awq": {**INT4, "method": qjax.awq(grid=3)},
    "smoothquant": {**W8A8, "method": qjax.smoothquant()},
    "static": W8A8,
    "entropy": {"weight": qjax.int8(), "activation": qjax.static(qjax.int8(), qjax.entropy(64, 16))},
}
every_method = pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)
every_method_some_slow = pytest.mark.parametrize(
    "how", [how if name in ("gptq", "static") else pytest.param(how, marks=pytest.mark.slow) for name, how in METHODS.items()], ids=METHODS
)


def fn(p, x):
    return jnp.tanh((x * p["norm"]) @ p["a"]) @ p["b"]


PARAMS = {"norm": 1 + jnp.abs(normal(D)), "a": normal(D, D), "b": normal(D, D, seed=1)}


def run(how, data, function=fn, params=PARAMS):
    return qjax.quantize(function, params, Policy([Rule("*", **how)]), data)


def notes(result):
    return {row.path: "; ".join(row.notes) for row in result.report.rows}


@every_method
def test_no_data(how):
    with pytest.raises(ValueError, match="`calibration` is empty: give at least one batch"):
        run(how, [])
    with pytest.raises(TypeError, match=r"`calibration` must be a list of batches, got NoneType: write calibration=\[batch\]"):
        run(how, None)
    with pytest.raises(ValueError, match=r"`calibration` holds shapes, but .* needs data: give batches of numbers"):
        run(how, [jax.ShapeDtypeStruct((4, D), jnp.float32)])
    with pytest.raises(ValueError, match=r"`calibration` batch 1 holds no rows, but .* needs data: leave the batch out"):
        run(how, [normal(4, D), jnp.zeros((0, D))])
    with pytest.raises(ValueError, match=r"`calibration` batch 1 holds no rows"):  # beside an argument that is not of the data
        run(how, [(x, jnp.float32(1.0)) for x in (normal(4, D), jnp.zeros((0, D)))], lambda p, x, scale: fn(p, x * scale))


@every_method
def test_a_batch_that_is_not_finite_is_named_with_its_site(how):
    good = normal(4, D)
    for bad in (jnp.nan, jnp.inf) if how is METHODS["gptq"] else (jnp.nan,):
        with pytest.raises(ValueError, match=r"`calibration` batch 1 gives the input of 'a' \(dot_general\) NaN or infinity; look at"):
            run(how, [good, good.at[2, 3].set(bad), good])


@pytest.mark.parametrize("name", ["gptq", "awq", "static"])
def test_the_site_is_the_first_that_is_not_finite(name):
    middle = lambda p, x: jnp.log(x @ p["a"]) @ p["b"]  # noqa: E731  # finite in, NaN out where a product is negative
    with pytest.raises(ValueError, match="batch 0 gives the input of 'b'"):
        run(METHODS[name], [normal(4, D)], middle, {"a": PARAMS["a"], "b": PARAMS["b"]})


def test_a_shared_weight_names_the_batch_too():
    looped = lambda p, x: lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["a"]), x)  # noqa: E731
    good = normal(4, D)
    with pytest.raises(ValueError, match="batch 1 gives the input of 'a'"):
        run(METHODS["gptq"], [good, good.at[0, 0].set(jnp.nan)], looped, {"a": PARAMS["a"]})


@every_method_some_slow
def test_one_sample_and_a_constant_feature(how):
    one = normal(1, D).at[:, 2].set(0.0).at[:, 5].set(3.0)
    for data in ([one], [one.at[:, 0].set(float(i)) for i in range(3)], [jnp.full((4, D), 2.0)], [jnp.zeros((4, D))]):
        result = run(how, data)
        assert all(np.isfinite(q.dequantize()).all() for q in (result.params["a"], result.params["b"]))
        assert jnp.isfinite(jax.jit(qjax.quantized(fn))(result.params, one)).all()
    if how is METHODS["gptq"]:
        assert "1 dead columns" in notes(run(how, [one]))["a"]


def ragged(p, x, sizes):
    return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x * p["norm"], p["a"], sizes)), p["b"], sizes)


@pytest.mark.parametrize("name", ["gptq", *(pytest.param(n, marks=pytest.mark.slow) for n in ("awq", "smoothquant", "static"))])
def test_an_expert_without_data_is_rounded_and_named(name):
    params = {"norm": PARAMS["norm"], "a": normal(3, D, D), "b": normal(3, D, D, seed=1)}
    result = run(METHODS[name], [(normal(6, D), jnp.asarray([4, 0, 2]))], ragged, params)
    said = notes(result)
    for path in ("a", "b"):
        assert any(f"no calibration data but zeros reached {what}" in said[path] for what in ("it", "its activations")), said
        assert "in parts 1" in said[path], said
    own, spec = result.params["b"].dequantize()[1], METHODS[name]["weight"]
    plain = qjax.quantize(lambda p, x: x @ p, params["b"][1], Policy([Rule("*", weight=spec)]), [normal(2, D)]).params.dequantize()
    np.testing.assert_array_equal(own, plain)


def test_batches_of_other_shapes_are_one_data_set_where_the_program_is_the_same():
    x = normal(12, D)
    whole, cut = run(METHODS["smoothquant"], [x]), run(METHODS["smoothquant"], [x[:5], x[5:]])
    same = np.asarray(whole.params["a"].codes_unpacked()) == np.asarray(cut.params["a"].codes_unpacked())
    assert same.mean() > 0.98


@every_method
def test_a_batch_with_other_sites_is_refused_by_number_and_shape(how):
    def by_length(p, x):  # as if a mask were built for one length only
        x = jnp.sin(x) if x.shape[0] > 4 else x
        return fn(p, x)

    with pytest.raises(ValueError, match=r"`calibration` batch 2 of shapes \(6, 8\) traces to .* than batch 0 of shapes \(4, 8\); give"):
        run(how, [normal(4, D), normal(3, D), normal(6, D)], by_length)


def producers(p, x):
    """One norm in front of two weights that read it, one of them behind a ReLU: both want its scale."""
    h = x * p["norm"]
    return h @ p["a"] + jax.nn.relu(h) @ p["b"]


def test_two_rewrites_on_one_producer_are_refused_by_name():
    policy = Policy([Rule("a", **METHODS["awq"]), Rule("b", **METHODS["smoothquant"])])
    x = normal(32, D) * jnp.asarray([30.0] + [1.0] * (D - 1))
    result = qjax.quantize(producers, PARAMS, policy, [x])
    said = notes(result)
    assert "awq: its input is rescaled" in said["a"], said
    assert "smoothquant without rescaling: its input is already rescaled with that of a" in said["b"], said


@pytest.mark.slow
def test_two_rewrites_on_one_weight_are_composed_and_said():
    def gated(p, x):
        h = x * p["norm"]
        return (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    params = {"norm": PARAMS["norm"], "gate": normal(D, 12), "up": normal(D, 12, seed=1), "down": normal(12, D, seed=2)}
    policy = Policy([Rule("down", weight=qjax.int8(), method=qjax.smoothquant()), Rule("*", weight=qjax.int8(), method=qjax.awq(grid=3))])
    data = [normal(32, D) * jnp.asarray([30.0] + [1.0] * (D - 1))]
    result = qjax.quantize(gated, params, policy, data)
    said = notes(result)
    assert "awq: its input is rescaled" in said["up"] and "smoothquant: changed in exchange for an input" in said["up"], said
    want, got = gated(params, data[0]), jax.jit(qjax.quantized(gated))(result.params, data[0])
    assert jnp.linalg.norm(got - want) < 0.05 * jnp.linalg.norm(want)


@pytest.mark.parametrize("method", [None, qjax.gptq(), qjax.awq(), qjax.smoothquant()], ids=["rtn", "gptq", "awq", "smoothquant"])
def test_groups_that_do_not_divide_are_all_named_before_any_work(method):
    params = {"norm": PARAMS["norm"], "a": normal(D, 12), "b": normal(12, D, seed=1)}
    events = []
    policy = Policy([Rule("*", weight=qjax.int4(group_size=5), method=method)])
    message = "`group_size`=5 does not divide the 8 contracted values of `a`, nor those of 1 more of 12: take 4, the nearest size that"
    with pytest.raises(ValueError, match=message):
        qjax.quantize(fn, params, policy, [normal(4, D)], progress=events.append)
    assert events == []


def test_padding_that_makes_a_weight_larger_is_said():
    policy = Policy([Rule("*", weight=qjax.int8(group_size=64, pad=True))])
    said = notes(qjax.quantize(fn, PARAMS, policy, [normal(4, D)]))
    assert said["a"] == "packed it takes 544 bytes, no fewer than the 256 before, for its 8 contracted values are padded to 64"


def test_a_site_fed_with_zeros_only_is_not_said_to_have_had_no_data():
    for name in ("gptq", "static"):
        said = notes(run(METHODS[name], [jnp.zeros((40, D))]))["a"]
        assert "no calibration data but zeros reached" in said and "of the others" not in said, said


def test_gptq_says_when_there_are_fewer_rows_than_columns():
    assert f"1 row for {D} columns: the Hessian is not of full rank" in notes(run(METHODS["gptq"], [normal(1, D)]))["a"]
    assert "full rank" not in notes(run(METHODS["gptq"], [normal(D, D)]))["a"]
