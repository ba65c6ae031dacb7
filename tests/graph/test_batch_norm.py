"""Batch norms on stored statistics move into the layer before them; the tree and the function stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qjax.graph import equalize, find_folds, fold_batch_norm
from qjax.program import trace
from tests.graph.programs import IMAGE, conv
from tests.program.cases import normal

pytestmark = pytest.mark.slow


class Net(nn.Module):
    """Convolutions and a dense layer with batch norm, with and without bias, with and without relu, and a residual."""

    use_scale: bool = True

    @nn.compact
    def __call__(self, x):
        norm = lambda name: nn.BatchNorm(use_running_average=True, use_scale=self.use_scale, name=name)  # noqa: E731
        x = nn.relu(norm("bn1")(nn.Conv(6, (3, 3), name="c1")(x)))
        y = nn.relu(norm("bn2")(nn.Conv(6, (3, 3), use_bias=False, feature_group_count=3, name="c2")(x)))
        x = nn.relu(x + norm("bn3")(nn.Conv(6, (1, 1), use_bias=False, name="c3")(y)))
        return nn.Dense(3, name="head")(norm("bn4")(nn.Dense(5, name="d1")(x.mean((1, 2)))))


def variables(model):
    tree = jax.jit(model.init)(jax.random.key(0), IMAGE)
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    leaves = [w + np.float32(0.3) * rng.random(w.shape, np.float32) if w.ndim == 1 else w for w in leaves]
    return jax.tree.unflatten(structure, leaves)


def test_every_batch_norm_of_a_network():
    model = Net()
    tree = variables(model)
    program = trace(model.apply, tree, IMAGE)
    leaves, structure = jax.tree.flatten(tree)
    result = fold_batch_norm(program, leaves, [IMAGE])
    assert [(f.weight, f.scale, f.shift, f.zeroed) for f in result.folded] == [
        ("c1/kernel", "bn1/scale", "c1/bias", ("bn1/bias", "batch_stats/bn1/mean")),
        ("c2/kernel", "bn2/scale", "bn2/bias", ("batch_stats/bn2/mean",)),
        ("c3/kernel", "bn3/scale", "bn3/bias", ("batch_stats/bn3/mean",)),
        ("d1/kernel", "bn4/scale", "d1/bias", ("bn4/bias", "batch_stats/bn4/mean")),
    ]
    assert not result.refused and result.error < 4e-6
    new = jax.tree.unflatten(structure, result.params)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(new, IMAGE), apply(tree, IMAGE), rtol=2e-5, atol=2e-5)
    assert not np.array_equal(new["params"]["c2"]["kernel"], tree["params"]["c2"]["kernel"])
    z = normal(2, 3, 6)
    bn = {"params": new["params"]["bn2"], "batch_stats": new["batch_stats"]["bn2"]}
    bn["params"] = bn["params"] | {"bias": jnp.zeros(6)}
    np.testing.assert_allclose(nn.BatchNorm(use_running_average=True).apply(bn, z), z, rtol=1e-6)


def factor_last(h, p):
    return (h - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-3) * p["gamma"] + p["beta"]


def divided(h, p):
    return p["gamma"] * ((h - p["mean"]) / jnp.sqrt(p["var"] + 1e-3)) + p["beta"]


def one_factor(h, p):
    return p["beta"] + (p["gamma"] / jnp.sqrt(p["var"] + 1e-3)) * (h - p["mean"])


@pytest.mark.parametrize("norm", [factor_last, divided, one_factor])
def test_against_the_formula_and_then_equalized(norm):
    """The published formula, in float64; afterwards the pair of convolutions can be equalized."""

    def fn(p, x):
        h = conv(x, p["c1"]) + p["b"]
        return conv(jax.nn.relu(norm(h, p)), p["c2"])

    p = {
        "c1": normal(3, 3, 3, 4) * jnp.array([1.0, 8.0, 0.1, 30.0]),
        "c2": normal(1, 1, 4, 5, seed=1),
        **{name: normal(4, seed=i) for i, name in enumerate(("b", "mean", "beta", "gamma"))},
        "var": 0.1 + normal(4, seed=8) ** 2,
    }
    leaves, structure = jax.tree.flatten(p)
    program = trace(fn, p, IMAGE)
    result = fold_batch_norm(program, leaves, [IMAGE])
    new = jax.tree.unflatten(structure, result.params)
    wide = {name: np.asarray(w, np.float64) for name, w in p.items()}
    k = wide["gamma"] / np.sqrt(wide["var"] + 1e-3)
    np.testing.assert_allclose(new["c1"], wide["c1"] * k, rtol=1e-5)
    np.testing.assert_allclose(new["b"], (wide["b"] - wide["mean"]) * k + wide["beta"], rtol=1e-5)
    assert (new["mean"] == 0).all() and (new["beta"] == 0).all() and (new["var"] == p["var"]).all()
    again = equalize(program, result.params, [IMAGE])
    assert [(pair.producers, pair.consumers) for pair in again.pairs] == [(("c1",), ("c2",))]
    assert again.pairs[0].spread[1] < again.pairs[0].spread[0] and again.error < 4e-6
    assert len(find_folds(program)) == 2


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda p, x: (x @ p["w"] - p["m"]) / jnp.sqrt(p["v"] + 1), "is a factor of its scale"),
        (lambda p, x: (x @ p["w"] - p["m"]) * jax.lax.rsqrt(p["v"] + 1), "no parameter of one number a channel is a factor"),
        (lambda p, x: (x @ p["w"]) * p["m"], "holds a shift"),
        (lambda p, x: ((x @ p["w"]) * p["m"] + p["v"]) @ p["w"], "used elsewhere"),
    ],
)
def test_refused(fn, reason):
    p, x = {"w": normal(4, 4), "m": normal(4), "v": jnp.ones(4)}, normal(2, 4)
    result = fold_batch_norm(trace(fn, p, x), jax.tree.leaves(p), [x])
    assert not result.folded and reason in result.refused[0][1] and result.error == 0


def test_what_other_values_read_is_left_alone():
    """A batch norm on the batch's own statistics, and a result that a residual reads before its norm."""

    def train(p, x):
        z = x @ p["w"]
        return (z - z.mean(0)) * jax.lax.rsqrt(z.var(0) + 1e-3) * p["g"]

    def residual(p, x):
        z = x @ p["w"]
        return z + (z - p["m"]) * p["g"]

    p, x = {"g": normal(4), "m": normal(4, seed=1), "w": normal(4, 4)}, normal(6, 4)
    for fn in (train, residual):
        result = fold_batch_norm(trace(fn, p, x), jax.tree.leaves(p), [x])
        assert not result.folded and result.error == 0
