"""Learned tables: against an exact dynamic program in float64, through views, files, lookups and programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibration import Power
from qjax.core import quantize, views
from qjax.core.learned import learned_decode
from qjax.ptq.method import Problem


def weight(*shape, seed=0, scale=0.05):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


def solved(w, spec, state=None, method=None, **how):
    method = method or qjax.kmeans(weighted=state is not None)
    return method.quantize(Problem(w, spec, (-2,), how.pop("stacked", ()), how.pop("groups", 1), "mlp/w"), state)


def power(columns, seed=3):
    return Power(jnp.asarray(np.random.default_rng(seed).uniform(0.01, 5, (1, columns)) ** 3, jnp.float32), jnp.int32([9]))


def least_error(x, h, count):
    """The least weighted sum of squares of `count` runs of the sorted values, in float64."""
    order = np.argsort(x)
    x, h = np.float64(x)[order], np.float64(h)[order]
    s0, s1, s2 = (np.concatenate([[0], np.cumsum(a)]) for a in (h, h * x, h * x * x))
    i, j = np.meshgrid(range(len(x) + 1), range(len(x) + 1), indexing="ij")
    mass = np.where(i < j, s0[j] - s0[i], 1)
    cost = np.where(i < j, s2[j] - s2[i] - (s1[j] - s1[i]) ** 2 / mass, np.where(i == j, 0, np.inf))
    least = cost[0]
    for _ in range(count - 1):
        least = np.min(least[:, None] + cost, axis=0)
    return least[-1]


@pytest.mark.parametrize("bits", [2, 4])
def test_tables_of_channels_are_the_optimum(bits):
    w, state = weight(96, 5), power(96)
    spec = qjax.learned(bits, level_dtype="float32")
    q = solved(w, spec, state).q
    h = np.asarray(state.mean_square[0])
    got = np.sum(h[:, None] * np.float64(q.dequantize() - w) ** 2, axis=0)
    best = [least_error(np.asarray(w[:, n]), h, 2**bits) for n in range(5)]
    np.testing.assert_allclose(got, best, rtol=1e-3)
    plain = np.sum(h[:, None] * np.float64(solved(w, spec).q.dequantize() - w) ** 2, axis=0)
    assert np.all(got < plain) and got.sum() < 0.9 * plain.sum()
    assert q.levels.shape == (5, 2**bits) and np.all(np.diff(q.levels, axis=-1) > 0) and q.scale is None


def test_one_table_with_the_scales_of_groups():
    w, spec = weight(64, 12), qjax.learned(3, group_size=16)
    q = solved(w, spec, power(64)).q
    assert (q.levels.shape, q.levels.dtype, q.scale.shape) == ((1, 8), jnp.float16, (12, 4))
    assert q.nbytes == 12 * (64 * 3 // 8 + 4 * 4) + 8 * 2
    nearest = np.asarray(w).T.reshape(12, 4, 16, 1) / np.asarray(q.scale)[..., None, None] - np.float32(q.levels[0])
    np.testing.assert_array_equal(np.abs(nearest).argmin(-1).reshape(12, 64), q.codes_unpacked())
    back = np.float32(q.levels[0])[np.asarray(q.codes_unpacked())].reshape(12, 4, 16) * np.asarray(q.scale)[..., None]
    np.testing.assert_array_equal(q.dequantize(), back.reshape(12, 64).T)
    error = {name: float(jnp.sum(jnp.square(a - w))) for name, a in (
        ("learned", solved(w, spec).q.dequantize()), ("int", quantize(w, qjax.int3(group_size=16), (-2,)).dequantize()))}  # fmt: skip
    assert error["learned"] < 0.85 * error["int"]


@pytest.mark.slow
def test_lloyds_steps_never_lose():
    w, spec, state = weight(1024, 3, seed=2), qjax.learned(2, per="tensor"), power(1024)
    h = np.asarray(state.mean_square[0])[:, None]
    errors = [float(np.sum(h * np.float64(solved(w, spec, state, qjax.kmeans(n)).q.dequantize() - w) ** 2)) for n in (0, 1, 20)]
    assert errors[0] * (1 + 1e-6) >= errors[1] >= errors[2] * (1 - 1e-6)
    assert solved(w, spec).q.levels.shape == (1, 4)


@pytest.mark.slow
def test_zeros_stay_zeros_where_there_are_many():
    w = weight(64, 6)
    mask = jnp.asarray(np.random.default_rng(5).random((64, 6)) < 0.5).at[:, 4].set(False)
    for spec in (qjax.learned(3), qjax.learned(2, group_size=16), qjax.learned(2, per="tensor")):
        back = solved(jnp.where(mask, 0.0, w), spec).q.dequantize()
        assert not np.asarray(back)[np.asarray(mask)].any() and np.asarray(back)[:, 4].all() == (spec.bits == 3)
        assert not np.asarray(solved(w.at[:, 2].set(0.0), spec).q.dequantize())[:, 2].any()
    assert np.all(np.asarray(solved(w, qjax.learned(2)).q.levels))  # none is spent on a zero that is not there


def test_a_few_zeros_that_no_level_is_spent_on_are_told():
    for few, notes in ((w := weight(64, 6)).at[0, 0].set(0.0), True), (w.at[:8, 0].set(0.0), False), (w, False):
        policy = qjax.Policy([qjax.Rule("*", weight=qjax.learned(2))])
        result = qjax.quantize(lambda p, x: x @ p["w"], {"w": few}, policy, [jnp.ones((1, 64))])
        lost = np.asarray(result.params["w"].dequantize())[np.asarray(few) == 0].any()
        told = any("0.26 % of it is exactly zero, too little for learned(2" in note for note in result.report.rows[0].notes)
        assert lost == told == notes


@pytest.mark.slow
def test_few_values_and_huge_and_tiny_ones():
    w = jnp.stack([jnp.full(32, 0.7), jnp.tile(jnp.float32([1.0, -2.0]), 16), jnp.linspace(-3e4, 3e4, 32), jnp.full(32, 1e-3)], 1)
    back = solved(w, qjax.learned(2)).q.dequantize()
    np.testing.assert_allclose(back[:, [0, 1, 3]], w[:, [0, 1, 3]], rtol=5e-4)
    assert np.all(np.isfinite(back))
    with pytest.raises(ValueError, match="`level_dtype`='float16' cannot hold the range of `mlp/w`; take a wider one"):
        solved(jnp.full((32, 2), 1e6), qjax.learned(2))


@pytest.mark.slow
def test_every_expert_and_every_group_of_a_convolution_has_its_own():
    w = weight(3, 32, 4) * jnp.float32([1, 10, 100])[:, None, None]
    state = Power(jnp.tile(power(32).mean_square, (3, 1)).at[1].set(0.0), jnp.int32([5, 0, 5]))
    outcome = solved(w, qjax.learned(2, per="tensor"), state, stacked=(-3,))
    assert outcome.q.levels.shape == (3, 1, 4)
    assert outcome.notes == ("no calibration data but zeros reached it in parts 1: its table counts all weights alike",)
    for i in range(3):
        one = solved(w[i], qjax.learned(2, per="tensor"), None if i == 1 else jax.tree.map(lambda a, i=i: a[i : i + 1], state))
        np.testing.assert_allclose(outcome.q.dequantize()[i], one.q.dequantize(), rtol=1e-5)
    grouped = solved(weight(32, 6), qjax.learned(2), Power(jnp.ones((2, 32)), jnp.int32([5, 5])), groups=2)
    assert grouped.q.levels.shape == (6, 4)
    with pytest.raises(ValueError, match=r"one table for the grouped convolution 'mlp/w': give qjax\.learned\(2\)"):
        solved(weight(32, 6), qjax.learned(2, per="tensor"), groups=2)


@pytest.mark.parametrize("spec", [qjax.learned(3), pytest.param(qjax.learned(3, group_size=8), marks=pytest.mark.slow),
                                  pytest.param(qjax.learned(2, per="tensor"), marks=pytest.mark.slow)], ids=str)  # fmt: skip
def test_views_move_no_float(spec):
    w = weight(3, 16, 4, 5)
    q = quantize(w, spec, (-3,), (-4,))
    back = q.dequantize()
    assert np.array_equal(views.transpose(q, (0, 3, 1, 2)).dequantize(), back.transpose(0, 3, 1, 2))
    assert np.array_equal(views.reshape(q, (3, 16, 20)).dequantize(), back.reshape(3, 16, 20))
    assert np.array_equal(views.slice(q, (1, 0, 0, 2), (3, 16, 4, 4)).dequantize(), back[1:3, :, :, 2:4])
    one = views.squeeze(views.dynamic_slice(q, (jnp.int32(2), 0, 0, 0), (1, 16, 4, 5)), (0,))
    assert np.array_equal(one.dequantize(), back[2])
    assert np.array_equal(jax.vmap(lambda q: q.dequantize())(q), back)
    assert np.array_equal(jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, q)[1], back)


def model(p, x):
    h = p["embed"][x]
    h = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, p["w"])[0]
    return jnp.einsum("btd,dhe->bthe", h, p["out"])


@pytest.mark.slow
def test_in_a_program_mixed_saved_and_loaded(tmp_path):
    params = {"embed": weight(11, 16, scale=1.0), "w": weight(2, 16, 16, seed=1), "out": weight(16, 2, 3, seed=2)}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 6)))
    policy = qjax.Policy([
        qjax.Rule("embed", weight=qjax.learned(4, group_size=8)), qjax.Rule("w", weight=qjax.learned(3), method=qjax.kmeans()),
        qjax.Rule("out", weight=qjax.int4(), method=qjax.gptq()),
    ])  # fmt: skip
    result = qjax.quantize(model, params, policy, calibration=[tokens])
    want = model(jax.tree.map(lambda q: q.dequantize(), result.params, is_leaf=lambda a: isinstance(a, qjax.QTensor)), tokens)
    got = jax.jit(qjax.quantized(model))(result.params, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    rows = {row.path: row for row in result.report.rows}
    assert [rows[n].spec for n in ("embed", "w")] == ["learned(4, group_size=8)", 'learned(3, per="channel")']
    assert [rows[n].method for n in ("embed", "w", "out")] == ["rtn", "kmeans", "gptq"]
    assert rows["w"].bits_per_weight == 8 * (6 + 16) / 16
    qjax.save(tmp_path / "ckpt", result)
    loaded = qjax.load(tmp_path / "ckpt")
    assert loaded.policy == policy
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(result.params), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("spec", [qjax.learned(4), pytest.param(qjax.learned(4, group_size=8), marks=pytest.mark.slow),
                                  pytest.param(qjax.learned(4, per="tensor"), marks=pytest.mark.slow)], ids=str)  # fmt: skip
def test_a_lookup_reads_its_rows(spec):
    q = quantize(weight(40, 16), spec, (-1,))
    rows = jax.jit(qjax.quantized(lambda p, i: jnp.take(p, i, axis=0)))
    index = jnp.int32([3, 39, 40])
    np.testing.assert_array_equal(rows(q, index)[:2], q.dequantize()[index[:2]])
    assert np.isnan(rows(q, index)[2]).all()
    if spec.grouped or spec.per_row:
        assert "f32[40,16]" not in rows.lower(q, index).compile().as_text()


@pytest.mark.parametrize("spec", [qjax.int4(), qjax.nf4()], ids=str)
def test_fixed_levels_are_refused_with_the_alternatives(spec):
    with pytest.raises(ValueError, match=r"kmeans fits a table.*'mlp/w', are fixed: give qjax\.learned\(4\), or take qjax\.gptq"):
        qjax.kmeans().shapes(Problem(jax.ShapeDtypeStruct((64, 8), jnp.float32), spec, (-2,), (), 1, "mlp/w"))


@pytest.mark.parametrize(("method", "message"), [
    (qjax.gptq(), "gptq rounds to a grid that is known before.*take qjax.kmeans"),
    (qjax.hqq(), r"hqq chooses zero points.*or take qjax\.kmeans\(\)$"),
], ids=["gptq", "hqq"])  # fmt: skip
def test_methods_that_need_a_grid_refuse_a_learned_table(method, message):
    with pytest.raises(ValueError, match=message):
        method.shapes(Problem(jax.ShapeDtypeStruct((64, 8), jnp.float32), qjax.learned(3), (-2,), (), 1, "mlp/w"))


def test_bad_arguments():
    for make, message in (
        (lambda: qjax.learned(5), "`bits` of a learned table must be 2, 3 or 4, got 5"),
        (lambda: qjax.learned(4, per="token"), "`granularity` of a learned table"),
        (lambda: qjax.learned(4, level_dtype="float8"), "`level_dtype` must be one of"),
        (lambda: qjax.kmeans(iterations=-1), "`iterations` must be an int of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert learned_decode(jnp.uint8([0, 3]), jnp.float16([1, 2, 3, 4])).tolist() == [1.0, 4.0]
