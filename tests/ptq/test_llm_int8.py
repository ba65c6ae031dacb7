"""LLM.int8(): the paper's numbers, integers and a product of `capacity` columns in the program, overflow counted."""

import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import Policy, Rule
from qjax.core import QTensor
from tests.program.cases import CASES, normal

FULL = qjax.int8(scale_rule="full")
TYPES = r"\(tensor<([0-9x]*)x(\w+)>, tensor<[0-9x]*x(\w+)>\) -> tensor<[0-9x]*x(\w+)>"
DOT = re.compile(r"dot_general.*contracting_dims = \[([0-9, ]+)\] x .* : " + TYPES)


def quantized(fn, params, inputs, method=None, weight=None, activation=None):
    policy = Policy([Rule("*", weight=weight or qjax.int8(), method=method or qjax.llm_int8(), activation=activation)])
    return qjax.quantize(fn, params, policy, calibration=[inputs])


def planted(x, columns, factor=1.0, seed=5):
    """x with outliers of 8 to 20 times `factor` in some of its last columns, in a third of the rows."""
    if not columns:
        return x
    rng = np.random.default_rng(seed)
    large = rng.uniform(8, 20, (*x.shape[:-1], len(columns))) * rng.choice([-1, 1], (*x.shape[:-1], len(columns)))
    here = rng.random(large.shape) < 0.34
    here.reshape(-1, len(columns))[0] = True
    x = np.array(x, np.float32)
    x[..., columns] = np.where(here, large * factor, x[..., columns])
    return jnp.asarray(x)


def paper(x, w, threshold):
    """Sections 2.1 and 3.2 by NumPy: vector-wise absmax to 127, outlier rows of the int8 weight decoded, as in bitsandbytes."""
    x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    outlier = (np.abs(x) >= threshold).any(0)
    s_w = np.abs(w).max(0) / np.float32(127)
    w8 = np.clip(np.round(w / s_w), -128, 127).astype(np.int32)
    inner = np.where(outlier, 0, x)
    s_x = np.abs(inner).max(1, keepdims=True) / np.float32(127)
    x8 = np.clip(np.round(inner / s_x), -128, 127).astype(np.int32)
    large = x[:, outlier].astype(ml_dtypes.bfloat16).astype(np.float64) @ (w8[outlier] * s_w.astype(np.float64))
    return (x8 @ w8) * s_x.astype(np.float64) * s_w + large


def matmul(p, x):
    return x @ p["w"]


@pytest.mark.parametrize("columns", [[], [3], [2, 9, 30]], ids=len)
def test_it_is_the_algorithm_of_the_paper(columns):
    x, w = planted(0.9 * normal(11, 37), columns), normal(37, 13, seed=1)
    x = jnp.where(jnp.isin(jnp.arange(37), jnp.asarray(columns, int))[None], x, jnp.clip(x, -5, 5))
    result = quantized(matmul, {"w": w}, (x,), weight=FULL, activation=qjax.dynamic(FULL))
    np.testing.assert_allclose(jax.jit(qjax.quantized(matmul))(result.params, x), paper(x, w, 6.0), rtol=2e-5, atol=2e-5)


def test_outliers_exactly_at_the_threshold_and_none_at_all():
    x, w = jnp.zeros((3, 24)).at[1, 5].set(6.0).at[0, 2].set(-5.99), normal(24, 4)
    result = quantized(matmul, {"w": w}, (x,), weight=FULL, activation=qjax.dynamic(FULL))
    assert result.report.rows[0].notes == ("at most 1 outlier column in 1 call of 3 rows: room for 8",)
    run = jax.jit(qjax.quantized(matmul))
    np.testing.assert_allclose(run(result.params, x)[1], 6.0 * result.params["w"].dequantize()[5], rtol=1e-6)
    assert not np.asarray(run(result.params, jnp.zeros((3, 24)))).any()


def heads(p, x):
    return jnp.einsum("bthd,hdm->btm", x, p["w"])


def batched(p, x):
    return jnp.einsum("ecd,edh->ech", x, p["w"])


def scanned(p, x):
    return lax.scan(jax.checkpoint(lambda x, w: (x, x @ w)), x, p["w"])[1]


def ragged(p, x, sizes):
    return lax.ragged_dot(x, p["w"], sizes)


COLUMNS = [1, 17, 22]
X = planted(normal(21, 31, seed=3), COLUMNS)
FORMS = {
    "matmul": (matmul, {"w": normal(31, 13)}, (X,), qjax.int8()),
    "transposed": (lambda p, x: x @ p["w"].T, {"w": normal(13, 31)}, (X,), qjax.int8(per="tensor")),
    "heads": (heads, {"w": normal(5, 7, 13)}, (planted(normal(2, 9, 35), COLUMNS).reshape(2, 9, 5, 7),), qjax.int8()),
    "batched": (batched, {"w": normal(3, 31, 13)}, (planted(normal(3, 9, 31), COLUMNS),), qjax.int8()),
    "scanned_bf16": (scanned, {"w": 0.3 * normal(3, 31, 31, dtype=jnp.bfloat16)}, (X.astype(jnp.bfloat16),), qjax.int8()),
    "ragged": (ragged, {"w": normal(3, 31, 13)}, (X, jnp.asarray([9, 0, 11], jnp.int32)), qjax.int8()),
    "four_bits": (matmul, {"w": normal(31, 13)}, (X,), qjax.int4()),
    "zero_points": (matmul, {"w": normal(31, 13) + 1}, (X,), qjax.uint8()),
    "groups": (matmul, {"w": normal(31, 13) + 1}, (X,), qjax.uint4(group_size=8, pad=True)),
}


SLOW = ("transposed", "four_bits", "zero_points", "groups")


@pytest.mark.parametrize("form", [pytest.param(form, marks=pytest.mark.slow) if form in SLOW else form for form in FORMS])
def test_every_form_multiplies_integers_and_capacity_columns(form):
    """One int8 product into int32, one of `capacity` gathered columns, and no float array of the size of the weight."""
    fn, params, inputs, spec = FORMS[form]
    result = quantized(fn, params, inputs, qjax.llm_int8(capacity=5), spec)
    (row,) = result.report.rows
    assert row.kernel == "xla int8 + 16 bit outliers" and "at most 5 columns" in row.activation
    run = jax.jit(qjax.quantized(fn))
    text = run.lower(result.params, *inputs).as_text()
    integer, floating = [], []
    for dims, shape, *types in DOT.findall(text):
        size = [int(n) for n in shape.split("x")]
        (integer if types == ["i8", "i8", "i32"] else floating).append(([size[int(d)] for d in dims.split(",")], types))
    assert integer and floating == [([5], ["f32", "f32", "f32"])], (integer, floating)
    if form != "groups":  # these are a loop
        assert len(integer) == 1
    whole = math.prod(params["w"].shape[-2 if form in ("batched", "ragged", "scanned_bf16") else 0 :])
    for shape in re.findall(r"tensor<([0-9x]+)x(?:f32|bf16|f16)>", text):
        assert math.prod(int(n) for n in shape.split("x")) not in (whole, math.prod(params["w"].shape)), shape
    got, want = run(result.params, *inputs).astype(jnp.float32), fn(params, *inputs).astype(jnp.float32)
    plain = quantized(fn, params, inputs, qjax.rtn(), spec, qjax.dynamic(qjax.int8()))
    rounded = jax.jit(qjax.quantized(fn))(plain.params, *inputs).astype(jnp.float32)
    weights_only = fn({"w": result.params["w"].dequantize()}, *inputs).astype(jnp.float32)
    assert jnp.linalg.norm(got - weights_only) < 0.5 * jnp.linalg.norm(rounded - weights_only)
    if spec.bits == 8:
        assert jnp.linalg.norm(got - want) < 0.02 * jnp.linalg.norm(want)


def test_on_accelerators_the_columns_are_multiplied_in_bfloat16():
    for dtype, half in ((jnp.float32, "bf16"), (jnp.bfloat16, "bf16"), (jnp.float16, "f16")):
        x, params = X.astype(dtype), {"w": normal(31, 13, dtype=dtype)}
        result = quantized(matmul, params, (x,), qjax.llm_int8(capacity=5))
        lowered = jax.jit(qjax.quantized(matmul)).trace(result.params, x).lower(lowering_platforms=("cuda",)).as_text()
        assert sorted(types for _, _, *types in DOT.findall(lowered)) == [[half, half, "f32"], ["i8", "i8", "i32"]]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [30, 100])
def test_planted_outliers_cost_plain_int8_much_more(factor):
    """Some channels of a norm times the factor, and the rows that read them divided: the same function."""

    def fn(p, x):
        h = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * p["norm"]
        return jnp.tanh(h @ p["up"]) @ p["down"]

    by = jnp.ones(64).at[jnp.asarray([7, 40])].set(factor)
    params = {"norm": by, "up": normal(64, 48) / by[:, None] / 8, "down": normal(48, 16, seed=1) / 7}
    x = normal(40, 64, seed=2)
    plain = Policy([Rule("*", weight=qjax.int8())])
    rounded = fn(jax.tree.map(lambda q: q.dequantize() if isinstance(q, QTensor) else q,
                              qjax.quantize(fn, params, plain, [x]).params, is_leaf=lambda q: isinstance(q, QTensor)), x)  # fmt: skip

    def error(method, activation):
        """Against the function with the int8 weights and float activations."""
        result = quantized(fn, params, (x,), method, activation=activation)
        return float(jnp.linalg.norm(jax.jit(qjax.quantized(fn))(result.params, x) - rounded) / jnp.linalg.norm(rounded))

    mixed = error(qjax.llm_int8(), None)
    assert mixed < 0.02
    assert mixed < 0.25 * error(qjax.rtn(), qjax.dynamic(qjax.int8()))
    assert mixed < 0.1 * error(qjax.rtn(), qjax.static(qjax.int8()))


def test_the_smaller_outliers_beyond_the_capacity_stay_integers():
    x = normal(6, 40).clip(-3, 3).at[0, jnp.asarray([3, 11, 29])].set(jnp.asarray([10.0, -90.0, 30.0]))
    params = {"w": normal(40, 8, seed=1)}
    result = quantized(matmul, params, (x,), qjax.llm_int8(capacity=2), FULL, qjax.dynamic(FULL))
    assert result.report.rows[0].notes == ("1 of 1 call of 6 rows had more than 2 outlier columns, up to 3: the others stay int8",)
    np.testing.assert_allclose(
        jax.jit(qjax.quantized(matmul))(result.params, x), paper(x, params["w"], 20.0), rtol=2e-5, atol=2e-5
    )


def test_overflow_counts_what_numpy_counts():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.clip(x @ w, -20, 20), None), x @ p["first"], p["layers"])[0]

    params = {"first": normal(24, 24), "layers": 0.5 * normal(3, 24, 24, seed=1)}
    data = [planted(normal(9, 24, seed=i), [0, 5], factor=i) for i in range(1, 4)]
    result = quantized(fn, params, (0.01 * data[0],), qjax.llm_int8(capacity=3))
    run = jax.jit(qjax.overflow(fn))
    total = jax.tree.map(lambda *counts: sum(counts), *(run(result.params, x) for x in data))
    first = [int((np.abs(np.asarray(x)) >= 6).any(0).sum()) for x in data]
    assert int(total["first"].calls) == 3 and int(total["first"].over) == sum(n > 3 for n in first)
    assert int(total["layers"].calls) == 9 and 0 < int(total["layers"].over) <= 9
    assert int(run(result.params, data[2])["first"].most) == first[2]
    many = jax.vmap(lambda x: run(result.params, x)["first"].over)(jnp.stack(data))
    assert many.shape == (3,) and int(many.sum()) == int(total["first"].over)
    with pytest.raises(ValueError, match=r"no weight with outlier columns.*llm_int8"):
        qjax.overflow(fn)(params, data[0])


def test_overflow_sees_what_products_on_integers_give():
    def fn(p, x):
        return lax.scan(lambda x, w: (x @ (x.T @ x) @ w, None), x, p)[0]

    params, x = 0.1 * normal(2, 8, 8), planted(normal(9, 8), [2])
    product = qjax.Rule("*:*", activation=qjax.static(qjax.int4()))
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8(), method=qjax.llm_int8(capacity=1)), product])
    result = qjax.quantize(fn, params, policy, calibration=[0.01 * x])
    # The ranges of the small batch cut the products of the large one off, so fewer columns of theirs are outliers.
    seen, unseen = (jax.jit(qjax.overflow(fn, sites=sites))(result.params, x) for sites in (result.sites, None))
    (seen,), (unseen,) = seen.values(), unseen.values()
    assert result.sites and int(seen.calls) == int(unseen.calls) == 2 and int(seen.most) < int(unseen.most)
    with pytest.raises(TypeError, match="`sites` must be the `sites` of a result"):
        qjax.overflow(fn, sites=result)


def test_the_capacity_comes_from_the_data_with_a_margin():
    x = planted(normal(30, 64), list(range(14)))
    result = quantized(matmul, {"w": normal(64, 5)}, (x,))
    assert result.params["w"].act.outliers.capacity == 24  # 14 and a quarter, in eights
    assert result.report.rows[0].notes[0] == "at most 14 outlier columns in 1 call of 30 rows: room for 24"
    assert quantized(matmul, {"w": normal(64, 5)}, (x,), qjax.llm_int8(threshold=1e-3)).params["w"].act.outliers.capacity == 64


def test_the_report_says_what_the_capacity_rests_on():
    """The rows of a call, for more rows have more outlier columns; and when all columns are taken."""

    def said(x, method, fn=matmul, w=None, calibration=None):
        policy = Policy([Rule("*", weight=qjax.int8(), method=method)])
        return qjax.quantize(fn, {"w": normal(9, 5) if w is None else w}, policy, calibration or [x]).report.rows[0].notes

    quiet = normal(4, 9).clip(-1, 1)
    assert said(quiet, qjax.llm_int8()) == ("no outlier columns in 1 call of 4 rows: room for 8",)
    assert said(quiet, qjax.llm_int8(), calibration=[quiet, quiet[:1]])[0].startswith("no outlier columns in 2 calls of 1 to 4 rows")
    whole = "room for all 9 columns, the product in 16 bit is as large as the float one"
    assert said(9 * quiet, qjax.llm_int8(threshold=0.1)) == (f"at most 9 outlier columns in 1 call of 4 rows: {whole}",)
    assert said(quiet, qjax.llm_int8(capacity=12)) == (f"its capacity of 12 is more than its columns: {whole}",)
    experts = said(normal(3, 4, 9).clip(-1, 1), qjax.llm_int8(), batched, normal(3, 9, 5))
    assert experts == ("no outlier columns in 3 calls of 4 rows: room for 8",)


FAST = ("custom_vjp", "tied_embedding")
SOME = (*FAST, "scan_remat", "grouped_attention_bf16", "experts", "conv", "shard_map", "while_loops")


@pytest.mark.parametrize(
    "case", [c if c.name in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES if c.name in SOME], ids=str
)
def test_every_program(case):
    result = quantized(case.fn, case.params, case.inputs, qjax.llm_int8(threshold=1.5, capacity=4))
    got, want = jax.jit(qjax.quantized(case.fn))(result.params, *case.inputs), case.fn(case.params, *case.inputs)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(g - w) <= 0.05 * np.linalg.norm(w)
    for row in result.report.rows:
        if "conv_general_dilated" in row.ops:
            assert row.kernel == "xla int8" and any("windows of a convolution" in note for note in row.notes)


def test_gradient_vmap_and_scan():
    fn = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    params, x = {"w": normal(31, 3) / 5}, X
    result = quantized(fn, params, (x,))
    run = qjax.quantized(fn)
    got = jax.jit(jax.grad(lambda x: jnp.sum(run(result.params, x) ** 2)))(x)
    want = jax.grad(lambda x: jnp.sum(fn({"w": result.params["w"].dequantize()}, x) ** 2))(x)
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
    xs = jnp.stack([x, 2 * x[::-1]])
    want = jnp.stack([jax.jit(run)(result.params, x) for x in xs])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: run(result.params, x)))(xs), want)
    np.testing.assert_array_equal(jax.jit(lambda xs: lax.map(lambda x: run(result.params, x), xs))(xs), want)


def test_training_rounds_what_the_packed_model_rounds():
    policy = Policy([Rule("*", weight=qjax.int8(), method=qjax.llm_int8())])
    params = {"w": normal(31, 13)}
    packed = qjax.quantize(matmul, params, policy, calibration=[X]).params
    trained = qjax.fake_quant(matmul, policy)(params, X)
    np.testing.assert_allclose(trained, jax.jit(qjax.quantized(matmul))(packed, X), rtol=0.02, atol=0.1)  # 16 bit against 32
    small = X.clip(-5, 5)
    np.testing.assert_allclose(
        qjax.fake_quant(matmul, policy)(params, small), jax.jit(qjax.quantized(matmul))(packed, small), rtol=1e-4, atol=1e-4
    )


def test_it_is_saved_and_planned(tmp_path):
    policy = Policy([Rule("*", weight=qjax.int8(), method=qjax.llm_int8(threshold=5.0))])
    params = {"w": normal(31, 13)}
    result = qjax.quantize(matmul, params, policy, calibration=[X])
    qjax.save(tmp_path / "ckpt", result)
    loaded = qjax.load(tmp_path / "ckpt")
    assert loaded.policy == result.policy and loaded.params["w"].act == result.params["w"].act and loaded.report == result.report
    np.testing.assert_array_equal(jax.jit(qjax.quantized(matmul))(loaded.params, X), jax.jit(qjax.quantized(matmul))(result.params, X))
    assert isinstance(result.params["w"], QTensor) and result.params["w"].nbytes == 31 * 13 + 4 * 13  # int8 codes and scales alone
    (row,) = qjax.sites(matmul, policy)(params, X).rows
    assert (row.kernel, row.method) == ("xla int8 + 16 bit outliers", "llm_int8(threshold=5)")
    assert row.activation == 'dynamic(int8(per="token"), 16 bit from 5, calibrated columns)' and row.nbytes == result.report.rows[0].nbytes


def test_data_is_needed_for_a_capacity_alone():
    shapes = [jax.ShapeDtypeStruct((4, 31), jnp.float32)]
    rule = lambda **how: Policy([Rule("*", weight=qjax.int8(), method=qjax.llm_int8(**how))])  # noqa: E731
    assert qjax.quantize(matmul, {"w": normal(31, 13)}, rule(capacity=3), shapes).params["w"].act.outliers.capacity == 3
    with pytest.raises(ValueError, match=r"holds shapes, but llm_int8 of 'w' needs data to find its capacity"):
        qjax.quantize(matmul, {"w": normal(31, 13)}, rule(), shapes)
    with pytest.raises(ValueError, match=r"`calibration` batch 1 gives the input of 'w' \(dot_general\) NaN or infinity"):
        qjax.quantize(matmul, {"w": normal(31, 13)}, rule(), [X, X.at[0, 0].set(jnp.inf)])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: qjax.llm_int8(threshold=0.0), ValueError, "`threshold` must be a positive number"),
        (lambda: qjax.llm_int8(threshold="x"), TypeError, "`threshold` must be a number such as 6.0, got 'x'"),
        (lambda: qjax.llm_int8(capacity="x"), TypeError, "`capacity` must be a whole number of columns or None, got 'x'"),
        (lambda: qjax.llm_int8(capacity=0), ValueError, "`capacity` must be a number of columns"),
        (lambda: Rule("*", weight=qjax.int8(), method=qjax.llm_int8(), activation=qjax.static(qjax.int8())), ValueError,
         r"`activation` static\(int8.* does not go with llm_int8"),
        (lambda: Rule("*", weight=qjax.int8(), method=qjax.llm_int8(), activation=qjax.dynamic(qjax.int8(), per="tensor")), ValueError,
         "a scale for every row"),
        (lambda: Rule("*", weight=qjax.nf4(), method=qjax.llm_int8()), TypeError, "needs a `weight` spec of integers"),
        (lambda: qjax.overflow(3), TypeError, "`fn` must be a function"),
    ],
)  # fmt: skip
def test_refusals(make, error, words):
    with pytest.raises(error, match=words):
        make()
