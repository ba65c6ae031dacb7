"""Random small programs: whatever fold is found must hold numerically, and no wrong fold may be found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from qjax.graph import Fold, NotPreserved, apply_fold, exact_scales, find_folds, rotate, verifier
from qjax.program import trace

WIDTH = 6  # of every value between two steps, so that any step can follow any other
CONV = ("NWC", "WIO", "NWC")


def conv(x, w, groups):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=CONV, feature_group_count=groups)


# Each step maps (parameters, value, an earlier value of the same shape) to a value; its shapes are drawn from the list beside it.
STEPS = {
    "linear": (lambda p, x, old: x @ p[0], [(6, 6)]),
    "biased": (lambda p, x, old: x @ p[0] + p[1], [(6, 6), (6,)]),
    "relu": (lambda p, x, old: jax.nn.relu(x), []),
    "leaky": (lambda p, x, old: jax.nn.leaky_relu(x, 0.25), []),
    "tanh": (lambda p, x, old: jnp.tanh(x), []),
    "vector": (lambda p, x, old: x * p[0], [(6,)]),
    "scalar": (lambda p, x, old: -0.5 * x, []),
    "norm": (lambda p, x, old: x * (lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3) * p[0]), [(6,)]),
    "centre": (lambda p, x, old: (x - x.mean(-1, keepdims=True)) * p[0] + p[1], [(6,), (6,)]),
    "residual": (lambda p, x, old: x + old, []),
    "branch": (lambda p, x, old: x + jax.nn.relu(x @ p[0]) @ p[1], [(6, 4), (4, 6)]),
    "gate": (lambda p, x, old: jax.nn.sigmoid(x @ p[0]) * (x @ p[1]), [(6, 6), (6, 6)]),
    "product": (lambda p, x, old: x * old, []),
    "heads": (lambda p, x, old: x.reshape(4, 3, 2, 3).transpose(0, 2, 1, 3).swapaxes(1, 2).reshape(4, 3, 6), []),
    "mixed heads": (lambda p, x, old: x.reshape(4, 3, 2, 3).swapaxes(2, 3).reshape(4, 3, 6), []),
    "fused": (lambda p, x, old: (lambda a, b: jnp.concatenate([b[..., :3], a[..., 3:]], -1))(*jnp.split(x @ p[0], 2, -1)), [(6, 12)]),
    "repeat": (lambda p, x, old: jnp.repeat(x @ p[0], 2, axis=-1), [(6, 3)]),
    "repeat heads": (lambda p, x, old: jnp.repeat(jnp.einsum("btc,chd->bthd", x, p[0]), 2, axis=2).reshape(4, 3, 6), [(6, 1, 3)]),
    "half": (lambda p, x, old: jnp.concatenate([x[..., 1::2] @ p[0], old[..., :3]], -1), [(3, 3)]),
    "roll": (lambda p, x, old: jnp.roll(x, 2, axis=-1), []),
    "flip": (lambda p, x, old: x[..., ::-1], []),
    "max": (lambda p, x, old: jnp.maximum(x, old), []),
    "cumulative": (lambda p, x, old: jnp.cumsum(x, axis=1), []),
    "across": (lambda p, x, old: x + x.sum(-1, keepdims=True), []),
    "attend": (lambda p, x, old: jax.nn.softmax(x @ x.swapaxes(-1, -2)) @ (x @ p[0]), [(6, 6)]),
    "depthwise": (lambda p, x, old: conv(x, p[0], 6), [(3, 1, 6)]),
    "conv": (lambda p, x, old: conv(x, p[0], 2), [(2, 3, 6)]),
    "stacked": (lambda p, x, old: jax.nn.relu(x @ p[0][0]) @ p[0][1], [(2, 6, 6)]),
    "tied": (lambda p, x, old: jax.nn.relu(x @ p[0]) @ p[0].T, [(6, 6)]),
    "scan": (lambda p, x, old: lax.scan(lambda c, w: (c + jax.nn.relu(c @ w[0]) @ w[1], None), x, p)[0], [(2, 6, 4), (2, 4, 6)]),
}  # fmt: skip


def program_of(names):
    rng = np.random.default_rng(0)
    params = [[jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32) for s in STEPS[name][1]] for name in names]

    def fn(params, x):
        values = [x]
        for i, (name, p) in enumerate(zip(names, params, strict=True)):
            values.append(STEPS[name][0](p, values[-1], values[i // 2]))
        return values[-1]

    return fn, params, jnp.asarray(rng.normal(size=(4, 3, WIDTH)), jnp.float32)


CHAINS = st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=7)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(CHAINS)
def test_every_fold_found_holds(names):
    check(names)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(CHAINS)
def test_every_fold_found_holds_in_many_programs(names):
    check(names)


def check(names):
    fn, params, x = program_of([*names, "linear", "tanh"])
    program = trace(fn, params, x)
    leaves = jax.tree.leaves(params)
    folds = [answer for _, answer in find_folds(program) if isinstance(answer, Fold)]
    if not folds:
        return
    compare = verifier(program, leaves, [x])
    for seed, fold in enumerate(folds):
        new = apply_fold(fold, leaves, exact_scales(fold, seed))
        assert compare(new) <= 1e-5, (names, fold)
        assert {s.leaf for s in fold.scalings} and all((s.power != 0).any() for s in fold.scalings)


def test_every_pair_of_a_producer_and_a_homogeneous_function_folds():
    """The random test would pass if nothing were ever found."""
    for name in ("relu", "leaky", "scalar", "heads", "mixed heads", "roll", "flip", "cumulative"):
        fn, params, x = program_of(["biased", name, "linear"])
        answers = [answer for _, answer in find_folds(trace(fn, params, x))]
        assert isinstance(answers[1], Fold) and answers[1].size == WIDTH, name
    for name, size in (("repeat", 3), ("repeat heads", 3), ("depthwise", 6), ("conv", 6), ("fused", 6), ("gate", 6), ("norm", 6)):
        fn, params, x = program_of([name, "linear"])
        answers = [answer for _, answer in find_folds(trace(fn, params, x))]
        assert isinstance(answers[-1], Fold) and answers[-1].size == size, name
    for name in ("tanh", "across"):
        fn, params, x = program_of(["biased", name, "linear"])
        assert not isinstance(find_folds(trace(fn, params, x))[1][1], Fold), name


@settings(max_examples=8, deadline=None, derandomize=True)
@given(CHAINS)
def test_every_rotation_found_holds(names):
    check_rotations(names)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(CHAINS)
def test_every_rotation_found_holds_in_many_programs(names):
    check_rotations(names)


def check_rotations(names):
    """No refusal for a wrong result, which would be a rotation wrongly found; and each one holds on data that it was not verified on."""
    fn, params, x = program_of(["linear", *names, "linear"])
    program, leaves = trace(fn, params, x), jax.tree.leaves(params)
    result = rotate(program, leaves, [x], jax.random.key(len(names)), every=True)
    assert not any("was not rotated" in reason for _, reason in result.refused), (names, result.refused)
    if not result.rotations:
        return
    compare = verifier(program, leaves, [jnp.flip(x, 0) * 1.5])
    assert compare(result.params) <= 1e-5, names
    path, _ = result.rotations[-1].rotated[0]
    at = next(leaf.index for leaf in program.leaves if leaf.path == path)
    if matters(compare, result.params, at):
        with pytest.raises(NotPreserved):
            compare([*result.params[:at], leaves[at], *result.params[at + 1 :]])


def matters(compare, params, at):
    """Whether a parameter has a say in the results."""
    try:
        return compare([*params[:at], np.zeros_like(params[at]), *params[at + 1 :]]) > 1e-3
    except NotPreserved:
        return True


def test_rotations_are_found():
    """The random test would pass if nothing were ever found."""
    for names in (["linear"], ["branch"], ["scan", "norm"]):
        fn, params, x = program_of(["linear", *names, "linear"])
        found = rotate(trace(fn, params, x), jax.tree.leaves(params), [x], jax.random.key(0), every=True)
        assert found.rotations, (names, found.refused)
