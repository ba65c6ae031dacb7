"""Learned rotations: orthogonal to the last bit of float32, better than where they start, and the float function stays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax.training.learned_rotation import cayley, skew_gradient

D, WIDE, V = 16, 24, 64
W4A4 = qjax.Policy([qjax.Rule("embed", weight=None), qjax.Rule("*", weight=qjax.int4(), activation=qjax.dynamic(qjax.int4()))])


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32) / shape[0] ** 0.5


def fn(p, tokens):
    """A residual stream with a norm, and two linear layers with a value between them that no sum ties."""
    x = p["embed"][tokens]
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["norm"][None]
    x = x + jax.nn.relu(h @ p["in"]) @ p["out"]
    return (x @ p["down"]) @ p["head"]


def stream_params():
    """Outliers in two channels of the stream, as language models have them."""
    sizes = {"embed": (V, D), "in": (D, WIDE), "out": (WIDE, D), "down": (D, 8), "head": (8, V)}
    p = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(sizes.items())}
    return p | {"embed": p["embed"].at[:, jnp.array([3, 7])].mul(20.0), "norm": jnp.ones(D)}


def test_a_cayley_step_is_orthogonal_and_goes_downhill():
    rng = np.random.default_rng(0)
    r, target = (np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(2))
    f = lambda r: jnp.sum((r - target) ** 2)  # noqa: E731
    a = skew_gradient(jax.grad(f)(jnp.float32(r)), jnp.float32(r), False)
    np.testing.assert_allclose(a, -a.T, atol=1e-6)
    new = cayley(0.01 * a, jnp.float32(r))
    # (I + U/2)^-1 (I - U/2) R in float64
    u = 0.01 * np.asarray(a, np.float64)
    np.testing.assert_allclose(new, np.linalg.solve(np.eye(6) + u / 2, (np.eye(6) - u / 2) @ r), atol=1e-6)
    assert f(new) < f(jnp.float32(r))
    ones = skew_gradient(jax.grad(f)(jnp.float32(r)), jnp.float32(r), True)
    np.testing.assert_allclose(ones.sum(0), 0, atol=1e-5)
    np.testing.assert_allclose(ones, -ones.T, atol=1e-6)


@pytest.mark.slow
def test_it_is_better_than_the_random_one_it_starts_from():
    p, batches = stream_params(), [jnp.arange(V), jnp.arange(V)[::-1]]
    learned = qjax.learn_rotation(fn, p, W4A4, batches, key=jax.random.key(0), steps=40, learning_rate=0.002)
    assert len(learned.losses) == 42 and learned.losses[-1] < 0.85 * learned.losses[0]
    for matrix, rotation in zip(learned.matrices, learned.rotations, strict=True):
        assert matrix.shape == (rotation.size, rotation.size)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(rotation.size), atol=1e-12)
    assert {r.size for r in learned.rotations} == {D, 8}
    np.testing.assert_allclose(learned.fn(learned.params, batches[0]), fn(p, batches[0]), atol=1e-5)

    def error(params):
        result = qjax.quantize(fn, params, W4A4, batches)
        return float(jnp.linalg.norm(jax.jit(qjax.quantized(fn))(result.params, batches[0]) - fn(p, batches[0])))

    random = qjax.learn_rotation(fn, p, W4A4, batches, key=jax.random.key(0), steps=0)
    assert random.losses[0] == random.losses[-1] == learned.losses[0]
    assert error(learned.params) < error(random.params) < error(p)


def test_the_matrices_stay_orthogonal_for_many_steps_and_keep_the_ones():
    """A mean over the stream: R 1 = 1. Before the last clean-up the drift is that of float32."""
    p = {"embed": normal(V, D), "in": normal(D, WIDE, seed=1), "out": normal(WIDE, D, seed=2), "head": normal(D, V, seed=3)}

    def centred(p, tokens):
        x = p["embed"][tokens]
        x = x + jax.nn.relu((x - jnp.mean(x, -1, keepdims=True)) @ p["in"]) @ p["out"]
        return x @ p["head"]

    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int3())])
    learned = qjax.learn_rotation(centred, p, policy, [jnp.arange(V)], key=jax.random.key(1), steps=60, learning_rate=0.05)
    (matrix,) = learned.matrices
    assert learned.rotations[0].keeps_ones
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(D), atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    assert learned.losses[-1] < learned.losses[0]
    r = jnp.asarray(matrix, jnp.float32)
    for i in range(200):
        r = cayley(0.1 * skew_gradient(normal(D, D, seed=i), r, True), r)
    np.testing.assert_allclose(r @ r.T, np.eye(D), atol=1e-4)
    np.testing.assert_allclose(r.sum(1), 1, atol=1e-4)


def test_the_users_loss_and_optimizer_are_taken():
    p, tokens = stream_params(), jnp.arange(V)
    loss = lambda logits, tokens: optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()  # noqa: E731
    how = {"steps": 10, "optimizer": optax.sgd(0.05, momentum=0.9), "loss": loss}
    learned = qjax.learn_rotation(fn, p, W4A4, [tokens], key=jax.random.key(0), **how)
    assert learned.losses[-1] < learned.losses[0] and learned.losses[0] > 0.1


def test_what_cannot_be_done_is_said():
    p, tokens, key = stream_params(), jnp.arange(V), jax.random.key(0)
    with pytest.raises(ValueError, match="`steps`"):
        qjax.learn_rotation(fn, p, W4A4, [tokens], key=key, steps=-1)
    with pytest.raises(ValueError, match="`learning_rate`"):
        qjax.learn_rotation(fn, p, W4A4, [tokens], key=key, learning_rate=0.0)
    with pytest.raises(ValueError, match="`calibration` holds shapes"):
        qjax.learn_rotation(fn, p, W4A4, [jax.ShapeDtypeStruct((V,), jnp.int32)], key=key)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4())])
    with pytest.raises(ValueError, match=r"`fn` has nothing to rotate: .*tanh"):
        qjax.learn_rotation(lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"], p, policy, [normal(3, D)], key=key)
