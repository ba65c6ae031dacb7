"""Estimators against the papers' formulas in float64, and finite differences of what is smooth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import IntSpec, PerChannel
from qjax.ptq.method import Problem
from qjax.training.adaround import AdaRound
from qjax.training.dorefa import DoReFa
from qjax.training.estimator import Moment
from qjax.training.gradients import rounded_gradient
from qjax.training.lsq import LearnedStep, learned_round
from qjax.training.pact import clipped_round
from qjax.training.straight_through import StraightThrough, straight_through_activation, straight_through_at
from tests.parameters import every_other
from tests.program.cases import normal

W = np.asarray(normal(12, 3), np.float64)
G = np.asarray(normal(12, 3, seed=1), np.float64)


def problem(spec, w=W):
    return Problem(jnp.asarray(w, jnp.float32), spec, (-2,), (), 1, "w")


def lsq_reference(w, s, g, least, most, beta=0.0):
    """Esser et al., eq. 1 to 3 and Bhalgat et al., eq. 5 to 7, with the offset on the grid: x_q, dL/dw, dL/ds, dL/db."""
    z = np.round(-beta / s)
    v = w / s + z
    inside = (v > least) & (v < most)
    value = (np.clip(np.round(w / s) + z, least, most) - z) * s
    by_s = np.where(inside, np.round(w / s) - w / s, np.where(v >= most, most, least))
    return value, np.where(inside, g, 0), (g * by_s), g * ~inside


@pytest.mark.parametrize("spec", [qjax.int3(group_size=4), qjax.int2(), qjax.int4(per="tensor")], ids=str)
def test_lsq_has_the_gradients_of_the_paper(spec):
    estimator, p = LearnedStep(), problem(spec)
    start = estimator.init(p)["scale"]
    blocks = {"int3": W.T.reshape(3, 3, 4), "int2": W.T.reshape(3, 1, 12), "int4": W.T.reshape(1, 1, 36)}[str(spec)[:4]]
    g = {"int3": G.T.reshape(3, 3, 4), "int2": G.T.reshape(3, 1, 12), "int4": G.T.reshape(1, 1, 36)}[str(spec)[:4]]
    np.testing.assert_allclose(start, 2 * np.abs(blocks).mean(-1) / np.sqrt(spec.qmax), rtol=1e-6)
    scale = np.asarray(start, np.float64) * 0.7
    value, by_w, by_s, _ = lsq_reference(blocks, scale[..., None], g, spec.qmin, spec.qmax)

    def loss(w, s):
        return jnp.sum(estimator.fake(p._replace(w=w), {"scale": s}, Moment()) * jnp.asarray(G, jnp.float32))

    got_w, got_s = jax.grad(loss, argnums=(0, 1))(p.w, jnp.float32(scale))
    fake = estimator.fake(p, {"scale": jnp.float32(scale)}, Moment())
    np.testing.assert_allclose(fake.T.reshape(blocks.shape), value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got_w.T.reshape(blocks.shape), by_w, rtol=1e-6)
    np.testing.assert_allclose(got_s, by_s.sum(-1) / np.sqrt(blocks.shape[-1] * spec.qmax), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", every_other([LearnedStep("mean"), LearnedStep("mse"), AdaRound(), AdaRound(mse=False)]), ids=repr)
@pytest.mark.parametrize("spec", [qjax.int3(group_size=8, pad=True), qjax.uint3(group_size=8, pad=True)], ids=str)
def test_a_group_that_is_padded_learns_as_the_weights_in_it_alone_do(estimator, spec):
    """8 and 4 of 12 weights: the zeros behind the last four are none of theirs, in number, gradient or what they begin with."""
    w = np.where(np.arange(12)[:, None] < 8, W, np.abs(W) + 0.5)  # without a zero point of its own in the middle of the last group
    whole, last = problem(spec, w), problem(dataclasses.replace(spec, granularity=PerChannel(), pad=False), w[8:])
    begun, alone = estimator.init(whole), estimator.init(last)
    last_of = lambda name, a: a[8:] if name == "rounding" else a[:, 1:]  # noqa: E731
    for name in begun:
        np.testing.assert_allclose(last_of(name, begun[name]), alone[name], rtol=1e-5)
    begun = {name: 0.7 * a if name == "scale" else a for name, a in begun.items()}  # so that some are clipped
    alone = {name: last_of(name, a) for name, a in begun.items()}

    def by(p, learned, g):
        now = Moment(frozen=jnp.bool_(False))
        loss = lambda w, learned: jnp.sum(estimator.fake(p._replace(w=w), learned, now) * jnp.float32(g))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(p.w, learned)

    (by_w, by_learned), (want_w, want) = by(whole, begun, G), by(last, alone, G[8:])
    np.testing.assert_allclose(by_w[8:], want_w, rtol=1e-6)
    for name in begun:
        np.testing.assert_allclose(last_of(name, by_learned[name]), want[name], rtol=1e-5, atol=1e-7)
    assert any(np.any(a) for a in want.values())


def test_lsq_plus_learns_an_offset():
    x, s, beta, g = np.linspace(-2, 3, 23), 0.37, -0.8, np.linspace(1, 2, 23)
    spec = qjax.uint3()
    value, by_x, by_s, by_b = lsq_reference(x, s, g, 0, 7, beta)
    f = lambda x, s, b: jnp.sum(learned_round(x, s, b, 0.5, spec) * jnp.float32(g))  # noqa: E731
    args = jnp.float32(x), jnp.float32(s), jnp.float32(beta)
    np.testing.assert_allclose(learned_round(*args, 0.5, spec), value, rtol=1e-5, atol=1e-6)
    got = jax.grad(f, argnums=(0, 1, 2))(*args)
    np.testing.assert_allclose(got[0], by_x, rtol=1e-6)
    np.testing.assert_allclose(got[1], 0.5 * by_s.sum(), rtol=1e-4)
    np.testing.assert_allclose(got[2], 0.5 * by_b.sum(), rtol=1e-5)


def test_what_is_clipped_is_smooth_and_agrees_with_finite_differences():
    x, h = jnp.float32([-9.0, 9.0, 7.5]), 2.0**-8
    f = lambda s: learned_round(x, s, None, 1.0, qjax.int3())  # noqa: E731
    by_s = jax.jvp(f, (jnp.float32(1),), (jnp.float32(1),))[1]
    np.testing.assert_array_equal(by_s, (f(jnp.float32(1 + h)) - f(jnp.float32(1 - h))) / (2 * h))
    f = lambda a: clipped_round(x, a, qjax.uint2())  # noqa: E731
    by_a = jax.jvp(f, (jnp.float32(3),), (jnp.float32(1),))[1]
    np.testing.assert_allclose(by_a, (f(jnp.float32(3 + h)) - f(jnp.float32(3 - h))) / (2 * h), atol=1e-4)


def test_pact_is_the_paper():
    x, alpha = np.linspace(-1, 4, 31), 2.3
    got = clipped_round(jnp.float32(x), jnp.float32(alpha), qjax.uint4())
    np.testing.assert_allclose(got, np.round(np.clip(x, 0, alpha) * 15 / alpha) * alpha / 15, rtol=1e-6)
    by_x, by_a = jax.grad(lambda x, a: clipped_round(x, a, qjax.uint4()).sum(), (0, 1))(jnp.float32(x), jnp.float32(alpha))
    np.testing.assert_array_equal(by_x, (x >= 0) & (x < alpha))
    assert float(by_a) == (x >= alpha).sum()


@pytest.mark.parametrize("bits", [2, 4])
def test_dorefa_is_the_paper_and_its_tangent_has_its_gradient(bits):
    spec = qjax.integer(bits, signed=False, symmetric=False, zero_dtype="float32")
    n, bent = 2**bits - 1, np.tanh(W)
    bounded = bent / np.abs(bent).max()
    want = 2 * np.round((bounded / 2 + 0.5) * n) / n - 1
    fake = lambda w: DoReFa().fake(problem(spec)._replace(w=w), {}, Moment())  # noqa: E731
    np.testing.assert_allclose(fake(jnp.float32(W)), want, rtol=1e-5, atol=1e-6)
    got = jax.grad(lambda w: jnp.sum(fake(w) * jnp.float32(G)))(jnp.float32(W))
    h, by = 1e-6, np.zeros_like(W)
    for i in np.ndindex(W.shape):
        step = np.zeros_like(W)
        step[i] = h
        plus, minus = (np.tanh(W + t) / np.abs(np.tanh(W + t)).max() for t in (step, -step))
        by[i] = ((plus - minus) * G).sum() / (2 * h)
    np.testing.assert_allclose(got, by, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(DoReFa().pack(problem(spec), {}).dequantize(), fake(jnp.float32(W)))


def test_a_slope_scales_the_gradient_by_the_way_to_the_rounded_value():
    spec = IntSpec(4, scale_rule="full")
    scale = np.abs(W).max(0) / 7
    distance = W / scale - np.round(W / scale)
    estimator = StraightThrough(slope=0.3)
    got = jax.grad(lambda w: jnp.sum(estimator.fake(problem(spec)._replace(w=w), {}, Moment()) * jnp.float32(G)))(jnp.float32(W))
    np.testing.assert_allclose(got, G * (1 + 0.3 * np.sign(G) * distance), rtol=1e-4)


def test_clipped_and_passed_differ_where_a_range_ends():
    spec = IntSpec(4, signed=False, symmetric=True)
    for gradient, share in (("clipped", (np.float32(W) >= 0)), ("passed", np.ones_like(W))):
        estimator = StraightThrough(gradient)
        got = jax.grad(lambda w, e=estimator: e.fake(problem(spec)._replace(w=w), {}, Moment()).sum())(jnp.float32(W))
        assert np.all(np.asarray(got)[share == 1] == 1)
        assert np.any(np.asarray(got) == 0) == (gradient == "clipped")


def test_activations_below_an_unsigned_range_have_no_gradient():
    act, x = qjax.dynamic(IntSpec(4, signed=False, symmetric=True)), jnp.float32([[-1, -0.5, 0.5, 2]])
    value, back = jax.vjp(lambda x: straight_through_activation(x, act, (1,)), x)
    assert not value[0, :2].any() and back(jnp.ones_like(x))[0].tolist() == [[0, 0, 1, 1]]
    at = jax.grad(lambda x: straight_through_at(x, act, (1,), Moment(bits=jnp.int32(4))).sum())(x)
    assert at.tolist() == [[0, 0, 1, 1]]


def test_random_rounding_has_the_mean_and_stays_on_the_grid():
    spec = qjax.int3(scale_rule="full")
    keys = jax.random.split(jax.random.key(0), 4000)
    many = jax.vmap(lambda key: StraightThrough(rounding="stochastic").fake(problem(spec), {}, Moment(key)))(keys)
    scale = np.abs(W).max(0) / 3
    codes = np.asarray(many) / scale
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    np.testing.assert_allclose(many.mean(0), W, atol=4 * 0.5 * scale.max() / np.sqrt(4000))
    zero = StraightThrough(rounding="stochastic").fake(problem(spec, W * 0), {}, Moment(keys[0]))
    assert not np.any(zero)


@pytest.mark.parametrize("rule", ["full", "half"])
def test_rounded_gradients_have_the_mean(rule):
    act, g = qjax.dynamic(qjax.int4(scale_rule=rule)), jnp.float32(G)
    back = lambda key: jax.vjp(lambda y: rounded_gradient(y, key, act, (1,)), g)[1](g)[0]  # noqa: E731
    many = jax.vmap(back)(jax.random.split(jax.random.key(0), 4000))
    step = np.abs(G).max(1, keepdims=True) / 7
    np.testing.assert_allclose(np.asarray(many[0]) / step, np.round(many[0] / step), atol=1e-4)
    np.testing.assert_allclose(many.mean(0), G, atol=4 * 0.5 * step.max() / np.sqrt(4000))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("spec", [qjax.int8(), qjax.int4(), qjax.fp8_e4m3(), qjax.fp8_e5m2()], ids=str)
def test_rounded_gradients_of_16_bits_have_the_mean(dtype, spec):
    """A last rounding, to nearest, of codes times a scale would move it, by up to 60 standard errors."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), dtype)
    back = lambda key: jax.vjp(lambda y: rounded_gradient(y, key, qjax.dynamic(spec), (1,)), g)[1](g)[0]  # noqa: E731
    many = np.asarray(jax.jit(jax.vmap(back))(jax.random.split(jax.random.key(1), 10_000)), np.float64)
    off, error = many.mean(0) - np.asarray(g, np.float64), many.std(0) / 100
    assert (np.abs(off) <= 5 * error + 1e-9).all()


@pytest.mark.parametrize("spec", [qjax.int2(), qjax.int4(), qjax.uint4(), qjax.int8()], ids=str)
def test_learned_steps_under_a_schedule_of_bits_pack_what_they_compute(spec):
    w, x = np.random.default_rng(0).normal(size=(33, 40)).astype(np.float32), jnp.ones((2, 33))
    train = qjax.qat(qjax.lsq(), schedule=qjax.schedule(bits=((0, 8), (1, spec.bits)) if spec.bits < 8 else ((0, 4), (1, 8))))
    fq = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Policy([qjax.Rule("*", weight=spec, train=train)]))
    params = {"w": jnp.asarray(w)}
    quant = fq.advance(fq.init(jax.random.key(0), params, x))
    packed = qjax.convert(fq, params, x, quant=quant).params["w"].dequantize()
    for leaves in (fq.leaves(params, x, quant=quant), jax.jit(lambda p: fq.leaves(p, x, quant=quant)(p))):
        np.testing.assert_array_equal(leaves(params)["w"], packed)


def numbers_of(dtype):
    """All finite numbers of a format in 8 bits, in order."""
    grid = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(grid[np.isfinite(grid)])


FLOATS = {  # the spec, its numbers, the smallest that is normal
    "e5m2": (qjax.fp8_e5m2(), numbers_of(jnp.float8_e5m2), 2.0**-14),
    "e4m3": (qjax.fp8_e4m3(), numbers_of(jnp.float8_e4m3fn), 2.0**-6),
    "a scale in 16 bit": (qjax.fp8_e5m2(scale_dtype="bfloat16"), numbers_of(jnp.float8_e5m2), 2.0**-14),
    "int8 over 64": (qjax.core.FloatSpec("int8"), np.arange(-127, 128) / 64.0, 2.0**-6),  # as MXINT8 has it: one distance all over
}


@pytest.mark.parametrize("name", FLOATS)
def test_rounded_gradients_in_fp8_have_the_mean_and_are_neighbours_on_the_grid(name):
    """Magnitudes over all binades, in steps of a row's scale: normal ones, subnormal ones, below the smallest, the largest, zero."""
    spec, grid, normal_from = FLOATS[name]
    largest, least = grid[-1], np.min(grid[grid > 0])
    low = [1.7 * normal_from, 0.7 * normal_from, 2.6 * least, 0.4 * least, 0.01 * least, 0]
    steps = [largest, largest * 0.93, min(17.3, largest * 0.77), 1.1, 1.0, 0.3, *low]
    steps = np.float32([*steps, *(-v for v in steps)])
    g = steps * np.float32([[1.0], [2.0**-15]])  # two rows with a scale each, both powers of two: all below is exact
    draws = 20_000
    back = lambda key: jax.vjp(lambda y: rounded_gradient(y, key, qjax.dynamic(spec), (1,)), g)[1](jnp.asarray(g))[0]  # noqa: E731
    many = np.asarray(jax.jit(jax.vmap(back))(jax.random.split(jax.random.key(0), draws)), np.float64) / [[1.0], [2.0**-15]]
    steps = np.float64(steps)
    below = grid[np.searchsorted(grid, steps, side="right") - 1]
    above = grid[np.searchsorted(grid, steps, side="left")]
    assert ((many == below) | (many == above)).all()
    error = np.sqrt((above - steps) * (steps - below) / draws)  # the standard error of the mean; 0 for numbers of the grid
    assert (np.abs(many.mean(0) - steps) <= 4.5 * error).all()
    assert (many.std(0) > 0).sum() >= 2 * 16  # and it does draw: to nearest, most of these have another mean


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("start", ["mean", "extremes", "mse"])
def test_learned_steps_begin_where_they_are_told_and_zeros_stay(start, dtype):
    w = jnp.zeros((12, 3), dtype).at[:, 0].set(jnp.asarray(W[:, 0], dtype)).at[3, 0].set(0)
    estimator, p = LearnedStep(start), problem(qjax.int4())._replace(w=w)
    fake = estimator.fake(p, estimator.init(p), Moment())
    assert fake.dtype == dtype and not np.any(fake[:, 1:]) and fake[3, 0] == 0
    if start != "mean":
        packed = qjax.core.quantize(w, qjax.int4(), (-2,))
        assert start == "mse" or np.array_equal(fake, packed.dequantize())


@pytest.mark.parametrize("spec", [qjax.int4(), *(pytest.param(s, marks=pytest.mark.slow) for s in (qjax.int8(), qjax.uint4()))], ids=str)
def test_a_learned_scale_that_steps_across_zero_counts_by_its_magnitude(spec):
    """An update of Adam is a fixed step, and scales of 8 bits are a few of them: the sign turns, and training goes on."""
    w, x = np.random.default_rng(0).normal(size=(33, 6)).astype(np.float32), jnp.ones((2, 33))
    rule = qjax.Rule("*", weight=spec, activation=qjax.static(qjax.int8()), train=qjax.lsq("extremes"))
    fq = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Policy([rule]))
    params = {"w": jnp.asarray(w)}
    quant = fq.init(jax.random.key(0), params, x)
    turned = jax.tree_util.tree_map_with_path(lambda path, a: -a if path[-1].key == "scale" else a, quant)
    np.testing.assert_array_equal(fq(params, x, quant=turned), fq(params, x, quant=quant))
    loss = lambda q: jnp.sum(fq(params, x, quant=q) ** 2)  # noqa: E731
    one, other = jax.grad(loss)(quant), jax.grad(loss)(turned)
    for kind in ("weights", "activations"):
        np.testing.assert_array_equal(one[kind]["w"]["scale"], -other[kind]["w"]["scale"])
        assert np.abs(one[kind]["w"]["scale"]).max() > 0
    packed = [qjax.convert(fq, params, x, quant=q).params["w"] for q in (quant, turned)]
    for a, b in zip(*map(jax.tree.leaves, packed), strict=True):
        np.testing.assert_array_equal(a, b)
