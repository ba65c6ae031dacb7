"""`view(q).dequantize()` must equal the same view of `q.dequantize()` exactly, or be None."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import assemble, bf16, int4, int8, mxfp4, nf4, nvfp4, quantize, uint4, views
from tests.parameters import every_other


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def with_permutation(q):
    k = q.codes_unpacked().shape[-1]
    lead = (q.codes.shape[0],) + (1,) * (q.codes.ndim - 2)
    perm = np.random.default_rng(1).permuted(np.broadcast_to(np.arange(k), (*lead, k)), axis=-1)
    return assemble(q.codes_unpacked(), q.scale, q.zero_point, q.spec, q.axes, q.sizes, q.dtype, perm=perm)


def with_input_scale(q):
    k = q.codes_unpacked().shape[-1]
    scale = np.random.default_rng(2).uniform(0.1, 10, (q.codes.shape[0],) + (1,) * (q.codes.ndim - 2) + (k,))
    return dataclasses.replace(q, input_scale=jnp.asarray(scale, jnp.float32))


TENSORS = {
    "kernel": quantize(normal(12, 10), int4(group_size=4), (0,)),
    "embedding": quantize(normal(10, 12), nf4(4), (-1,)),
    "stacked": quantize(normal(3, 8, 6), uint4(group_size=4), (-2,), stacked=(0,)),
    "stacked per tensor": quantize(normal(3, 8, 2, 6), int8(per="tensor"), (1,), stacked=(0,)),
    "one scale": quantize(normal(4, 6, 10), int4(per="tensor"), (1,)),
    "heads out": quantize(normal(12, 4, 6), int4(group_size=6), (0,)),
    "heads in": quantize(normal(4, 6, 10), int4(group_size=8), (0, 1)),
    "heads in, other order": quantize(normal(4, 6, 10), int4(group_size=8), (1, 0)),
    "conv": quantize(normal(3, 1, 4, 6), int4(), (0, 1, 2)),
    "blocks": quantize(normal(8, 3, 12), int4(block=(4, 4)), (0,)),
    "nested": quantize(normal(12, 10), nf4(4, double_quant=True), (0,)),
    "nested, heads": quantize(normal(12, 4, 6), nf4(6, double_quant=True), (0,)),
    "nested, stacked": quantize(normal(3, 8, 2, 6), nf4(4, double_quant=True), (1,), stacked=(0,)),
    "scale of the tensor": quantize(normal(3, 16, 4), nvfp4(), (1,), stacked=(0,)),
    "powers of two": quantize(normal(3, 16, 4), mxfp4(pad=True), (1,)),
    "padded": quantize(normal(10, 4), int4(group_size=4, pad=True), (0,)),
    "cast": quantize(normal(6, 4, 5), bf16(), (0, 2)),
    "act-order": with_permutation(quantize(normal(3, 8, 6), uint4(group_size=4), (-2,), stacked=(0,))),
    "ones": quantize(normal(1, 6, 1, 4), int4(), (0, 1)),
    "input scale": with_input_scale(with_permutation(quantize(normal(3, 4, 2, 6), uint4(group_size=4), (1, 2), stacked=(0,)))),
}


def divisor_split(rng, n):
    d = int(rng.choice([d for d in range(1, n + 1) if n % d == 0]))
    return [d, n // d]


def random_view(rng, shape):
    """A view as (function on a QTensor, function on an array)."""
    match rng.integers(6):
        case 0:
            order = tuple(int(i) for i in rng.permutation(len(shape)))
            return (lambda q: views.transpose(q, order)), (lambda w: jax.lax.transpose(w, order))
        case 1:  # split one axis or merge two neighbours, and sprinkle an axis of size 1
            new, i = list(shape), int(rng.integers(len(shape)))
            if rng.random() < 0.5:
                new[i : i + 1] = divisor_split(rng, shape[i])
            elif i + 1 < len(shape):
                new[i : i + 2] = [shape[i] * shape[i + 1]]
            if rng.random() < 0.3:
                new.insert(int(rng.integers(len(new) + 1)), 1)
            return (lambda q: views.reshape(q, new)), (lambda w: w.reshape(new))
        case 2:
            ones = [i for i, n in enumerate(shape) if n == 1]
            dims = [i for i in ones if rng.random() < 0.7]
            return (lambda q: views.squeeze(q, dims)), (lambda w: jax.lax.squeeze(w, dims))
        case 3:
            n, new = len(shape), list(shape)
            at = int(rng.integers(n + 1))
            new.insert(at, 1)
            dims = [i + (i >= at) for i in range(n)]
            return (lambda q: views.broadcast_in_dim(q, new, dims)), (lambda w: jax.lax.broadcast_in_dim(w, new, dims))
        case 4:
            start, limit, steps = [0] * len(shape), list(shape), [1] * len(shape)
            i = int(rng.integers(len(shape)))
            start[i] = int(rng.integers(shape[i]))
            limit[i] = int(rng.integers(start[i] + 1, shape[i] + 1))
            steps[i] = int(rng.integers(1, 3))
            return (lambda q: views.slice(q, start, limit, steps)), (lambda w: jax.lax.slice(w, start, limit, steps))
        case _:
            starts, sizes = [jnp.int32(0)] * len(shape), list(shape)
            i = int(rng.integers(len(shape)))
            sizes[i] = int(rng.integers(1, shape[i] + 1))
            starts[i] = jnp.int32(
                rng.integers(-2, shape[i] + 2)
            )  # out of bounds is clamped, negative counts from the end
            return (lambda q: views.dynamic_slice(q, starts, sizes)), (
                lambda w: jax.lax.dynamic_slice(w, starts, sizes)
            )


@pytest.mark.parametrize("name", every_other(TENSORS))
def test_random_chains(name):
    done = []

    def chain(q, seed):
        rng, w = np.random.default_rng(seed), q.dequantize()
        for _ in range(5):
            on_packed, on_array = random_view(rng, w.shape)
            viewed = on_packed(q)
            if viewed is not None:
                q, w = viewed, on_array(w)
                assert q.shape == w.shape
                done.append(seed)
        return q.dequantize(), w

    for seed in range(8):
        np.testing.assert_array_equal(*jax.jit(chain, static_argnums=1)(TENSORS[name], seed))
    assert len(done) > 12


@pytest.mark.parametrize("name", TENSORS)
def test_every_transpose_is_possible_and_exact(name):
    q = TENSORS[name]
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(q.ndim)
        np.testing.assert_array_equal(views.transpose(q, order).dequantize(), jnp.transpose(q.dequantize(), order))


POSSIBLE = [
    ("kernel", lambda q: views.reshape(q, (3, 4, 10)), (-3, -2)),
    ("kernel", lambda q: views.reshape(q, (12, 5, 2)), (-3,)),
    ("kernel", lambda q: views.reshape(q, (1, 12, 10)), (-2,)),
    ("heads in", lambda q: views.reshape(q, (24, 10)), (-2,)),
    ("heads in", lambda q: views.reshape(q, (8, 3, 10)), (-3, -2)),
    ("heads out", lambda q: views.reshape(q, (12, 24)), (-2,)),
    ("stacked per tensor", lambda q: views.reshape(q, (3, 8, 12)), (-2,)),
    ("one scale", lambda q: views.reshape(q, (2, 2, 6, 10)), (-2,)),
    ("blocks", lambda q: views.slice(q, (0, 0, 4), (8, 3, 12)), (-3,)),
    ("blocks", lambda q: views.dynamic_slice(q, [jnp.int32(0), jnp.int32(1), jnp.int32(0)], (8, 1, 12)), (-3,)),
    ("conv", lambda q: views.squeeze(q, (1,)), (-3, -2)),
    ("act-order", lambda q: views.reshape(q, (3, 2, 4, 6)), (-3, -2)),
    ("act-order", lambda q: views.slice(q, (1, 0, 0), (2, 8, 6)), (-2,)),
    ("padded", lambda q: views.reshape(q, (5, 2, 4)), (-3, -2)),
]


@pytest.mark.parametrize(("name", "view", "axes"), POSSIBLE)
def test_what_must_be_possible(name, view, axes):
    q = view(TENSORS[name])
    assert q is not None and q.axes == axes


IMPOSSIBLE = [
    ("kernel", lambda q: views.reshape(q, (120,))),
    ("kernel", lambda q: views.reshape(q, (10, 12))),
    ("kernel", lambda q: views.reshape(q, (7, 7))),
    ("heads in", lambda q: views.reshape(q, (4, 60))),
    ("heads in, other order", lambda q: views.reshape(q, (24, 10))),
    ("stacked", lambda q: views.reshape(q, (24, 6))),
    ("blocks", lambda q: views.reshape(q, (8, 36))),
    ("blocks", lambda q: views.reshape(q, (8, 3, 3, 4))),
    ("kernel", lambda q: views.slice(q, (0, 0), (6, 10))),
    ("kernel", lambda q: views.slice(q, (0, 0), (12, 10), (2, 1))),
    ("act-order", lambda q: views.slice(q, (0, 1, 0), (3, 8, 6))),
    ("blocks", lambda q: views.slice(q, (0, 0, 2), (8, 3, 12))),
    ("blocks", lambda q: views.slice(q, (0, 0, 0), (8, 3, 12), (1, 1, 2))),
    ("blocks", lambda q: views.dynamic_slice(q, [jnp.int32(0)] * 3, (8, 3, 4))),
    ("kernel", lambda q: views.dynamic_slice(q, [jnp.int32(0)] * 2, (6, 10))),
    ("kernel", lambda q: views.broadcast_in_dim(q, (3, 12, 10), (1, 2))),
    ("ones", lambda q: views.broadcast_in_dim(q, (1, 6, 5, 4), (0, 1, 2, 3))),
]


@pytest.mark.parametrize(("name", "view"), IMPOSSIBLE)
def test_what_needs_numbers_is_none(name, view):
    assert view(TENSORS[name]) is None


def test_layers_by_index_inside_a_loop():
    """`w[i]` is a dynamic slice and a squeeze: no turn of the loop touches more than one packed layer."""
    q, x = TENSORS["act-order"], normal(2, 8)

    def layer(i):
        return views.squeeze(views.dynamic_slice(q, (i, jnp.int32(0), jnp.int32(0)), (1, 8, 6)), (0,))

    total = jax.lax.fori_loop(0, 3, lambda i, c: c + x @ layer(i).dequantize(), jnp.zeros((2, 6)))
    np.testing.assert_allclose(total, sum(x @ w for w in q.dequantize()), rtol=1e-5, atol=1e-5)


def test_views_move_no_float_array():
    q = TENSORS["heads out"]
    jaxpr = jax.make_jaxpr(lambda q: views.transpose(views.reshape(q, (3, 4, 4, 6)), (3, 2, 1, 0)))(q)
    floats = [v.aval.size for e in jaxpr.eqns for v in e.outvars if v.aval.dtype == jnp.float32]
    assert floats and max(floats) == q.scale.size
