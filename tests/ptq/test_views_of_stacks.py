"""Stacked parameters that are cast or rearranged before the scan that steps through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from tests.program.cases import normal

GPTQ = qjax.Policy([qjax.Rule("w", weight=qjax.int4(), method=qjax.gptq())])


def forms(w, x):
    """The same model in four ways; w is (3, 8, 8)."""

    def scan(stack, transpose=False):
        return lax.scan(lambda c, w: (jnp.tanh(c @ (w.T if transpose else w)), None), x, stack)[0]

    return {
        "plain": (lambda p, x: scan(p["w"]), w),
        "cast first": (lambda p, x: scan(p["w"].astype(jnp.bfloat16).astype(jnp.float32)), w.astype(jnp.bfloat16).astype(jnp.float32)),
        "stored transposed": (lambda p, x: scan(p["w"].transpose(0, 2, 1)), w.transpose(0, 2, 1)),
        "layers last": (lambda p, x: scan(jnp.moveaxis(p["w"], -1, 0)), jnp.moveaxis(w, 0, -1)),
        "reversed": (
            lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"], reverse=True)[0],
            w[::-1],
        ),
    }


@pytest.mark.parametrize("name", ["cast first", "stored transposed", "layers last", "reversed"])
def test_every_form_gives_the_codes_of_the_plain_one(name):
    w = (0.3 * normal(3, 8, 8)).astype(jnp.bfloat16).astype(jnp.float32)
    x = normal(40, 8, seed=3)
    all_forms = forms(w, x)
    plain_fn, plain_w = all_forms["plain"]
    want = qjax.quantize(plain_fn, {"w": plain_w}, GPTQ, calibration=[x]).params["w"].dequantize()
    fn, stored = all_forms[name]
    packed = qjax.quantize(fn, {"w": stored}, GPTQ, calibration=[x]).params
    got = packed["w"].dequantize()
    if name == "stored transposed":
        got = got.transpose(0, 2, 1)
    elif name == "layers last":
        got = jnp.moveaxis(got, -1, 0)
    elif name == "reversed":
        got = got[::-1]
    # The cast rounds the dequantized weight once more on the way, so the second layer sees other inputs.
    assert (np.asarray(got) == np.asarray(want)).mean() > (0.9 if name == "cast first" else 0.99)
    run = jax.jit(qjax.quantized(fn))(packed, x)
    np.testing.assert_allclose(run, jax.jit(fn)({"w": packed["w"].dequantize()}, x), rtol=1e-5, atol=1e-5)


def test_experts_inside_scanned_layers():
    """Two stacked axes: layers that a scan steps through, experts that share a list of rows."""

    def fn(p, x):
        def layer(x, w):
            return x + jnp.tanh(lax.ragged_dot(x, w, jnp.array([5, 0, 7], jnp.int32))), None

        return lax.scan(layer, x, p["w"])[0]

    params, x = {"w": 0.3 * normal(2, 3, 8, 8)}, normal(12, 8, seed=4)
    result = qjax.quantize(fn, params, GPTQ, calibration=[x])
    notes = [n for row in result.report.rows for n in row.notes]
    assert any("no calibration data but zeros reached it in parts 1" in n and "(layers 0-1)" in n for n in notes)
    rounded = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("w", weight=qjax.int4(), method=qjax.rtn(mse=True))]), calibration=[x])
    want = fn(params, x)
    errors = [float(jnp.sum((jax.jit(qjax.quantized(fn))(r.params, x) - want) ** 2)) for r in (result, rounded)]
    assert errors[0] < errors[1]
    np.testing.assert_array_equal(result.params["w"].dequantize()[:, 1], rounded.params["w"].dequantize()[:, 1])
