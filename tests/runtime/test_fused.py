"""Several weights that meet one input, multiplied in one product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels import cpu

import qjax
from qjax.core import quantize
from qjax.program import trace
from qjax.runtime import fused_sites
from qjax.runtime.fused import why_not_together
from tests.program.cases import normal

pytestmark = pytest.mark.skipif(bool(cpu.why_not_loaded()), reason=f"no kernels for CPUs here: {cpu.why_not_loaded()}")
D = 128
CALL = 'custom_call_target="qjax'


def attention(p, x):
    q, k, v = x @ p["q"], jnp.einsum("bd,dhk->bhk", x, p["k"]), x @ p["v"]
    return jnp.concatenate([q, k.reshape(x.shape[0], -1), v], axis=-1) @ p["o"]


def float_params():
    return {"q": normal(D, 160), "k": normal(D, 4, 40, seed=1), "v": normal(D, 192, seed=2), "o": normal(512, 64, seed=3)}


def calls(fn, *arguments):
    compiled = jax.jit(fn).lower(*arguments).compile()
    return compiled, (compiled.as_text() or "").count(CALL)


def test_one_product_for_all_that_read_one_value_each_leaf_for_itself(tmp_path):
    x, act = normal(3, D, seed=5), qjax.static(qjax.int8())
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.uint4(group_size=32), activation=act)])
    params = qjax.quantize(attention, float_params(), policy, calibration=[x]).params
    thin = qjax.Adapter(normal(192, 2, seed=6), normal(1, 2, D, seed=7))
    params["v"] = params["v"].with_adapter(thin)
    apart, laid = (qjax.prepack(attention, fuse=fuse)(params, x) for fuse in (False, True))
    assert fused_sites(laid) == (("q", "k", "v"),) and fused_sites(apart) == ()
    assert "one product of q, k, v" in str(laid["k"]) and laid["q"].laid is laid["k"].laid
    assert sum(q.nbytes for q in laid.values()) == sum(q.nbytes for q in apart.values())
    for name, q in params.items():
        np.testing.assert_array_equal(laid[name].dequantize(), q.dequantize())

    def loss(p, x, kernel=None):
        y = qjax.quantized(attention, kernel=kernel)(p, x)
        return jnp.sum(jnp.sin(y / 300)), y

    compiled, count = calls(jax.grad(loss, argnums=1, has_aux=True), laid, x)
    assert count == 2  # forward; backward is the float product's
    got = compiled(laid, x)
    want = jax.jit(lambda p, x: jax.grad(loss, argnums=1, has_aux=True)(p, x, "xla"))(params, x)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)
    qjax.save(tmp_path / "checkpoint", laid)
    for name, q in qjax.load(tmp_path / "checkpoint").params.items():
        np.testing.assert_array_equal(q.codes, params[name].codes)


def test_layers_of_a_scan_and_old_codes():
    def fn(p, x):
        def layer(x, w):
            return jax.nn.silu(x @ w["gate"]) * (x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, p)[0]

    shapes = {"gate": (2, D, 144), "up": (2, D, 144), "down": (2, 144, D)}
    params = {n: quantize(0.1 * normal(*s, seed=i), qjax.int4(), (1,), (0,)) for i, (n, s) in enumerate(shapes.items())}
    x = normal(3, D, seed=5)
    want = jax.jit(qjax.quantized(fn, kernel="xla"))(params, x)
    laid = qjax.prepack(fn, fuse=True, donate=True)(params, x)
    assert fused_sites(laid) == (("gate", "up"),) and all(q.codes.is_deleted() for q in params.values())
    compiled, count = calls(qjax.quantized(fn), laid, x)
    assert count == 2
    np.testing.assert_allclose(compiled(laid, x), want, rtol=1e-4, atol=1e-5)


def test_what_stands_alone_and_why():
    x, params = normal(3, D), {n: quantize(w, qjax.int4(), (0,)) for n, w in float_params().items()}
    program = trace(attention, params, x)
    leaves = {leaf.path: leaf for leaf in program.leaves}

    def reason(**change):
        return why_not_together(leaves["v"], dataclasses.replace(params["v"], **change), leaves["q"], params["q"])

    assert reason() == ""
    assert "int4" in reason(spec=qjax.int8()) and "dynamic" in reason(act=qjax.dynamic(qjax.int8()))
    assert "divided" in reason(input_scale=jnp.ones((1, D)))
    assert "range of its activations" in reason(act_scale=jnp.ones((1, 1)))
    mixed = {**params, "q": quantize(float_params()["q"], qjax.int8(), (0,))}
    assert fused_sites(qjax.prepack(attention, fuse=True)(mixed, x)) == (("k", "v"),)

    def cast(p, x):  # the same numbers, but another value: it would be multiplied twice
        return x @ p["q"], x.astype(jnp.bfloat16).astype(jnp.float32) @ p["v"]

    two = {n: params[n] for n in ("q", "v")}
    assert fused_sites(qjax.prepack(cast, fuse=True)(two, x)) == ()
