"""Methods on specs whose scales are bytes, means or nested: search and compensation find what the format can hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibration import Rows
from qjax.core import quantize
from qjax.ptq.method import Problem
from qjax.ptq.range_search import search_range

K, N = 64, 8
SPECS = [qjax.mxfp4(), qjax.nvfp4(), qjax.fp8_e5m2(group_size=32), qjax.nf4(16, double_quant=True), qjax.ternary(group_size=16),
         qjax.ternary(scale_rule="twn"), qjax.binary(group_size=16)]  # fmt: skip
some = [s if i % 3 == 1 else pytest.param(s, marks=pytest.mark.slow) for i, s in enumerate(SPECS)]
every_spec = pytest.mark.parametrize("spec", some, ids=str)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def state_of(method):
    x = normal(1, 96, K, seed=1) @ normal(K, K, seed=2)
    return method.observer.update(method.observer.init(1, K), Rows(x)), np.float64(x[0])


@every_spec
def test_gptq_makes_up_for_the_errors_of_every_format(spec):
    method = qjax.gptq(mse=False)
    state, x = state_of(method)
    w = normal(K, N).at[:, 3].set(0.0)
    found = method.quantize(Problem(w, spec, (-2,), (), 1, "w"), state).q
    plain = quantize(w, spec, (-2,))
    loss = [np.sum((x @ (np.float64(q.dequantize()) - np.float64(w))) ** 2) for q in (found, plain)]
    assert loss[0] < 0.8 * loss[1]
    assert found.nbytes == plain.nbytes and found.scale.dtype == plain.scale.dtype
    if "binary" not in str(spec):
        assert not found.dequantize()[:, 3].any()


def error(a, b):
    return np.sum(np.abs(np.float64(a) - np.float64(b)) ** 2.4, axis=-1)


@every_spec
def test_a_search_is_never_worse(spec):
    w = jnp.asarray(np.random.default_rng(3).standard_t(3, (12, K)), jnp.float32)
    searched, plain = (qjax.rtn(mse=mse).quantize(Problem(w, spec, (-1,), (), 1, "w")).q.dequantize() for mse in (True, False))
    size = getattr(spec.granularity, "size", K)
    found, usual = (error(q.reshape(-1, size), w.reshape(-1, size)) for q in (searched, plain))
    assert found.sum() < 0.995 * usual.sum()
    if "double_quant" not in str(spec):  # what is searched for is the scale before it is nested
        assert np.all(found <= usual * (1 + 1e-5))


def test_a_shared_exponent_is_the_best_of_three():
    x = np.random.default_rng(4).standard_normal((50, 32)).astype(np.float32) * np.float32(3.0)
    scale, _ = search_range(jnp.asarray(x), qjax.mxfp4())
    usual = np.floor(np.log2(np.abs(x).max(1))) - 2
    levels = np.float64([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    tried = []
    for step in (0, -1, 1):
        s = 2.0 ** (usual + step)[:, None, None]
        nearest = np.min(np.abs(np.abs(np.float64(x))[..., None] - levels * s), axis=-1)
        tried.append(np.sum(nearest**2.4, axis=1))
    np.testing.assert_array_equal(np.log2(scale[:, 0]), usual + np.float64([0, -1, 1])[np.argmin(tried, axis=0)])
    assert len(set(np.argmin(tried, axis=0).tolist())) > 1


def test_gptq_of_a_grouped_convolution_needs_scales_that_stand_alone():
    w = normal(3, 3, 8, 16)
    problem = Problem(w, qjax.floating("e2m1", group_size=8, scale_dtype="e4m3"), (-4, -3, -2), (), 2, "conv/kernel")
    with pytest.raises(ValueError, match=r"gptq cannot round the grouped convolution 'conv/kernel' .* whose scales stand alone"):
        qjax.gptq().shapes(problem)


def test_awq_clips_in_every_format():
    def fn(p, x):
        return x @ p["w"]

    x = normal(32, K, seed=1) * jnp.where(jnp.arange(K) % 16 == 0, 20.0, 1.0)
    w = jnp.asarray(np.random.default_rng(3).standard_t(3, (K, N)), jnp.float32)
    for spec in (qjax.mxfp4(), qjax.nvfp4()):
        policies = [qjax.Policy([qjax.Rule("*", weight=spec, method=m)]) for m in (qjax.awq(), qjax.rtn())]
        clipped, plain = (qjax.quantized(fn)(qjax.quantize(fn, {"w": w}, p, [x]).params, x) for p in policies)
        assert jnp.linalg.norm(clipped - x @ w) < jnp.linalg.norm(plain - x @ w)


def test_experts_and_layers_have_scales_of_their_own():
    """Layers of a scan and experts of a ragged product: packed whole, they are what each is apart."""

    def fn(p, x):
        def step(x, w):
            return x + jax.lax.ragged_dot(x, w, jnp.array([3, 2], jnp.int32)), None

        return jax.lax.scan(step, x, p["w"])[0]

    w, x = normal(2, 2, K, K) / 8 * jnp.float32([1.0, 30.0]).reshape(2, 1, 1, 1), normal(5, K, seed=1)
    for spec in (qjax.nvfp4(), qjax.nf4(16, double_quant=True)):
        params = qjax.quantize(fn, {"w": w}, qjax.Policy([qjax.Rule("*", weight=spec)]), [x]).params
        assert params["w"].nested_scale.shape[:3] == (2, 2, 1)
        apart = jnp.stack([jnp.stack([quantize(e, spec, (0,)).dequantize() for e in layer]) for layer in w])
        np.testing.assert_array_equal(params["w"].dequantize(), apart)
        text = str(jax.make_jaxpr(qjax.quantized(fn))(params, x))
        assert "scan" in text and f"f32[2,2,{K},{K}]" not in text  # no float copy of the stack
        np.testing.assert_allclose(jax.jit(qjax.quantized(fn))(params, x), fn({"w": apart}, x), rtol=1e-5, atol=1e-3)
