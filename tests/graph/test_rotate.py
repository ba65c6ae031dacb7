"""Rotation: what is rotated and refused, that the function stays, and that outlier channels are gone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.graph import find_folds, hadamard, random_orthogonal, rotatable, rotate, rounding, verifier
from qjax.program import trace
from tests.graph.programs import BLOCK, EXAMPLES, layer_norm, rms_norm
from tests.graph.streams import ENDS, STREAMS, TOKENS, decoder, mixed_precision_decoder, relu_decoder, tied_decoder
from tests.program.cases import normal

KEY = jax.random.key(3)


def rotated(fn, params, *inputs, **options):
    program, leaves = trace(fn, params, *inputs), jax.tree.leaves(params)
    result = rotate(program, leaves, jax.tree.leaves(inputs), KEY, **options)
    return result, jax.tree.unflatten(jax.tree.structure(params), result.params)


@pytest.mark.parametrize("stream", [pytest.param(s, marks=[pytest.mark.slow] * (s.name != "scanned_decoder"), id=s.name) for s in STREAMS])
def test_streams(stream):
    """Every parameter that writes or reads the stream is rotated, norms move first, and the function is the same."""
    result, new = rotated(stream.fn, stream.params, TOKENS)
    (rotation,) = result.rotations
    assert dict(rotation.rotated) == stream.rotated
    assert (rotation.scales, rotation.keeps_ones) == (stream.scales, stream.ones)
    assert 0 < result.error < 4e-6
    assert all(reason for _, reason in result.refused) and not {"head", "embed"} & {path for path, _ in result.refused}
    fn = jax.jit(stream.fn)
    np.testing.assert_allclose(fn(new, TOKENS), fn(stream.params, TOKENS), rtol=2e-5, atol=2e-5)
    program, leaves = trace(stream.fn, stream.params, TOKENS), jax.tree.leaves(stream.params)
    changed = {leaf.path for leaf in program.leaves if not np.array_equal(leaves[leaf.index], result.params[leaf.index])}
    folded = {s.path for _, fold in find_folds(program) if not hasattr(fold, "reason") for s in fold.scalings if s.path in stream.scales}
    assert changed >= {*stream.rotated, *stream.scales} - {"positions"} and folded == {*stream.scales}
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(leaves, result.params, strict=True))


def test_by_hand():
    """One layer against the formula, in float64: scales into the readers, then R on what writes and R^T on what reads."""

    def fn(p, tokens):
        x = p["embed"][tokens]
        x = x + jnp.tanh(rms_norm(x, p["g"]) @ p["in"]) @ p["out"]
        return x @ p["head"]

    p = {"embed": normal(7, 6), "g": 1 + 0.3 * normal(6, seed=1), "head": normal(6, 3), "in": normal(6, 5), "out": normal(5, 6)}
    result, new = rotated(fn, p, TOKENS)
    r, kind = random_orthogonal(6, jax.random.fold_in(KEY, _number(fn, p)), False)
    assert result.rotations[0].kind == kind == "orthogonal"
    wide = {name: np.asarray(w, np.float64) for name, w in p.items()}
    want = {
        "embed": wide["embed"] @ r,
        "g": np.ones(6),
        "head": r.T @ wide["head"],
        "in": r.T @ (wide["g"][:, None] * wide["in"]),
        "out": wide["out"] @ r,
    }
    for name, value in want.items():
        np.testing.assert_allclose(new[name], value, rtol=1e-5, atol=1e-6)


def _number(fn, p):
    even = {1: {0: frozenset({1})}}
    return next(i for i, axes in enumerate(rotatable(trace(fn, p, TOKENS), even)) if axes.sums)


@pytest.mark.parametrize(
    ("fn", "params", "path", "reason"),
    [
        (tied_decoder, {"embed": normal(7, 12), "layer": BLOCK, "norm": ENDS["norm"]}, "embed", "norm scales it and cannot move"),
        (lambda p, t: layer_norm(p["e"][t] + jnp.tanh(p["e"][t] @ p["a"]) @ p["b"], p["g"], p["b2"]) @ p["h"] + p["g"].sum(),
         {"e": normal(7, 4), "a": normal(4, 4), "b": normal(4, 4), "g": 1 + normal(4), "b2": normal(4), "h": normal(4, 2)},
         "h", "g scales"),
        (lambda p, t: (lambda x: jax.nn.gelu(x + x @ p["a"]) @ p["h"])(p["e"][t]),
         {"e": normal(7, 4), "a": normal(4, 4), "h": normal(4, 2)}, "a", "`integer_pow`; `tanh`"),
        (lambda p, t: (lambda x: jnp.concatenate([x + x @ p["a"], x], -1) @ p["h"])(p["e"][t]),
         {"e": normal(7, 4), "a": normal(4, 4), "h": normal(8, 2)}, "a", "`concatenate`, which takes a part of it"),
        (lambda p, t: (lambda x: (x + x @ p["a"])[..., :2] @ p["h"])(p["e"][t]),
         {"e": normal(7, 4), "a": normal(4, 4), "h": normal(2, 2)}, "a", "`slice`, which takes a part of it"),
        (lambda p, t: (lambda x: (x + x @ p["a"]) @ p["h"] + x.max())(p["e"][t]),
         {"e": normal(7, 4), "a": normal(4, 4), "h": normal(4, 2)}, "h", "`reduce_max`"),
        (lambda p, t: (lambda x: (x + x @ p["a"] + jnp.arange(4.0)) @ p["h"])(p["e"][t]),
         {"e": normal(7, 4), "a": normal(4, 4), "h": normal(4, 2)}, "h", "`iota`"),
        (lambda p, t: (lambda x: (x + x @ p["a"] + np.arange(4.0, dtype=np.float32)) @ p["h"])(p["e"][t]),
         {"e": normal(7, 4), "a": normal(4, 4), "h": normal(4, 2)}, "h", "a constant"),
        (lambda p, t: (lambda x: x + x @ p["a"])(p["e"][t]), {"e": normal(7, 4), "a": normal(4, 4)}, "a", "an output of the program"),
        (lambda p, t: jnp.tanh(p["e"][t] @ p["a"]) @ p["h"], {"e": normal(7, 4), "a": normal(4, 4), "h": normal(4, 2)}, "a", "no residual"),
    ],
)  # fmt: skip
def test_refused(fn, params, path, reason):
    result, new = rotated(fn, params, TOKENS)
    assert not result.rotations and result.error == 0
    assert all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True))
    assert reason in dict(result.refused)[path], result.refused


@pytest.mark.slow
def test_a_tied_head_whose_norm_has_one_scale_rotates():
    """Nothing has to move then; and with a scale for each channel it rotates once the head has a leaf of its own."""
    p = {"embed": normal(7, 12), "layer": BLOCK, "norm": jnp.full(12, 0.5)}
    result, _ = rotated(tied_decoder, p, TOKENS)
    assert dict(result.rotations[0].rotated)["embed"] == (1,) and result.error < 4e-6
    untied = {"embed": p["embed"], "layers": [BLOCK], "norm": ENDS["norm"], "head": p["embed"].T}
    assert len(rotated(decoder, untied, TOKENS)[0].rotations) == 1


@pytest.mark.slow
def test_a_zero_scale_is_not_divided_by():
    stream = STREAMS[0]
    params = stream.params | {"norm": stream.params["norm"].at[3].set(0)}
    result, _ = rotated(stream.fn, params, TOKENS)
    assert "norm scales it and has a zero" in dict(result.refused)["head"]


@pytest.mark.slow
def test_bfloat16():
    layers = [{"norm": jnp.ones(16), "in": 0.3 * normal(16, 8), "out": 0.3 * normal(8, 16)} for _ in range(2)]
    p = {"embed": normal(7, 16), "layers": layers, "head": normal(16, 4)}
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
    for params in (p, half):
        result, new = rotated(mixed_precision_decoder, params, TOKENS)
        assert result.rotations[0].kind == "hadamard" and result.error < 0.05
        assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True))


@pytest.mark.slow
def test_every_rotates_what_no_sum_ties():
    """Queries with their keys and values, head by head, and those of a linear bottleneck; the stream of the examples is an input."""
    example = next(e for e in EXAMPLES if e.name == "pre_norm_block")
    result, _ = rotated(example.fn, example.params, *example.inputs, every=True)
    assert [r.rotated for r in result.rotations] == [(("k", (2,)), ("q", (2,))), (("o", (0,)), ("v", (1, 2)))]
    assert "an input of the program" in dict(result.refused)["q"]
    p = {"a": normal(4, 6), "b": normal(6, 3)}
    assert rotated(lambda p, x: x @ p["a"] @ p["b"], p, normal(5, 4), every=True)[0].rotations[0].rotated == (("a", (1,)), ("b", (0,)))


@pytest.mark.slow
@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.name in ("conv_net", "post_norm_block", "bare_residual", "relu6")], ids=str)
def test_examples_without_a_stream(example):
    result, _ = rotated(example.fn, example.params, *example.inputs)
    assert not result.rotations
    assert {path for path, _ in result.refused} >= {" ".join(name.split()).split()[0] for name in example.expected}


@pytest.mark.slow
def test_a_convolutional_stream():
    """A 1x1 residual network without a function on its stream: channels are the last axis of images."""

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def fn(p, x):
        x = conv(x, p["in"])
        x = x + conv(jax.nn.relu(conv(x, p["a"])), p["b"])
        return x.mean((1, 2)) @ p["head"]

    p = {"in": normal(3, 3, 3, 8), "a": normal(3, 3, 8, 4), "b": normal(3, 3, 4, 8), "head": normal(8, 2)}
    result, _ = rotated(fn, p, normal(2, 5, 5, 3))
    assert dict(result.rotations[0].rotated) == {"in": (3,), "a": (2,), "b": (3,), "head": (0,)}


@pytest.mark.slow
def test_wrong_rotations_are_caught():
    """Each parameter of the class left out in turn: the verification refuses what the analysis would have to get wrong."""
    stream = STREAMS[0]
    program, leaves = trace(stream.fn, stream.params, TOKENS), jax.tree.leaves(stream.params)
    result = rotate(program, leaves, [TOKENS], KEY)
    compare = verifier(program, leaves, [TOKENS])
    paths = {leaf.path: leaf.index for leaf in program.leaves}
    for path, _ in result.rotations[0].rotated:
        wrong = list(result.params)
        wrong[paths[path]] = leaves[paths[path]]
        with pytest.raises(ValueError, match="more than rounding explains"):
            compare(wrong)


@pytest.mark.slow
def test_what_is_not_accepted_leaves_everything_as_it_was():
    stream = STREAMS[0]
    result, new = rotated(stream.fn, stream.params, TOKENS, tolerance=0.0)
    assert not result.rotations and "its input was not rotated: the results differ" in dict(result.refused)["head"]
    assert all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(stream.params), strict=True))


@pytest.mark.slow
def test_keys_decide():
    stream = STREAMS[0]
    program, leaves = trace(stream.fn, stream.params, TOKENS), jax.tree.leaves(stream.params)
    a, b, c = (rotate(program, leaves, [TOKENS], jax.random.key(seed)).params for seed in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) and not np.array_equal(a[0], c[0])
    assert rounding(program) == 64 * 2.0**-23


def test_packed_parameters_are_refused_by_name():
    program = trace(decoder, STREAMS[0].params, TOKENS)
    leaves = [w if i else "packed" for i, w in enumerate(jax.tree.leaves(STREAMS[0].params))]
    with pytest.raises(TypeError, match="'embed' is a str: rotate the float parameters"):
        rotate(program, leaves, [TOKENS], KEY)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 56, 160])
def test_hadamard(size):
    h = hadamard(size)
    assert h is not None and set(np.unique(h)) <= {-1.0, 1.0} and (h[:, 0] == 1).all()
    np.testing.assert_array_equal(h @ h.T, size * np.eye(size))


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("size", [1, 3, 6, 8, 12, 50])
def test_orthogonal(size, keeps_ones):
    r, kind = random_orthogonal(size, KEY, keeps_ones)
    np.testing.assert_allclose(r @ r.T, np.eye(size), atol=1e-12)
    assert (kind == "hadamard") == (hadamard(size) is not None)
    if keeps_ones:
        np.testing.assert_allclose(r.sum(0), 1, atol=1e-12)


@pytest.mark.slow
def test_planted_outliers_are_spread():
    """Two channels of the stream are a hundred times as large, and what reads them has weights as much smaller: 8 bits for all channels
    then leave little of the others. After the rotation none stands out."""
    big = jnp.ones(64).at[jnp.array([2, 7])].set(100.0)

    def layer(seed):
        w = {"norm": 1 + 0.1 * normal(64, seed=seed), "in": 0.2 * normal(64, 32, seed=seed + 1), "out": 0.2 * normal(32, 64, seed=seed + 2)}
        return w | {"in": w["in"] / big[:, None], "out": w["out"] * big}

    p = {"embed": normal(50, 64) * big, "layers": [layer(1), layer(5)], "norm": jnp.ones(64), "head": normal(64, 9, seed=9) / big[:, None]}
    tokens = jnp.arange(50).reshape(5, 10)
    result, new = rotated(relu_decoder, p, tokens)
    assert result.error < 7.7e-6 and len(result.rotations) == 1

    def kurtosis(p):
        x = np.asarray(p["embed"], np.float64)
        return np.mean(x**4) / np.mean(x**2) ** 2

    assert kurtosis(p) > 50 and kurtosis(new) < 5
    want = relu_decoder(p, tokens)
    rule = qjax.Rule("*", weight=qjax.int8(), activation=qjax.static(qjax.int8()))
    policy = qjax.Policy([qjax.Rule("embed", weight=None), rule])
    errors = []
    for params in (p, new):
        packed = qjax.quantize(relu_decoder, params, policy, calibration=[tokens]).params
        got = jax.jit(qjax.quantized(relu_decoder))(packed, tokens)
        errors.append(float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)))
    assert errors[1] < 0.5 * errors[0], errors
