"""AutoRound of whole blocks: what is tuned, what it costs, and what is said of it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import QTensor
from qjax.program import compat
from qjax.ptq import block_tuning, sequential
from qjax.ptq.signed_descent import Descent, decode, descend, round_with, start
from tests.ptq.layers import SHAPES, SPECS, D, F, L, data, layers_params, numbers, scanned, stacked_params, unrolled


def quantized(fn, params, data, *rules, **how):
    result = qjax.quantize(fn, params, qjax.Policy(list(rules)), data, **how)
    return result, jax.jit(qjax.quantized(fn))


def losses(row):
    """(of the best, of rounding) as a note of the report says; the most of them where it is of several layers."""
    number = r"(?:\S+ \.\. )?([^ ,]+)"
    found = re.findall(rf"weights: {number} of its block's output is error, {number} when rounded", " ".join(row.notes))
    return [(float(a), float(b)) for a, b in found]


FLOAT_ZERO_AND_MEAN = [qjax.uint2(group_size=8, zero_dtype="float32"), qjax.ternary(group_size=8)]


@pytest.mark.parametrize("spec", FLOAT_ZERO_AND_MEAN, ids=str)
@pytest.mark.parametrize("block", ["auto", "site"])
def test_it_begins_at_the_rounding_of_the_spec_and_gets_better(spec, block):
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": numbers(16, 6).at[0, 0].set(90.0 if spec.by_mean else 1.0)}, [numbers(40, 16, seed=1) + numbers(40, 1, seed=2)]
    method = qjax.autoround(steps=40, lr=0.02, mse=False, block=block)
    tuned, rounded = (quantized(fn, params, x, qjax.Rule("w", weight=spec, method=m))[0] for m in (method, qjax.rtn()))
    assert tuned.params["w"].nbytes == rounded.params["w"].nbytes
    error, plain = (float(jnp.sum(jnp.square(x[0] @ (r.params["w"].dequantize() - params["w"])))) for r in (tuned, rounded))
    assert error < 0.99 * plain
    row = tuned.report.rows[0]
    if block == "site":
        (said,) = re.findall(r"its output is (\S+) of that of rounding", " ".join(row.notes))
        np.testing.assert_allclose(float(said), error / plain, rtol=6e-3)
    else:
        np.testing.assert_allclose(losses(row)[0], np.asarray([error, plain]) / float(jnp.sum(jnp.square(fn(params, x[0])))), rtol=6e-3)


@pytest.mark.slow
def test_scanned_and_unrolled_layers_are_tuned_alike_and_better_than_rounded():
    rule = qjax.Rule("*", weight=qjax.int2(group_size=4), method=qjax.autoround(steps=40, lr=0.02))
    x, out = data(), []
    for fn, params in ((scanned, stacked_params()), (unrolled, layers_params())):
        result, run = quantized(fn, params, x, rule)
        rounded, _ = quantized(fn, params, x, qjax.Rule("*", weight=qjax.int2(group_size=4)))
        want = fn(params, x[0])
        error, most = (float(jnp.linalg.norm(run(r.params, x[0]) - want)) for r in (result, rounded))
        assert error < 0.7 * most
        rows = [row for row in result.report.rows if row.spec]
        assert all(row.method == "autoround(steps=40, lr=0.02)" for row in rows)
        pairs = [pair for row in rows for pair in losses(row)]
        assert len(pairs) == len(rows) and all(best <= plain for best, plain in pairs)
        assert [note.endswith(f"(layers 0-{L - 1})") for row in rows for note in row.notes] == [fn is scanned] * len(rows)
        out.append(run(result.params, x[0]))
    # Sums in another order may move a code that lies on an edge.
    assert float(jnp.linalg.norm(out[0] - out[1])) < 0.2 * error


@pytest.mark.slow
def test_the_loss_that_is_reported_is_that_of_the_packed_weights():
    def fn(p, x):
        return sum(x @ w for w in p.values())

    params = {str(i): numbers(16, 6, seed=i) for i in range(len(SPECS))}
    params["0"] = params["0"].at[jnp.arange(16), jnp.arange(16) % 6].set(0)
    rules = [qjax.Rule(str(i), weight=s, method=qjax.autoround(steps=20, span=len(SPECS))) for i, s in enumerate(SPECS)]
    x = [numbers(12, 16, seed=20 + i) @ numbers(16, 16, seed=9) for i in range(2)]
    result, run = quantized(fn, params, x, *rules)
    rounded, _ = quantized(fn, params, x, *[dataclasses.replace(rule, method=qjax.rtn()) for rule in rules])

    def error(packed):
        y, want = (np.concatenate([np.float64(f(p, b)) for b in x]) for f, p in ((run, packed), (fn, params)))
        return np.square(y - want).sum() / np.square(want).sum()

    for row in result.report.rows:
        ((best, plain),) = losses(row)
        np.testing.assert_allclose(best, error(result.params), rtol=2e-2)
        np.testing.assert_allclose(plain, error(rounded.params), rtol=6e-3)  # the note has three digits
        assert best < plain
    q = result.params["0"]
    assert not np.asarray(q.dequantize())[np.asarray(params["0"]) == 0].any()
    assert q.nbytes == quantized(fn, params, x, qjax.Rule("0", weight=SPECS[0]))[0].params["0"].nbytes


@pytest.mark.slow
def test_other_methods_in_a_block():
    """What needs no data is rounded before, what needs data sees the tuned weights, what has no rule stays."""
    params, x = layers_params(), data(1)
    spec = qjax.int3(group_size=4)
    rules = [
        qjax.Rule("*/k", weight=None), qjax.Rule("*/up", weight=spec), qjax.Rule("*/down", weight=spec, method=qjax.gptq()),
        qjax.Rule("*", weight=spec, method=qjax.autoround(steps=30)),
    ]  # fmt: skip
    result, _ = quantized(unrolled, params, x, *rules)
    kinds = {row.path: row.method for row in result.report.rows if row.spec}
    assert kinds["0/down"] == "gptq" and kinds["1/gate"] == "autoround(steps=30)" and kinds["0/up"] == "rtn" and "0/k" not in kinds
    assert not isinstance(result.params[0]["k"], QTensor)
    # GPTQ of the last weight on the activations of everything in front of it, as it is now.
    before = [jax.tree.map(lambda w: w.dequantize() if isinstance(w, QTensor) else w, p, is_leaf=lambda w: isinstance(w, QTensor))
              for p in result.params]  # fmt: skip
    before[1]["down"] = params[1]["down"]
    alone, _ = quantized(unrolled, before, x, qjax.Rule("1/down", weight=spec, method=qjax.gptq()))
    np.testing.assert_allclose(alone.params[1]["down"].dequantize(), result.params[1]["down"].dequantize(), atol=1e-5)


@pytest.mark.slow
def test_work_goes_on_where_it_was(tmp_path):
    params, x, steps = layers_params(), data(1), []
    rule = qjax.Rule("*", weight=qjax.int2(), method=qjax.autoround(steps=10))
    first, _ = quantized(unrolled, params, x, rule, resume=tmp_path, progress=steps.append)
    calibrated = [s for s in steps if s.phase == "calibrate"]
    assert [s.done for s in calibrated] == list(range(L * len(SHAPES) + 1))
    assert all(s.remaining is not None for s in calibrated[1:])  # none of it was found on the disk
    kept = sorted(p for p in tmp_path.iterdir() if p.name.startswith("leaf"))
    for file in kept[1::2]:
        file.unlink()
    again, _ = quantized(unrolled, params, x, rule, resume=tmp_path)
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    planned = qjax.plan(unrolled, params, qjax.Policy([rule]), x, rates=qjax.Rates(1e10, 1e8))
    assert planned.work.products > 10 * 3 * 2 * 24 * D * D  # steps, three products each, of 24 rows


@pytest.mark.slow
def test_a_block_is_tuned_once_whatever_reads_what(monkeypatch, tmp_path):
    """Also where its weights read several values, and where another method's weight stands between them."""
    tunings = []
    tune = sequential.tune_joint
    monkeypatch.setattr(sequential, "tune_joint", lambda *a: tunings.append([m.problem.name for m in a[2]]) or tune(*a))
    rules = [
        qjax.Rule("*/k", weight=qjax.int2(), method=qjax.gptq()),
        qjax.Rule("*", weight=qjax.int2(), method=qjax.autoround(steps=4, mse=False)),
    ]  # fmt: skip
    params, x = layers_params()[:1], data(1)
    once, _ = quantized(unrolled, params, x, *rules)
    names = [f"0/{k}" for k in SHAPES if k != "k"]
    assert tunings == [names]
    going_on, _ = quantized(unrolled, params, x, *rules, resume=tmp_path)
    assert tunings == [names] * 2
    for a, b in zip(jax.tree.leaves(once.params), jax.tree.leaves(going_on.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_what_cannot_be_tuned_with_a_block_is_tuned_alone_and_says_so():
    def fn(p, x):
        x = x + jax.nn.relu(x @ p["tied"]) @ p["down"]
        x = x + jax.nn.relu(x @ p["tied"]) @ p["other"]
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 0, lambda c: c + 1, x @ p["last"])

    params = {k: numbers(D, D, seed=i) for i, k in enumerate(("tied", "down", "other", "last"))}
    result, _ = quantized(fn, params, data(2), qjax.Rule("*", weight=qjax.int3(), method=qjax.autoround(steps=20, span=1)))
    notes = {row.path: " ".join(row.notes) for row in result.report.rows}
    assert "one set of statistics for its 2 uses" in notes["tied"] and "tuned alone" in notes["tied"]
    assert "tuned alone" in notes["last"] and "holds a `while`" in notes["last"]
    assert "tuned with 1 weights" in notes["down"] and "tuned with 1 weights" in notes["other"]


def masked(p, x, mask):
    score = jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).T + mask)
    return x + score @ (x @ p["v"]) @ p["o"]


@pytest.mark.slow
def test_masks_may_be_infinite_and_what_is_not_finite_is_named():
    params = {k: w for k, w in layers_params()[0].items() if k in "qkvo"}
    mask = jnp.where(jnp.tri(6) > 0, 0.0, -jnp.inf)
    x = [(numbers(6, D, seed=i), mask) for i in range(2)]
    rule = qjax.Rule("*", weight=qjax.int2(), method=qjax.autoround(steps=20, lr=0.02, mse=False))
    result, run = quantized(masked, params, x, rule)
    ((best, plain),) = losses(result.report.rows[0])
    assert best < plain and np.isfinite(run(result.params, *x[0])).all()
    within = lambda p, x: masked(p, x, jnp.where(jnp.tri(6) > 0, 0.0, -jnp.inf))  # noqa: E731
    assert losses(quantized(within, params, [x for x, _ in x], rule)[0].report.rows[0]) == losses(result.report.rows[0])
    with pytest.raises(ValueError, match=r"batch 1 .*'q' and . more weights: a value \(6, 6\) that .* no parameter .* holds NaN"):
        quantized(masked, params, [x[0], (x[1][0], mask.at[3, 3].set(jnp.nan))], rule)
    loud = lambda p, x: jnp.log(x @ p["q"])  # noqa: E731
    with pytest.raises(ValueError, match=r"batch 0 .*what it makes \(6, 8\) in the float program holds NaN"):
        quantized(loud, {"q": params["q"]}, [x[0][0]], rule)
    with pytest.raises(ValueError, match=r"batch 1 gives the input of 'q' \(dot_general\) NaN or infinity"):
        quantized(masked, params, [x[0], (x[1][0].at[0, 0].set(jnp.inf), mask)], rule)


@pytest.mark.slow
def test_what_has_no_gradient_stands_still_and_is_counted():
    """The square root of a row of zeros has none."""

    def fn(p, x):
        h = x @ p["w"]
        return (h / (jnp.sqrt(jnp.sum(h * h, -1, keepdims=True)) + 1.0)) @ p["v"]

    params, x = {"w": numbers(D, F), "v": numbers(F, 4, seed=1)}, numbers(30, D, seed=2)
    rule = qjax.Rule("*", weight=qjax.int2(), method=qjax.autoround(steps=20, lr=0.02, mse=False))
    result, _ = quantized(fn, params, [x.at[0].set(0.0)], rule)
    for row in result.report.rows:
        ((best, plain),) = losses(row)
        assert best < plain
        assert "in 20 of 20 steps some of its block's gradient is NaN" in " ".join(row.notes)
    row = quantized(fn, params, [x], rule)[0].report.rows[0]
    assert losses(row) and len(row.notes) == 1

    def loss(o, t=-1):
        return jnp.where(t % 2 == 0, jnp.inf, 1.0) * jnp.sum(decode(round_with(w, o, spec)))

    w, spec = numbers(2, 8), qjax.int3()
    begin = start(w, spec, False)
    found = jax.jit(lambda o: descend(loss, loss, o, o, Descent(6, 0.01, False, False, 2)))(begin)
    assert (int(found.skipped), int(found.holes)) == (3, 0)
    assert np.isfinite(found.best.v).all() and np.asarray(found.best.v).any()


@pytest.mark.slow
def test_experts_that_no_data_reached_are_named():
    fn = lambda p, x: jnp.einsum("ebk,ekn->ebn", x, p["e"])  # noqa: E731
    x = [numbers(3, 20, 16, seed=i).at[2].set(0) for i in range(2)]
    rule = lambda block: qjax.Rule("*", weight=qjax.int3(), method=qjax.autoround(steps=4, block=block))  # noqa: E731
    for block, what in (("auto", "gradient of its block's error"), ("site", "calibration data but zeros")):
        row = quantized(fn, {"e": numbers(3, 16, 12)}, x, rule(block))[0].report.rows[0]
        assert f"no {what} reached it in parts 2: rounded" in row.notes


def test_data_without_a_gradient_is_not_said_to_be_missing():
    fn = lambda p, x: jnp.sum(x @ p["w"]) * 0.0  # noqa: E731
    rule = qjax.Rule("*", weight=qjax.int3(), method=qjax.autoround(steps=1))
    row = quantized(fn, {"w": numbers(8, 4)}, [numbers(3, 8)], rule)[0].report.rows[0]
    assert "no gradient of its block's error reached it: rounded" in row.notes
    assert not any("calibration data" in note for note in row.notes)


@jax.custom_vjp
def straight(x):
    return jnp.round(x * 2) / 2


straight.defvjp(lambda x: (straight(x), None), lambda _, g: (g,))


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@jax.custom_vjp
def halved(x):
    return x


halved.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))


@pytest.mark.slow
def test_a_derivative_of_its_own_is_kept():
    """The rounding behind the weight has none but that; where it would be lost, the weight is tuned by itself."""
    rule = qjax.Rule("*", weight=qjax.int2(), method=qjax.autoround(steps=20, lr=0.02, mse=False, checks=5))
    params, x = {"w": numbers(D, F), "v": numbers(F, 4, seed=1)}, data(2)
    result, run = quantized(lambda p, x: straight(x @ p["w"]) @ p["v"], params, x, rule)
    fn = lambda p, x: straight(x @ p["w"])  # noqa: E731
    only, run = quantized(fn, {"w": params["w"]}, x, rule)
    for row in (*result.report.rows, *only.report.rows):
        ((best, plain),) = losses(row)
        assert best < 0.95 * plain
    wanted, made = (np.concatenate([f(p, b) for b in x]) for f, p in ((fn, params), (run, only.params)))
    np.testing.assert_allclose(losses(only.report.rows[0])[0][0], np.square(made - wanted).sum() / np.square(wanted).sum(), rtol=6e-3)
    for lost, why in ((lambda p, x: product(x, p["w"]), "it stands in a call"), (lambda p, x: jnp.tanh(halved(x @ p["w"])), "it hands on")):
        row = quantized(lost, {"w": params["w"]}, x, rule)[0].report.rows[0]
        assert "tuned alone" in row.notes[0] and why in row.notes[1]


def test_what_a_block_holds_is_counted():
    fn = lambda p, x: x + jax.nn.relu(x @ p["w"]) @ p["v"]  # noqa: E731
    params, x = {"w": numbers(D, F), "v": numbers(F, D, seed=1)}, [numbers(50, D, seed=i) for i in range(6)]
    rule = qjax.Rule("*", weight=qjax.int3(), method=qjax.autoround(steps=2, checks=1, mse=False))
    result, _ = quantized(fn, params, x, rule, spill=qjax.Spill(limit=0))
    held = 2 * sum(b.nbytes for b in x)  # what enters and what should come out
    planned = qjax.plan(fn, params, qjax.Policy([rule]), x, rates=qjax.Rates(1e10, 1e8))
    assert held <= result.report.memory["live"] <= held + x[0].nbytes * 4
    assert held <= planned.live <= held + 4 * 6 * x[0].nbytes


@pytest.mark.slow
def test_batches_of_two_shapes_and_several_a_step():
    x = [*data(2), numbers(2, 5, D, seed=8)]
    method = qjax.autoround(steps=15, batch_size=2, lr=0.02, mse=False)
    result, run = quantized(unrolled, layers_params()[:1], x, qjax.Rule("*", weight=qjax.int2(), method=method))
    assert all(best < plain for row in result.report.rows if row.spec for best, plain in losses(row))
    same, _ = quantized(unrolled, layers_params()[:1], x, qjax.Rule("*", weight=qjax.int2(), method=method))
    other, _ = quantized(unrolled, layers_params()[:1], x, qjax.Rule("*", weight=qjax.int2(), method=dataclasses.replace(method, seed=1)))
    bits = [np.concatenate([np.asarray(q["gate"].codes).ravel() for q in r.params]) for r in (result, same, other)]
    assert np.array_equal(bits[0], bits[1]) and not np.array_equal(bits[0], bits[2])
    assert np.isfinite(run(result.params, x[0])).all()


@pytest.mark.slow
def test_convolutions_experts_and_bfloat16():
    def fn(p, x):
        conv = lambda x, w, g: jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"),  # noqa: E731
                                                            feature_group_count=g)  # fmt: skip
        x = x + conv(jax.nn.relu(conv(x, p["conv"], 1)), p["grouped"], 2)
        gates = jax.nn.softmax(x @ p["router"])
        hidden = jax.nn.relu(jnp.einsum("nhc,ecf->enhf", x, p["up"]))
        return x + jnp.einsum("enhf,efc,nhe->nhc", hidden, p["down"], gates)

    shapes = {"conv": (3, D, D), "grouped": (3, D // 2, D), "router": (D, 3), "up": (3, D, F), "down": (3, F, D)}
    params = {k: numbers(*s, seed=i, dtype=jnp.bfloat16) / s[-2] ** 0.5 for i, (k, s) in enumerate(shapes.items())}
    x = data(2, dtype=jnp.bfloat16)
    rules = [qjax.Rule("router", weight=None), qjax.Rule("*", weight=qjax.int2(), method=qjax.autoround(steps=60, lr=0.02, span=1))]
    result, run = quantized(fn, params, x, *rules)
    rounded, _ = quantized(fn, params, x, rules[0], qjax.Rule("*", weight=qjax.int2()))
    want = fn(params, x[0]).astype(jnp.float32)
    error, most = (float(jnp.linalg.norm(run(r.params, x[0]).astype(jnp.float32) - want)) for r in (result, rounded))
    assert error < 0.9 * most
    assert all(losses(row) and losses(row)[0][0] <= losses(row)[0][1] for row in result.report.rows if row.spec)


@pytest.mark.slow
def test_rescaled_inputs_are_tuned_with_their_scales():
    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    params, x = {"a": numbers(D, F), "b": numbers(F, 4, seed=1)}, [jnp.exp(numbers(30, D, seed=2)) * jnp.arange(1, D + 1)]
    method = qjax.awq(then=qjax.autoround(steps=20), unfoldable="scale")
    result, run = quantized(fn, params, x, qjax.Rule("*", weight=qjax.int3(group_size=4), method=method))
    assert result.params["a"].input_scale is not None
    ((best, _),) = losses(result.report.rows[0])
    want = fn(params, x[0])
    # Both are one block.
    np.testing.assert_allclose(float(jnp.sum((run(result.params, x[0]) - want) ** 2) / jnp.sum(want**2)), best, rtol=3e-2)


@pytest.mark.parametrize("wrap", [lambda m: qjax.low_rank(2, then=m), lambda m: qjax.awq(then=qjax.online_rotation(then=m))])
def test_a_method_that_adds_to_a_weight_does_not_tune_blocks(wrap):
    fn, params, x = lambda p, x: x @ p["w"], {"w": numbers(16, 8)}, [numbers(24, 16, seed=1)]
    rule = lambda **how: qjax.Rule("*", weight=qjax.int3(), method=wrap(qjax.autoround(steps=4, **how)))  # noqa: E731
    for ask in (lambda: quantized(fn, params, x, rule()), lambda: qjax.plan(fn, params, qjax.Policy([rule()]), x)):
        with pytest.raises(ValueError, match=r"(low_rank|online_rotation)\(.*block=\"site\""):
            ask()
    q = quantized(fn, params, x, rule(block="site"))[0].params["w"]
    assert q.adapter_left is not None or q.rotation is not None


@pytest.mark.parametrize(
    ("how", "message"),
    [({"steps": 0}, "`steps`"), ({"lr": 2.0}, "`lr`"), ({"block": "layer"}, "`block`"), ({"batch_size": 0}, "`batch_size`"),
     ({"seed": -1}, "`seed`"), ({"span": True}, "`span`")],
)  # fmt: skip
def test_options_out_of_range(how, message):
    with pytest.raises(ValueError, match=message):
        qjax.autoround(**how)


def test_it_is_saved_with_the_policy(tmp_path):
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    method = qjax.autoround(steps=5, block="site", lr=0.1)
    result, _ = quantized(fn, {"w": numbers(8, 4)}, [numbers(16, 8, seed=1)], qjax.Rule("*", weight=qjax.int4(), method=method))
    qjax.save(tmp_path / "ckpt", result)
    loaded = qjax.load(tmp_path / "ckpt")
    assert loaded.policy == result.policy
    np.testing.assert_array_equal(loaded.params["w"].dequantize(), result.params["w"].dequantize())


def test_a_step_multiplies_with_merged_axes_and_holds_what_batches_share_once(monkeypatch):
    """Of x (B, T, K) @ w a gradient sums over two axes, for which XLA on CPUs first writes out a transposed operand: slow."""
    seen = []
    loop = block_tuning._loop
    monkeypatch.setattr(block_tuning, "_loop", lambda *args: seen.append((jax.make_jaxpr(lambda: loop(*args))(), args[5])) or loop(*args))

    def fn(p, x):
        return jnp.tanh(x @ p["w"] * jnp.cos(jnp.arange(8.0)))

    tuned = qjax.Rule("*", weight=qjax.int4(), method=qjax.autoround(steps=2, mse=False))
    quantized(fn, {"w": numbers(16, 8)}, [numbers(2, 3, 16, seed=i) for i in range(2)], tuned)
    ((jaxpr, data),) = seen

    def products(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn
            for _, inner in compat.subprograms(eqn):
                yield from products(compat.parts(inner)[0])

    found = list(products(compat.parts(jaxpr)[0]))
    assert len(found) == 3  # the step's product and its gradient, and the product that is judged
    assert all(v.aval.ndim == 2 for eqn in found for v in eqn.invars)
    ((shared, own, wanted),) = data
    assert [x.shape for x in own] == [(2, 2, 3, 16)] and [x.shape for x in wanted] == [(2, 2, 3, 8)]
    assert [x.size for x in shared] == [8]  # the table of cosines
