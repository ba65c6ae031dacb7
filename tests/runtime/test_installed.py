"""The kernels that come with the package, through `qjax.quantized`: on this machine, and compiled for others."""

import concurrent.futures
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels import cpu
from qjax_kernels.gpu.order import by_threads
from qjax_kernels.request import Request, Weight

import qjax
from qjax.core import quantize
from qjax.models import Llama, books_llama, init_cache, prepacked
from qjax.runtime import Device, fused_sites, installed_kernels
from qjax.runtime.kernels import Codes
from qjax.runtime.request import Operands
from tests.program.cases import normal

needs_cpu = pytest.mark.skipif(bool(cpu.why_not_loaded()), reason=f"no kernels for CPUs here: {cpu.why_not_loaded()}")
N, K = 144, 136  # no multiples of the kernels' blocks


def product(p, x):
    return x @ p["w"]


SPECS = [qjax.int4(group_size=8), qjax.int8(), qjax.uint4(group_size=34), qjax.nf4(group_size=17), qjax.int3(), qjax.uint2()]


@needs_cpu
@pytest.mark.parametrize("spec", [*SPECS, qjax.mxfp4(pad=True)], ids=str)
def test_weight_only_on_this_cpu(spec):
    params, x = {"w": quantize(normal(K, N), spec, (0,))}, normal(3, K, seed=1)
    laid = qjax.prepack(product)(params, x)
    assert laid["w"].codes.size == 0
    np.testing.assert_array_equal(laid["w"].dequantize(), params["w"].dequantize())
    compiled = jax.jit(qjax.quantized(product)).lower(laid, x).compile()
    text = compiled.as_text() or ""
    assert "qjax_cpu" in text
    assert not re.search(rf"f32\[(?:{N},{K}|{K},{N})\]", text), "a float copy of the weight"
    want = np.asarray(x, np.float64) @ np.asarray(params["w"].dequantize(), np.float64)
    np.testing.assert_allclose(compiled(laid, x), want, rtol=1e-5, atol=1e-4)


@needs_cpu
@pytest.mark.parametrize("rule", ["half", "full"])
def test_rounded_activations_on_this_cpu_are_those_of_the_reference(rule):
    act = qjax.dynamic(qjax.int8(scale_rule=rule))
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(group_size=8), activation=act)])
    x = normal(5, K, seed=1).at[2].set(0)
    result = qjax.quantize(product, {"w": normal(K, N)}, policy, calibration=[x])
    assert result.report.rows[0].kernel == "cpu int8" and "cpu int8" in str(result.report)
    laid = qjax.prepack(product)(result.params, x)
    got = jax.jit(qjax.quantized(product))(laid, x)
    want = jax.jit(qjax.quantized(product, kernel="xla"))(result.params, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not np.any(got[2])


@needs_cpu
def test_a_small_model_keeps_to_xla_and_says_why():
    report = qjax.sites(product, qjax.Policy([qjax.Rule("*", weight=qjax.int4())]))({"w": jnp.ones((8, 4))}, jnp.ones((2, 8)))
    assert report.rows[0].kernel == "xla"
    assert "cpu weight-only: a weight of 4 x 8 is too small to gain: 16384 values at least" in report.rows[0].kernel_reasons


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("act", [None, qjax.dynamic(qjax.int8())], ids=["float", "int8"])
def test_programs_for_tpus_hold_their_kernels(chip, act):
    device = Device("tpu", chip)
    rule = qjax.Rule("*", weight=qjax.int4(group_size=128), activation=act)
    x = normal(16, 256).astype(jnp.bfloat16)
    params = qjax.quantize(product, {"w": normal(256, 128).astype(jnp.bfloat16)}, qjax.Policy([rule]), calibration=[x]).params
    laid = qjax.prepack(product, device=device)(params, x)
    assert laid["w"].laid["codes"].dtype == jnp.int4 and laid["w"].laid["codes"].shape == (256, 128)
    traced = jax.jit(qjax.quantized(product, device=device)).trace(laid, x)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_fp8_is_for_the_chip_that_multiplies_it():
    x = normal(16, 256).astype(jnp.bfloat16)
    params = {"w": quantize(normal(256, 128).astype(jnp.bfloat16), qjax.fp8_e4m3(), (0,))}
    for chip, there in (("tpu7x", True), ("v6e", False)):
        device = Device("tpu", chip)
        laid = qjax.prepack(product, device=device)(params, x)
        np.testing.assert_array_equal(laid["w"].dequantize(), params["w"].dequantize())
        traced = jax.jit(qjax.quantized(product, device=device)).trace(laid, x)
        assert ("tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()) == there


def test_programs_for_hopper_hold_their_kernel():
    pytest.importorskip("absl")
    device = Device("cuda", "sm_90a", 132)
    x = normal(16, 1024).astype(jnp.bfloat16)
    params = {"w": quantize(normal(1024, 128).astype(jnp.bfloat16), qjax.int4(group_size=128), (0,))}
    laid = qjax.prepack(product, device=device)(params, x)
    assert laid["w"].laid["codes"].dtype == jnp.int4
    traced = jax.jit(qjax.quantized(product, device=device, kernel="hopper weight-only")).trace(laid, x)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_rounded_rows_go_to_hopper_padded_to_the_blocks_that_are_copied(monkeypatch):
    """Neighbouring blocks share what they copy above 128 rows, so scales reach to the end of the last pair of blocks."""
    pytest.importorskip("absl")
    from qjax_kernels.gpu import eight_bit_kernel

    seen, kernel = [], eight_bit_kernel.eight_bit

    def spy(rows, scales, *args, tiles, **settings):
        seen.append((rows.shape, scales.shape, tiles))
        return kernel(rows, scales, *args, tiles=tiles, **settings)

    monkeypatch.setattr(eight_bit_kernel, "eight_bit", spy)
    device, x = Device("cuda", "sm_90a", 4), jnp.ones((261, 512), jnp.bfloat16)  # so few that blocks of 256 rows of w occupy them
    weight = quantize(jnp.ones((512, 256), jnp.bfloat16), qjax.int8(), (0,))
    params = {"w": dataclasses.replace(weight, act=qjax.dynamic(qjax.int8()))}
    laid = qjax.prepack(product, device=device)(params, x)
    traced = jax.jit(qjax.quantized(product, device=device, kernel="hopper 8 bit")).trace(laid, x)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert {(rows, scales) for rows, scales, _ in seen} == {((264, 512), (512,))} and all(tiles.cluster == 2 for *_, tiles in seen)


@pytest.mark.parametrize("spec", [qjax.int8(), qjax.int8(scale_rule="full"), qjax.fp8_e4m3(), qjax.int8(scale_dtype="bfloat16")], ids=str)
def test_rows_are_rounded_by_a_kernel_where_it_rounds_as_the_spec_says(spec):
    pytest.importorskip("absl")
    device, x = Device("cuda", "sm_90a", 132), jnp.ones((261, 512), jnp.bfloat16)
    weight = quantize(jnp.ones((512, 256), jnp.bfloat16), spec, (0,))
    params = {"w": dataclasses.replace(weight, act=qjax.dynamic(spec))}
    laid = qjax.prepack(product, device=device)(params, x)
    traced = jax.jit(qjax.quantized(product, device=device, kernel="hopper 8 bit")).trace(laid, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == (1 if spec.scale_dtype == "bfloat16" else 2), "rounding is one kernel, the product another"




def test_gpus_that_no_kernel_is_written_for_multiply_by_groups():
    device, x = Device("cuda", "sm_80"), jax.ShapeDtypeStruct((2, 4096), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16)
    params = {"w": jax.eval_shape(functools.partial(quantize, spec=qjax.int4(group_size=128), axes=(0,)), w)}
    laid = jax.eval_shape(qjax.prepack(product, device=device), params, x)
    run = jax.jit(qjax.quantized(product, device=device, kernel="cuda by groups"))
    text = run.trace(laid, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<2048x32x128xbf16>" in text and "tensor<32x2x2048xf32>" in text  # codes by group, sums by group


@pytest.mark.parametrize("group", [128, 32, 24])
def test_codes_of_four_bits_lie_by_threads_on_gpus_where_groups_have_whole_blocks(group):
    """Products by groups are plain jax, so that they run here."""
    kernel = next(kernel for kernel in installed_kernels("cuda") if kernel.name == "cuda by groups")
    weight, (m, n, k) = Weight("int", 4, group), (2, 40, 384)
    draw = np.random.default_rng(0)
    codes, scale = jnp.asarray(draw.integers(-8, 8, (n, k)), jnp.int8), jnp.asarray(draw.uniform(0.5, 1.5, (n, k // group)), jnp.float32)
    laid = kernel.layout.pack(weight, Codes(codes, scale, None, None))
    assert laid["codes"].dtype == jnp.int4
    np.testing.assert_array_equal(laid["codes"].astype(jnp.int8), by_threads(codes) if group % 32 == 0 else codes)
    back = kernel.layout.unpack(weight, k, laid)
    np.testing.assert_array_equal(back.codes, codes)
    np.testing.assert_array_equal(back.scale, scale)
    x = jnp.asarray(draw.normal(size=(m, k)), jnp.float32)
    y = kernel.run(Request(Device("cuda", "sm_80"), m, n, k, weight, "float32"), Operands(x, None, None, None, None, laid), None)
    np.testing.assert_allclose(y, np.float64(x) @ (np.float64(codes) * np.repeat(np.float64(scale), group, 1)).T, rtol=1e-4, atol=1e-4)


def test_every_platform_has_kernels():
    assert all(installed_kernels(platform) for platform in ("cpu", "cuda", "tpu")) and installed_kernels("METAL") == ()
    with pytest.raises(ValueError, match=r"`kernel` 'tpu int8' is for tpu, and the program for cpu: give a qjax.Device\('tpu', ...\)"):
        qjax.quantized(product, kernel="tpu int8", device=qjax.Device("cpu", "avx2"))({"w": jnp.ones((4, 4))}, jnp.ones((2, 4)))


@needs_cpu
def test_the_report_says_that_weights_have_to_be_laid_out():
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4())])
    report = qjax.sites(product, policy)({"w": jnp.ones((K, N))}, jnp.ones((2, K)))
    (note,) = report.notes
    assert report.rows[0].kernel == "cpu weight-only" and note.startswith("cpu weight-only: weights have a layout of their own: ")
    assert "kernel" in str(report)


@needs_cpu
def test_two_threads_trace_and_run_at_once():
    x = normal(2, K)
    laid = qjax.prepack(product)({"w": quantize(normal(K, N), qjax.int4(), (0,))}, x)
    want = np.asarray(x) @ np.asarray(laid["w"].dequantize())
    step = jax.jit(qjax.quantized(product))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda _: np.asarray(step(laid, x)), range(8)):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@needs_cpu
@pytest.mark.slow
def test_a_decode_step_of_the_shipped_model_is_kernels_alone():
    checkpoint = books_llama()
    model, tokens = Llama(checkpoint.config), jnp.ones((1, 32), jnp.int32)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(group_size=32))])
    params = qjax.quantize(model.apply, {"params": checkpoint.params}, policy, calibration=[tokens]).params
    laid, cache = prepacked(model, params), init_cache(checkpoint.config, 1, 64)
    step = jax.jit(qjax.quantized(model.apply), donate_argnums=2).lower(laid, tokens[:, :1], cache, jnp.int32(0)).compile()
    leaves = jax.tree.leaves(laid, is_leaf=lambda a: isinstance(a, qjax.QTensor))
    packed = [leaf for leaf in leaves if isinstance(leaf, qjax.QTensor) and leaf.form is not None]
    text = step.as_text() or ""
    assert text.count('custom_call_target="qjax') == len(packed) == 29
    floats = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[(\d+,\d+)\]", text)}
    assert not floats & {shape for q in packed for shape in (q.shape, q.shape[::-1])}
    together = prepacked(model, params, fuse=True)
    fused = jax.jit(qjax.quantized(model.apply)).lower(together, tokens[:, :1], cache, jnp.int32(0)).compile()
    assert len(fused_sites(together)) == 2 * 4 and (fused.as_text() or "").count('custom_call_target="qjax') == 29 - 3 * 4
    logits, _ = fused(together, tokens[:, :1], cache, jnp.int32(0))
    np.testing.assert_allclose(logits, step(laid, tokens[:, :1], cache, jnp.int32(0))[0], rtol=1e-4, atol=1e-4)
    prompts = [[1, 50, 60, 70], [1, 9]]
    got, want = qjax.generate(model, laid, prompts, 8).new, qjax.generate(model, params, prompts, 8, kernel="xla").new
    assert [row.tolist() for row in got] == [row.tolist() for row in want]
