"""`quantize` over whole programs: data flow order, the quantized prefix, every kind of loop, bad input."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Policy, Rule
from qjax.core import QTensor
from tests.program.cases import CASES, normal

GPTQ = Policy([Rule("*", weight=qjax.int4(), method=qjax.gptq())])
RTN = Policy([Rule("*", weight=qjax.int4())])
WITHOUT_DATA = Policy([Rule("*", weight=qjax.int4(), method=qjax.rtn(mse=True))])  # what GPTQ then does


def is_q(x):
    return isinstance(x, QTensor)


def output_error(case, params, batches):
    fn = jax.jit(qjax.quantized(case.fn))
    error = 0.0
    for batch in batches:
        got, want = fn(params, *batch), case.fn(case.params, *batch)
        error += sum(float(jnp.sum((g - w) ** 2)) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    return error


def spread(case, count=4):
    """Calibration batches with strongly correlated features, where GPTQ has something to gain."""
    batches = []
    for i in range(count):
        inputs = []
        for x in case.inputs:
            if jnp.issubdtype(x.dtype, jnp.floating):
                fresh = normal(*x.shape, seed=200 + i)
                x = fresh + 2 * jnp.cumsum(fresh, axis=-1)
            inputs.append(x)
        batches.append(tuple(inputs))
    return batches


QUICK = ("scan_remat", "experts", "tied_embedding", "static_index")


@pytest.mark.parametrize(
    "case", [c if c.name in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids=str
)
def test_gptq_runs_through_every_program(case):
    batches = spread(case)
    result = qjax.quantize(case.fn, case.params, GPTQ, calibration=batches)
    expected = {path for path, *_ in case.sites}
    assert {row.path for row in result.report.rows if row.spec} == expected
    rounded = qjax.quantize(case.fn, case.params, RTN, calibration=batches)
    notes = [note for row in result.report.rows for note in row.notes]
    got, plain = output_error(case, result.params, batches), output_error(case, rounded.params, batches)
    # GPTQ is better on its own data, except where it had to round (and said why) or to share statistics between layers.
    if case.name in ("tied_embedding", "shard_map"):
        assert got == plain and all("rounded, not gptq: it" in note for note in notes) and notes
        assert all("take a method that needs no data, such as qjax.rtn(mse=True)" in note for note in notes)
        assert case.name == "shard_map" or "; qjax.graph.untie(fn, params, *inputs) gives its products a copy" in notes[0]
    elif case.name == "loop_index":
        assert any("and all its layers" in note for note in notes)
    elif case.name == "params_in_carry":
        # One weight in front of two saturated tanh: what GPTQ makes small is the error of the products themselves.
        linear = dataclasses.replace(case, fn=lambda p, x: x @ p["w"])
        assert output_error(linear, result.params, batches) < output_error(linear, rounded.params, batches)
    else:
        assert got < plain, (got, plain)


def test_each_site_is_calibrated_on_the_quantized_prefix():
    """The second layer's solution is that of a GPTQ on the activations behind the packed first layer."""
    from qjax.core import int4
    from qjax.ptq.gptq_solver import GPTQOptions, solve

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    params, x = {"a": normal(8, 16), "b": normal(16, 5, seed=1)}, normal(64, 8, seed=2)
    result = qjax.quantize(fn, params, GPTQ, calibration=[x[:32], x[32:]])
    hidden = jax.nn.relu(x @ result.params["a"].dequantize())
    expected = solve(params["b"].T, 2 * hidden.T @ hidden / 64, int4(), GPTQOptions(mse=True))
    assert (np.asarray(result.params["b"].codes_unpacked()) == np.asarray(expected.codes)).mean() >= 0.98
    float_hidden = jax.nn.relu(x @ params["a"])
    other = solve(params["b"].T, 2 * float_hidden.T @ float_hidden / 64, int4(), GPTQOptions(mse=True))
    assert (np.asarray(other.codes) != np.asarray(expected.codes)).any()


def test_scanned_layers_get_the_codes_of_unrolled_ones():
    """A scan over stacked weights is stepped layer by layer: the same codes as the same model written as a loop."""
    case = next(c for c in CASES if c.name == "scan_remat")
    layers = case.params["layers"]
    unrolled = {str(i): {k: v[i] for k, v in layers.items()} for i in range(3)}

    def loop(p, x):
        ys = []
        for i in range(3):
            ys.append(x.sum())
            x = jnp.tanh(x @ p[str(i)]["kernel"] + p[str(i)]["bias"])
        return x, jnp.stack(ys)

    batches = spread(case)
    policy = Policy([Rule("*kernel", weight=qjax.int3(group_size=4), method=qjax.gptq(act_order=True))])
    stacked = qjax.quantize(case.fn, case.params, policy, calibration=batches).params["layers"]["kernel"]
    separate = qjax.quantize(loop, unrolled, policy, calibration=batches).params
    for i in range(3):
        one = separate[str(i)]["kernel"]
        np.testing.assert_array_equal(stacked.codes[i], one.codes)
        np.testing.assert_array_equal(stacked.perm[i], one.perm)
        np.testing.assert_array_equal(stacked.dequantize()[i], one.dequantize())


def test_repeated_layers_share_their_compilations():
    from qjax.program import trace
    from qjax.program.flatten import flatten
    from qjax.program.segments import Cutter

    def fn(p, x):
        for layer in p:
            x = x + jnp.tanh(x @ layer["a"]) @ layer["b"]
        return x

    params = [{"a": normal(8, 8, seed=i), "b": normal(8, 8, seed=50 + i)} for i in range(6)]
    program = trace(fn, params, normal(4, 8))
    cutter = Cutter(flatten(program, unroll=True), len(program.leaves))
    cuts = [i for i, e in enumerate(cutter.graph.eqns) if e.key in {s.key for s in program.sites}]
    keys = [cutter.segment(a, b).key for a, b in zip([0, *cuts], cuts, strict=False)]
    assert len(keys) == 12 and len(set(keys)) <= 4


def test_an_expert_without_data_is_rounded_and_named():
    case = next(c for c in CASES if c.name == "experts")
    result = qjax.quantize(case.fn, case.params, GPTQ, calibration=[case.inputs])
    rounded = qjax.quantize(case.fn, case.params, WITHOUT_DATA, calibration=[case.inputs])
    row = next(r for r in result.report.rows if r.path == "up")
    assert any("no calibration data but zeros reached it in parts 1" in note for note in row.notes)
    np.testing.assert_array_equal(result.params["up"].dequantize()[1], rounded.params["up"].dequantize()[1])
    assert (result.params["up"].dequantize()[0] != rounded.params["up"].dequantize()[0]).any()
    assert np.isfinite(result.params["down"].dequantize()).all()


def test_batches_of_different_shapes_are_one_data_set():
    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    params, x = {"a": normal(8, 12), "b": normal(12, 5, seed=1)}, normal(10, 8, seed=2)
    whole = qjax.quantize(fn, params, GPTQ, calibration=[x]).params
    parts = qjax.quantize(fn, params, GPTQ, calibration=[x[:7], x[7:]]).params
    for name in params:
        same = np.asarray(whole[name].codes_unpacked()) == np.asarray(parts[name].codes_unpacked())
        assert same.mean() >= 0.98  # sums of outer products in another order


def test_shared_weights_get_one_set_of_statistics_and_say_so():
    case = next(c for c in CASES if c.name == "time_loop")
    result = qjax.quantize(case.fn, case.params, GPTQ, calibration=spread(case))
    notes = {row.path: row.notes for row in result.report.rows}
    assert any("one set of statistics" in note for note in notes["rec"])


def test_methods_mix_in_one_policy():
    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"] @ p["c"]

    params = {"a": normal(8, 16), "b": normal(16, 8), "c": normal(8, 4)}
    policy = Policy(
        [
            Rule("a", weight=qjax.int8()),
            Rule("b", weight=qjax.nf4(group_size=8), method=qjax.gptq()),
            Rule("c", weight=qjax.uint3(), method=qjax.rtn(mse=True)),
        ]
    )
    result = qjax.quantize(fn, params, policy, calibration=[normal(32, 8)])
    assert {r.path: r.method for r in result.report.rows} == {"a": "rtn", "b": "gptq", "c": "rtn(mse)"}
    worse = qjax.quantize(fn, params, Policy([Rule("*", weight=qjax.uint3())]), calibration=[normal(32, 8)])
    errors = [next(r.error for r in report.rows if r.path == "c") for report in (result.report, worse.report)]
    assert errors[0] <= errors[1]


def test_quantize_changes_nothing_it_is_given_and_repeats_itself():
    case = next(c for c in CASES if c.name == "grouped_attention_bf16")
    before = jax.tree.map(np.array, case.params)
    one = qjax.quantize(case.fn, case.params, GPTQ, calibration=spread(case))
    two = qjax.quantize(case.fn, case.params, GPTQ, calibration=spread(case))
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, case.params))
    chex.assert_trees_all_equal(one.params, two.params)


def fn2(p, x):
    return x @ p["w"] + p["b"]


PARAMS2 = {"w": normal(12, 4), "b": jnp.zeros(4)}
INT8 = Policy([Rule("*", weight=qjax.int8())])


@pytest.mark.parametrize(
    ("params", "policy", "calibration", "error", "message"),
    [
        (PARAMS2, INT8, [], ValueError, "`calibration` is empty"),
        (PARAMS2, INT8, normal(2, 12), TypeError, "`calibration` must be a list of batches"),
        (PARAMS2, INT8, None, TypeError, "`calibration` must be a list of batches"),
        (PARAMS2, [Rule("*", weight=qjax.int8())], [normal(2, 12)], TypeError, "`policy` must be a qjax.Policy"),
        (PARAMS2, GPTQ, [jax.ShapeDtypeStruct((2, 12), jnp.float32)], ValueError, "needs data"),
        (
            {"w": PARAMS2["w"].at[1, 1].set(jnp.nan), "b": PARAMS2["b"]},
            INT8,
            [normal(2, 12)],
            ValueError,
            "`w` holds 1 NaN",
        ),
        (
            PARAMS2,
            Policy([Rule("*", weight=qjax.int4(group_size=8))]),
            [normal(2, 12)],
            ValueError,
            "`group_size`=8 does not divide",
        ),
        (
            PARAMS2,
            Policy([Rule("*", weight=qjax.int4(group_size=8), method=qjax.gptq())]),
            [normal(2, 12)],
            ValueError,
            "`group_size`=8 does not divide",
        ),
        (PARAMS2, Policy([Rule("*", weight=qjax.mxfp4())]), [normal(2, 12)], ValueError, r"the blocks of mxfp4\(\), 32 .* give pad=True"),
        (PARAMS2, Policy([Rule("*", weight=qjax.bf16(), method=qjax.gptq())]), [normal(2, 12)], ValueError, "cast"),
    ],
)
def test_bad_input_is_named(params, policy, calibration, error, message):
    with pytest.raises(error, match=message):
        qjax.quantize(fn2, params, policy, calibration)


def test_a_quantized_tree_is_not_quantized_again():
    params = qjax.quantize(fn2, PARAMS2, INT8, [normal(2, 12)]).params
    with pytest.raises(ValueError, match="is quantized already"):
        qjax.quantize(fn2, params, INT8, [normal(2, 12)])


@pytest.mark.parametrize("reach", [1.0, 1e-25, 1e25])
def test_the_error_of_a_row_is_that_of_its_numbers_however_small_or_large(reach):
    """Their squares leave float32."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((24, 6)) * reach, jnp.float32)
    result = qjax.quantize(lambda p, x: x @ p, w, qjax.Policy([qjax.Rule("*", weight=qjax.int4())]), [jnp.ones((2, 24))])
    exact, rounded = np.asarray(w, np.float64), np.asarray(result.params.dequantize(), np.float64)
    want = np.square((exact - rounded) / reach).sum() / np.square(exact / reach).sum()
    np.testing.assert_allclose(result.report.rows[0].error, want, rtol=1e-5)
