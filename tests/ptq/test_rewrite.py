"""`rewrite`: steps in order, verified, composed and said; on plain functions, Linen and NNX."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.ptq.rewrite import Step, StepOutcome
from tests.graph.programs import IMAGE, batch_norm, conv
from tests.graph.streams import TOKENS, relu_decoder
from tests.program.cases import normal

STEPS = [qjax.batch_norm_folding(), qjax.equalization(), qjax.rotation(key=jax.random.key(0))]


def network(p, x):
    h = jax.nn.relu(batch_norm(p["bn"], conv(x, p["c1"])))
    return conv(h, p["c2"]).mean((1, 2))


PARAMS = {
    "bn": {"mean": normal(4), "var": 1 + normal(4, seed=1) ** 2, "gamma": 1 + normal(4, seed=2) ** 2, "beta": normal(4, seed=3)},
    "c1": normal(3, 3, 3, 4) * jnp.array([1.0, 30.0, 0.1, 5.0]),
    "c2": normal(3, 3, 4, 5, seed=1),
}


def same(fn, a, b, *inputs, tolerance=2e-5):
    run = jax.jit(fn)
    np.testing.assert_allclose(run(a, *inputs), run(b, *inputs), rtol=tolerance, atol=tolerance * float(jnp.abs(run(a, *inputs)).max()))


def test_all_steps_on_a_network():
    """The batch norm is folded, then its layer equalized: the second says that it came on top; the rotation says why it did nothing."""
    before = jax.tree.map(lambda w: w, PARAMS)
    result = qjax.rewrite(network, PARAMS, [IMAGE], STEPS)
    same(network, PARAMS, result.params, IMAGE)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, before, PARAMS))
    lines = {(c.step, c.path): c for c in result.changes if c.done or c.step == "rotation"}
    assert lines["batch_norm_folding", "c1"].text == "took the scale of bn/gamma" and not lines["batch_norm_folding", "c1"].after
    assert lines["equalization", "c1"].after == ("batch_norm_folding",) and lines["equalization", "c2"].after == ()
    assert not lines["rotation", "c2"].done and "`max`" in lines["rotation", "c2"].text
    assert [name for name, _ in result.errors] == [step.name for step in STEPS] and 0 < result.error < 7.7e-6
    shown = str(result)
    for text in ("took the scale of bn/gamma", "after batch_norm_folding", "refused:", "error", "c1"):
        assert text in shown.replace("\n", " "), shown
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, PARAMS, result.params))


@pytest.mark.slow
def test_a_rotated_decoder_quantizes():
    layer = {"norm": 1 + 0.1 * normal(12), "in": 0.3 * normal(12, 8, seed=1), "out": 0.3 * normal(8, 12, seed=2)}
    p = {"embed": normal(7, 12, seed=3), "layers": [layer], "norm": 1 + 0.1 * normal(12, seed=4), "head": normal(12, 5, seed=5)}
    result = qjax.rewrite(relu_decoder, p, [TOKENS], [qjax.equalization(), qjax.rotation(key=jax.random.key(1))])
    same(relu_decoder, p, result.params, TOKENS)
    line = next(c for c in result.changes if c.step == "rotation" and c.path == "layers/0/in")
    assert line.after == ("equalization",) and "axis 0 rotated by a matrix of size 12 (hadamard)" in line.text
    policy = qjax.Policy([qjax.Rule("embed", weight=None), qjax.Rule("*", weight=qjax.int8())])
    packed = qjax.quantize(relu_decoder, result.params, policy, [TOKENS]).params
    np.testing.assert_allclose(qjax.quantized(relu_decoder)(packed, TOKENS), relu_decoder(p, TOKENS), atol=0.1)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3))(x)))
        return nn.Dense(3)(nn.relu(nn.Conv(4, (1, 1))(x)).mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


def shaken(tree):
    """Statistics and scales that are not those of an untrained norm."""
    leaves, structure = jax.tree.flatten(tree)
    floats = [i for i, w in enumerate(leaves) if jnp.issubdtype(w.dtype, jnp.floating) and w.ndim == 1]
    new = [w + 0.3 * jnp.abs(normal(*w.shape, seed=i)) if i in floats else w for i, w in enumerate(leaves)]
    return jax.tree.unflatten(structure, new)


@pytest.mark.slow
def test_linen():
    model = LinenNet()
    variables = shaken(model.init(jax.random.key(0), IMAGE, train=False))
    result = qjax.linen.rewrite(model, variables, [IMAGE], STEPS[:2], train=False)
    assert {(c.step, c.path) for c in result.changes if c.done} >= {
        ("batch_norm_folding", "Conv_0/kernel"),
        ("batch_norm_folding", "batch_stats/BatchNorm_0/mean"),
        ("equalization", "Conv_0/kernel"),
        ("equalization", "Conv_1/kernel"),
    }
    assert (result.params["batch_stats"]["BatchNorm_0"]["mean"] == 0).all()
    same(lambda v, x: model.apply(v, x, train=False), variables, result.params, IMAGE)


def test_nnx():
    model = NnxNet(nnx.Rngs(0))
    model.eval()
    nnx.update(model, shaken(nnx.state(model)))
    result = qjax.nnx.rewrite(model, [IMAGE], STEPS[:2])
    assert {(c.step, c.path) for c in result.changes if c.done} >= {("batch_norm_folding", "conv/kernel"), ("equalization", "head/kernel")}
    same(qjax.nnx.function(model), nnx.state(model), result.params, IMAGE)
    before = model(IMAGE)
    nnx.update(model, result.params)
    np.testing.assert_allclose(model(IMAGE), before, rtol=2e-5, atol=2e-5)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A step of a user's that is not what it claims."""

    raises: bool
    name: str = "wrong"

    def apply(self, program, params, inputs):
        new = [params[0] * 2, *params[1:]]
        if self.raises:
            qjax.graph.verify(program, params, new, inputs)
        return StepOutcome(new, (("c1", "doubled"),), (), 0.0)


def test_wrong_steps_are_caught():
    """A step that fails its own verification is left out and named; one that does not verify fails the whole."""
    fn, params, x = (lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]), {"a": normal(4, 4), "b": normal(4, 4)}, normal(3, 4)
    assert isinstance(Wrong(True), Step)
    result = qjax.rewrite(fn, params, [x], [Wrong(True), qjax.equalization()])
    assert "nothing of it was kept: the results differ" in result.refused[0].text and result.error < 7.7e-6
    with pytest.raises(ValueError, match="more than rounding explains"):
        qjax.rewrite(fn, params, [x], [Wrong(False)])


def test_wrong_arguments_are_named():
    fn, params, x = (lambda p, x: x @ p["a"]), {"a": normal(4, 4)}, normal(3, 4)
    with pytest.raises(TypeError, match=r"`steps` must be a list of steps, got one"):
        qjax.rewrite(fn, params, [x], qjax.equalization())
    with pytest.raises(TypeError, match=r"`steps` must hold steps such as qjax.equalization\(\), got 'rotate'"):
        qjax.rewrite(fn, params, [x], ["rotate"])
    with pytest.raises(ValueError, match="holds shapes"):
        qjax.rewrite(fn, params, [jax.ShapeDtypeStruct((3, 4), jnp.float32)], STEPS)
    with pytest.raises(ValueError, match="`iterations` must be at least 1, got 0"):
        qjax.equalization(iterations=0)
    with pytest.raises(TypeError, match="`key` must be a key"):
        qjax.rotation(key=0)
    with pytest.raises(ValueError, match="a"):
        qjax.rewrite(fn, {"a": params["a"].at[0, 0].set(jnp.nan)}, [x], STEPS)
    packed = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=qjax.int8())]), [x]).params
    with pytest.raises(TypeError, match="'a' is quantized already"):
        qjax.rewrite(fn, packed, [x], STEPS)
    with pytest.raises(ValueError, match="`steps` is empty"):
        qjax.rewrite(fn, params, [x], [])
    for bad in (x.at[1, 2].set(jnp.nan), x.at[0, 0].set(-jnp.inf)):
        with pytest.raises(ValueError, match=r"`calibration` batch 0 holds NaN or infinity in its array 0 of shape \(3, 4\)"):
            qjax.rewrite(fn, params, [bad], STEPS)
    with pytest.raises(ValueError, match="all zero on this batch, which says nothing about a rewrite: give another batch"):
        qjax.rewrite(fn, params, [0 * x], STEPS)


def test_a_step_says_what_it_finds():
    """Equalization: what it improves, and which input a refusal is about. A step that finds nothing has a line, too."""
    fn, x = (lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]), normal(3, 6)
    params = {"a": normal(6, 6) * jnp.exp(normal(6, seed=3)), "b": normal(6, 4, seed=1) * jnp.exp(normal(6, 1, seed=4))}
    result = qjax.rewrite(fn, params, [x], STEPS[:2])
    folding, a, b, refused = result.changes
    assert (folding.path, folding.text, folding.done) == ("*", "found no batch norm behind a linear layer", False)
    said = a.text.removeprefix("shares its range with b: spread of channels on both sides ")
    before, after = map(float, said.split(" -> "))
    assert before > after >= 1 and b.text == "shares its range with a"
    assert refused.path == "a" and refused.text.startswith("the channels that it reads stay as they are: the scale would reach an input")
    assert "found no batch norm" in str(result)
    quiet = dataclasses.replace(Wrong(False), name="quiet")
    object.__setattr__(quiet, "apply", lambda program, params, inputs: StepOutcome(list(params), (), (), 0.0))
    assert qjax.rewrite(fn, params, [x], [quiet]).changes[0].text == "found nothing to do"


def test_modules_untie_their_head_too():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(12, 8)
            return embed.attend(nn.RMSNorm(use_fast_variance=False)(embed(tokens)))

    class TiedNNX(nnx.Module):
        def __init__(self):
            self.embed, self.norm = nnx.Embed(12, 8, rngs=nnx.Rngs(0)), nnx.RMSNorm(8, use_fast_variance=False, rngs=nnx.Rngs(0))

        def __call__(self, tokens):
            return self.embed.attend(self.norm(self.embed(tokens)))

    tokens, turn = jnp.arange(6)[None], qjax.rotation(key=jax.random.key(1))
    linen, other = Tied(), TiedNNX()
    variables = linen.init(jax.random.key(0), tokens)
    for result, want in (
        (qjax.linen.rewrite(linen, variables, [tokens], [turn], untie=True), linen.apply(variables, tokens)),
        (qjax.nnx.rewrite(other, [tokens], [turn], untie=True), other(tokens)),
    ):
        assert "untied" in result.params and any(change.done for change in result.changes)
        np.testing.assert_allclose(result.fn(result.params, tokens), want, rtol=1e-4, atol=1e-5)


def test_one_pruned_layer_of_a_scan_is_refused_as_the_same_layer_by_itself():
    p = {"in": normal(6, 8, 8).at[0, ::2].set(0), "out": normal(6, 8, 8, seed=1), "head": normal(8, 5, seed=2), "a": normal(6, 8, seed=3)}

    def layer(x, w):
        return x + jnp.tanh(x @ w["in"]) @ w["out"]

    def scanned(p, x):
        layers = {name: p[name] for name in ("in", "out")}
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x @ p["a"], layers)[0] @ p["head"]

    def unrolled(p, x):
        x = x @ p["a"]
        for w in p["layers"]:
            x = layer(x, w)
        return x @ p["head"]

    apart = {"layers": [{name: p[name][i] for name in ("in", "out")} for i in range(6)], "head": p["head"], "a": p["a"]}
    for fn, params, path in ((scanned, p, "in"), (unrolled, apart, "layers/0/in")):
        result = qjax.rewrite(fn, params, [normal(7, 6)], [qjax.rotation(key=jax.random.key(0))])
        assert any(f"50 % of {path} is exactly zero and would not be" in line.text for line in result.refused)
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, params, result.params))


@pytest.mark.parametrize(("every", "run"), [(False, "stream"), (True, "between two layers")])
def test_a_rotation_keeps_what_was_pruned_or_says_what_it_lost(every, run):
    """More than a tenth of exact zeros: refused by name; fewer: counted; rows of zeros stay zeros and are not spoken of."""

    def fn(p, x):
        x = x @ p["a"]
        return (x if every else x + jnp.tanh(x @ p["in"]) @ p["out"]) @ p["b"]

    p = {"a": normal(6, 8), "b": normal(8, 5, seed=1), "in": normal(8, 4, seed=2), "out": normal(4, 8, seed=3)}
    p = p if not every else {name: p[name] for name in "ab"}
    step = [qjax.rotation(key=jax.random.key(0), every=every)]
    half = p | {"b": p["b"].at[::2].set(0)}
    refused = qjax.rewrite(fn, half, [normal(7, 6)], step)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, half, refused.params)), run
    assert any("50 % of b is exactly zero and would not be" in line.text and "before you prune" in line.text for line in refused.refused)
    some = p | {"b": p["b"].at[0, 0].set(0).at[:, 1].set(0), "a": p["a"].at[:2].set(0)}
    lines = {line.path: line.text for line in qjax.rewrite(fn, some, [normal(7, 6)], step).changes if line.done}
    assert "; 2.5 % of it was exactly zero, which a rotation does not keep" in lines["b"] and "zero" not in lines["a"]
