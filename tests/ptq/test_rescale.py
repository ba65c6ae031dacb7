"""AWQ and SmoothQuant over whole programs: the same function, smaller errors, in every form a model takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import Policy, Rule
from qjax.core import QTensor, quantize
from qjax.ptq.awq import CLIPS
from qjax.ptq.candidates import Member, best
from tests.parameters import every_other
from tests.program.cases import normal

W8A8 = {"weight": qjax.int8(), "activation": qjax.static(qjax.int8())}
SMOOTH, SEARCHED, AWQ = qjax.smoothquant(), qjax.smoothquant("search"), qjax.awq()


def norm(x, scale):
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale


def outliers(n, seed=9):
    """Channel factors of which a few are large, as in the norms of large language models."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.where(rng.random(n) < 0.15, 60.0, 1.0), jnp.float32)


def block(p, x):
    h = norm(x, p["norm"])
    gate, up = h @ p["gate"], h @ p["up"]
    return jax.nn.silu(gate) * up @ p["down"]


def block_params(seed=0, d=24, hidden=40):
    scale = outliers(d)
    return {
        "norm": scale,
        "gate": normal(d, hidden, seed=seed) / scale[:, None] / 5,
        "up": normal(d, hidden, seed=seed + 1) / scale[:, None] / 5,
        "down": normal(hidden, d, seed=seed + 2) / 6,
    }


def scanned(p, x):
    return lax.scan(lambda x, layer: (x + block(layer, x), None), x, p["layers"])[0]


def stacked(count=3):
    layers = [block_params(10 * i) for i in range(count)]
    return {"layers": jax.tree.map(lambda *a: jnp.stack(a), *layers)}


def unrolled(p, x):
    for i in range(p["layers"]["norm"].shape[0]):
        x = x + block(jax.tree.map(lambda w, i=i: w[i], p["layers"]), x)
    return x


def batches(d=24, count=3):
    return [normal(2, 17, d, seed=500 + i) for i in range(count)]


def error(fn, params, result, x):
    want = fn(params, x)
    return float(jnp.linalg.norm(jax.jit(qjax.quantized(fn))(result.params, x) - want) / jnp.linalg.norm(want))


def notes(result):
    return {row.path: row.notes for row in result.report.rows if row.spec}


def rescaled_float(fn, params, result):
    """The float model whose norms are those of the result and whose weights are what was packed: for comparing functions."""
    return jax.tree.map(lambda q: q.dequantize() if isinstance(q, QTensor) else q, result.params, is_leaf=lambda q: isinstance(q, QTensor))


@pytest.mark.parametrize("method", [SEARCHED, pytest.param(SMOOTH, marks=pytest.mark.slow)], ids=lambda m: m.name)
@pytest.mark.parametrize("fn", [block, *(pytest.param(fn, marks=pytest.mark.slow) for fn in (scanned, unrolled))])
def test_smoothquant_saves_static_activations_from_outliers(fn, method):
    params, data = block_params() if fn is block else stacked(), batches()
    plain = qjax.quantize(fn, params, Policy([Rule("*", **W8A8)]), data)
    smooth = qjax.quantize(fn, params, Policy([Rule("*", **W8A8, method=method)]), data)
    assert error(fn, params, smooth, data[0]) < 0.25 * error(fn, params, plain, data[0])
    for path, said in notes(smooth).items():
        gated = path.endswith("down")
        assert any(("rescaled" in note) for note in said), (path, said)
        assert gated or any(note.endswith("its input is rescaled") for note in said), (path, said)


def test_the_scales_are_those_of_the_formula():
    params, x = {"norm": outliers(8), "w": normal(8, 5)}, normal(64, 8, seed=3)
    fn = lambda p, x: norm(x, p["norm"]) @ p["w"]  # noqa: E731
    result = qjax.quantize(fn, params, Policy([Rule("w", **W8A8, method=qjax.smoothquant(0.7))]), [x[:40], x[40:]])
    amax_x, amax_w = jnp.abs(norm(x, params["norm"])).max(0), jnp.abs(params["w"]).max(1)
    s = amax_x**0.7 / amax_w**0.3
    np.testing.assert_allclose(result.params["norm"], params["norm"] / s, rtol=1e-5)
    want = qjax.quantize(lambda p, x: x @ p, params["w"] * s[:, None], Policy([Rule("*", weight=qjax.int8())]), [x])
    np.testing.assert_allclose(result.params["w"].dequantize(), want.params.dequantize(), rtol=1e-4, atol=1e-4)


def test_awq_scales_are_those_of_the_formula():
    """For two weights of one input the ratio with the least error of both outputs, in float64; and the authors' list of clips."""
    scale, spec, grid = jnp.where(jnp.arange(16) % 8 == 3, 30.0, 1.0), qjax.int3(group_size=8), 5  # so few that none is as good as another
    params = {"norm": scale, "q": normal(16, 24) / scale[:, None], "k": normal(16, 10, seed=1) / scale[:, None]}
    x = normal(96, 16, seed=2) * jnp.exp(0.7 * normal(16, seed=3))
    fn = lambda p, x: [norm(x, p["norm"]) @ p[name] for name in "qk"]  # noqa: E731
    result = qjax.quantize(fn, params, Policy([Rule("[qk]", weight=spec, method=qjax.awq(grid, clip=False))]), [x[:60], x[60:]])
    h, w = np.float64(norm(x, scale)), np.float64(np.concatenate([params["q"], params["k"]], axis=1)).T
    groups = np.abs(w).reshape(len(w), -1, 8)
    of_w, of_x = (groups / groups.max(-1, keepdims=True)).reshape(w.shape).mean(0), np.abs(h).mean(0)
    tried = [np.ones(16), *(of_x**r / (of_w ** (1 - r) + 1e-4) for r in np.arange(grid) / grid)]
    tried = [s / np.sqrt(s.max() * s.min()) for s in tried]
    back = [np.float64(quantize(jnp.float32(w * s), spec, (-1,)).dequantize()) / s for s in tried]
    losses = [np.sum(np.square(h @ (each - w).T)) for each in back]
    best = int(np.argmin(losses))
    assert 2 <= best < grid and np.sort(losses)[1] > 1.03 * losses[best]  # a ratio within, for which both means count
    np.testing.assert_allclose(params["norm"] / result.params["norm"], tried[best], rtol=1e-5)
    assert AWQ.grid == 20 and CLIPS == (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)


@pytest.mark.slow
def test_layers_of_a_scan_get_the_scales_of_unrolled_ones():
    params, data = stacked(), batches()
    for method in (SEARCHED, AWQ):
        policy = Policy([Rule("*", weight=qjax.int4(group_size=8), method=method)])
        one, other = (qjax.quantize(fn, params, policy, data) for fn in (scanned, unrolled))
        np.testing.assert_allclose(one.params["layers"]["norm"], other.params["layers"]["norm"], rtol=1e-4)


def test_the_float_function_is_kept():
    params, data = block_params(), batches()
    result = qjax.quantize(block, params, Policy([Rule("*", weight=qjax.int8(group_size=8), method=SMOOTH)]), data)
    assert float(jnp.abs(result.params["norm"] / params["norm"] - 1).max()) > 0.5  # it did change, and that is said
    assert [row.notes for row in result.report.rows if row.path == "norm"] == [("smoothquant: changed in exchange for an input",)]
    assert error(block, params, result, data[0]) < 0.02  # by what eight bits explain


@pytest.mark.parametrize(
    "spec", [qjax.uint3(group_size=8), *(pytest.param(s, marks=pytest.mark.slow) for s in (qjax.int4(group_size=8), qjax.int3()))], ids=str
)
def test_every_output_of_awq_is_at_least_as_near_as_rounding(spec):
    params, data = block_params(), batches()
    x = jnp.concatenate(data)
    rounded = qjax.quantize(block, params, Policy([Rule("*", weight=spec)]), data)
    result = qjax.quantize(block, params, Policy([Rule("*", weight=spec, method=AWQ)]), data)

    def outputs(p):
        h = norm(x, p["norm"])
        return [h @ p["gate"], h @ p["up"]]

    for want, plain, got in zip(outputs(params), outputs(rescaled_float(block, params, rounded)),
                                outputs(rescaled_float(block, params, result)), strict=True):  # fmt: skip
        assert jnp.linalg.norm(got - want) < jnp.linalg.norm(plain - want)
    assert error(block, params, result, data[0]) < 0.8 * error(block, params, rounded, data[0])


def test_clipping_alone_is_no_worse_than_rounding_in_any_group():
    w, x = normal(32, 6), normal(200, 32, seed=4)
    fn = lambda p, x: jnp.tanh(x) @ p  # noqa: E731
    result = qjax.quantize(fn, w, Policy([Rule("*", weight=qjax.int3(group_size=8), method=AWQ)]), [x])
    rounded = qjax.quantize(fn, w, Policy([Rule("*", weight=qjax.int3(group_size=8))]), [x])
    assert any("without rescaling" in note and "tanh" in note for said in notes(result).values() for note in said), notes(result)
    for i in range(0, 32, 8):
        part = jnp.tanh(x)[:, i : i + 8]
        got, plain = (jnp.linalg.norm(part @ (r.params.dequantize() - w)[i : i + 8], axis=0) for r in (result, rounded))
        assert (got <= plain * 1.0001).all()
    assert not np.array_equal(result.params.dequantize(), rounded.params.dequantize())


@pytest.mark.slow
def test_awq_then_gptq_beats_both_halves():
    params, data = block_params(), batches(count=8)
    spec = qjax.int3(group_size=8)
    errors = {
        method.name: error(block, params, qjax.quantize(block, params, Policy([Rule("*", weight=spec, method=method)]), data), data[0])
        for method in (qjax.rtn(), AWQ, qjax.awq(then=qjax.gptq()))
    }
    assert errors["awq(gptq)"] < errors["rtn"] and errors["awq"] < errors["rtn"], errors


def experts(p, x):
    h = norm(x, p["norm"])
    up = jax.nn.relu(jnp.einsum("ecd,edh->ech", h, p["up"]))
    return jnp.einsum("ech,ehd->ecd", up, p["down"])


def ragged(p, x, sizes):
    h = norm(x, p["norm"])
    return lax.ragged_dot(jax.nn.relu(lax.ragged_dot(h, p["up"], sizes)), p["down"], sizes)


def convolution(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.nn.relu(lax.conv_general_dilated(x, p["first"], (1, 1), "SAME", dimension_numbers=dims) + p["bias"])
    depth = lax.conv_general_dilated(h, p["depth"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=h.shape[-1])
    return lax.conv_general_dilated(jax.nn.relu(depth), p["last"], (2, 2), "SAME", dimension_numbers=dims)


def grouped_heads(p, x):
    """Two queries share a value head; what makes the values takes one scale for both."""
    h = norm(x, p["norm"])
    v = jnp.repeat(jnp.einsum("btd,dhk->bthk", h, p["v"]), 2, axis=2)
    return jnp.einsum("bthk,hkd->btd", v, p["o"])


FORMS = {
    "experts": (experts, {"norm": outliers(12), "up": normal(3, 12, 16), "down": normal(3, 16, 12, seed=1)}, (normal(3, 20, 12, seed=2),)),
    "ragged": (ragged, {"norm": outliers(12), "up": normal(3, 12, 16), "down": normal(3, 16, 12, seed=1)},
               (normal(30, 12, seed=2), jnp.asarray([11, 0, 17]))),
    "convolution": (convolution, {"first": normal(3, 3, 4, 10) * outliers(10), "bias": normal(10, seed=1),
                                  "depth": normal(3, 3, 1, 10, seed=2), "last": normal(1, 1, 10, 6, seed=3)},
                    (normal(2, 9, 7, 4, seed=4),)),
    "grouped_heads": (grouped_heads, {"norm": outliers(12), "v": normal(12, 2, 5) * outliers(5), "o": normal(4, 5, 12, seed=1)},
                      (normal(2, 9, 12, seed=2),)),
    "bf16": (block, jax.tree.map(lambda w: w.astype(jnp.bfloat16), block_params()), (normal(2, 9, 24, seed=3, dtype=jnp.bfloat16),)),
}  # fmt: skip


@pytest.mark.parametrize("form", every_other(FORMS))
@pytest.mark.parametrize("method", [SEARCHED, pytest.param(AWQ, marks=pytest.mark.slow)], ids=lambda m: m.name)
def test_every_form(form, method):
    fn, params, inputs = FORMS[form]
    how = {"weight": qjax.int8(), "activation": qjax.dynamic(qjax.int8(), per="tensor")} if method is SEARCHED else {"weight": qjax.int4()}
    plain = qjax.quantize(fn, params, Policy([Rule("*", **how)]), [inputs])
    result = qjax.quantize(fn, params, Policy([Rule("*", **how, method=method)]), [inputs])
    assert any("its input is rescaled" in note for said in notes(result).values() for note in said), notes(result)
    want = fn(params, *inputs).astype(jnp.float32)
    got, rounded = (jax.jit(qjax.quantized(fn))(r.params, *inputs).astype(jnp.float32) for r in (result, plain))
    assert jnp.linalg.norm(got - want) < jnp.linalg.norm(rounded - want)


def test_a_residual_stream_is_left_alone_and_said():
    def fn(p, x):
        h = x + x @ p["a"]
        return h @ p["b"]

    params = {"a": normal(8, 8), "b": normal(8, 4, seed=1)}
    result = qjax.quantize(fn, params, Policy([Rule("*", weight=qjax.int4(), method=AWQ)]), [normal(32, 8, seed=2)])
    assert all(any("awq without rescaling" in note for note in said) for said in notes(result).values())


def test_two_methods_on_one_input_are_refused_by_name():
    policy = Policy([Rule("gate", weight=qjax.int4(), method=AWQ), Rule("*", weight=qjax.int4(), method=SMOOTH)])
    result = qjax.quantize(block, block_params(), policy, batches())
    assert any("other methods of this kind" in note for note in notes(result)["gate"])


def test_bad_data():
    params, policy = block_params(), Policy([Rule("*", weight=qjax.int4(), method=AWQ)])
    with pytest.raises(ValueError, match="holds shapes, but awq"):
        qjax.quantize(block, params, policy, [jax.ShapeDtypeStruct((2, 3, 24), jnp.float32)])
    bad = [normal(2, 3, 24), normal(2, 3, 24).at[0, 0, 0].set(jnp.inf)]
    with pytest.raises(ValueError, match=r"batch 1 gives the input of 'gate'"):
        qjax.quantize(block, params, policy, bad)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: qjax.smoothquant(1.5), "`alpha` must be a number from 0 to 1"),
        (lambda: qjax.smoothquant("best"), "'search'"),
        (lambda: qjax.smoothquant(rows=0), "`rows`"),
        (lambda: qjax.awq(grid=0), "`grid`"),
        (lambda: qjax.awq(then=qjax.gptq), "`then` must be a method"),
    ],
)
def test_bad_options(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


@pytest.mark.parametrize("unfoldable", ["leave", pytest.param("scale", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [qjax.smoothquant, pytest.param(qjax.awq, marks=pytest.mark.slow)])
def test_rescaling_then_llm_int8_multiplies_integers_and_outliers(make, unfoldable):
    """The method that follows decides what becomes of the activations; the outliers are those of the rescaled input."""
    params, data = block_params(), batches(count=1)
    method = make(then=qjax.llm_int8(threshold=1.5, capacity=3), unfoldable=unfoldable)
    result = qjax.quantize(block, params, Policy([Rule("*", weight=qjax.int8(), method=method)]), data)
    rows = [row for row in result.report.rows if row.spec]
    assert {row.kernel for row in rows} == {"xla int8 + 16 bit outliers"} and all("at most 3 columns" in row.activation for row in rows)
    text = jax.jit(qjax.quantized(block)).lower(result.params, data[0]).as_text()
    assert sum("dot_general" in line and "xi8>) -> tensor" in line for line in text.splitlines()) == 3
    assert sum("dot_general" in line and "xf32>) -> tensor" in line for line in text.splitlines()) == 3
    assert error(block, params, result, data[0]) < 0.03


def test_a_search_judges_outlier_columns_as_they_run():
    """A channel that is left large costs next to nothing where it is multiplied in 16 bit, and all others' bits where it is not."""
    x, w = normal(1, 60, 32).at[..., 2].multiply(100.0), jnp.round(40 * normal(1, 6, 32, seed=1).clip(-3, 3)).at[..., 0].set(127)
    scales = jnp.stack([jnp.ones(32), jnp.ones(32).at[2].set(10.0)])  # leave it; move it into the weight

    @dataclasses.dataclass(frozen=True)
    class Given(type(SMOOTH)):
        def candidates(self, members, size, specs):
            return scales

    method = Given(SMOOTH.alphas, SMOOTH.then, SMOOTH.rows)
    found = []
    for act in (qjax.dynamic(qjax.int8()), qjax.llm_int8().activation(None)[0]):
        members = (Member(w, x, None, jnp.arange(32)[None]),)
        found.append(float(best(method, members, 32, ((qjax.int8(), act),))[2]))
    assert found == [10.0, 1.0]


def test_an_input_is_rescaled_once():
    for make in (lambda: qjax.smoothquant(then=AWQ), lambda: qjax.awq(then=SEARCHED)):
        with pytest.raises(ValueError, match=r"`then` must be a method that rounds.*got (awq|smoothquant\(searched\)): an input is"):
            make()
