"""Layers that are the same product of other arrays are traced once, and lowered once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels import cpu

import qjax
from qjax.program import compat

pytestmark = pytest.mark.skipif(bool(cpu.why_not_loaded()), reason=f"no kernels for CPUs here: {cpu.why_not_loaded()}")
NAMES = ("a", "b", "c", "wide")


def forward(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name].astype(x.dtype)) + x
    return x


def packed(dtype=jnp.float32):
    """Three alike layers of four bits, one of eight; in front of a product their weights are cast where `dtype` is not theirs."""
    draw = np.random.default_rng(0)
    params = {name: jnp.asarray(draw.normal(size=(256, 256)) / 16, jnp.float32) for name in NAMES}
    policy = qjax.Policy([qjax.Rule("wide", weight=qjax.int8()), qjax.Rule("*", weight=qjax.int4(group_size=32))])
    x = jnp.asarray(draw.normal(size=(3, 256)), dtype)
    result = qjax.quantize(forward, params, policy, [x])
    return qjax.prepack(forward)(result.params, x), result.params, x


def products(fn, *args):
    """The bodies of calls that hold a product with derivatives of its own, in order."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            inner = [compat.parts(body)[0] for _, body in compat.subprograms(eqn)]
            if eqn.primitive.name in ("jit", "pjit") and any("custom_vjp" in e.primitive.name for body in inner for e in body.eqns):
                found.append(inner[0])
            else:
                for body in inner:
                    walk(body)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_alike_layers_are_one_body_and_others_are_not(dtype):
    laid, _, x = packed(dtype)
    a, b, c, wide = products(qjax.quantized(forward), laid, x)
    assert a is b and b is c and wide is not a
    text = jax.jit(qjax.quantized(forward)).lower(laid, x).as_text()
    assert text.count("func.func private @run") == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_layer_multiplies_its_own_weight(dtype):
    laid, plain, x = packed(dtype)
    y, want = jax.jit(qjax.quantized(forward))(laid, x), jax.jit(qjax.quantized(forward, kernel="xla"))(plain, x)
    np.testing.assert_allclose(np.float32(y), np.float32(want), atol=1e-5 if dtype == jnp.float32 else 0.06)
    swapped = {**laid, "a": laid["b"], "b": laid["a"]}
    assert np.abs(np.float32(jax.jit(qjax.quantized(forward))(swapped, x)) - np.float32(y)).max() > 0.1


def test_gradients_and_vmap_go_through():
    laid, plain, x = packed()

    def loss(fn, params, x):
        return jnp.sum(jnp.sin(fn(params, x)))

    got = jax.vmap(jax.grad(lambda x: loss(qjax.quantized(forward), laid, x)))(jnp.stack([x, 2 * x]))
    want = jax.vmap(jax.grad(lambda x: loss(qjax.quantized(forward, kernel="xla"), plain, x)))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_a_forced_kernel_keeps_layers_apart_so_that_errors_name_theirs():
    laid, _, x = packed()
    assert products(qjax.quantized(forward, kernel="cpu weight-only"), laid, x) == []
