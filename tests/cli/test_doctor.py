"""`qjax doctor`: what runs each format here and elsewhere, and what is missing."""

import dataclasses

import jax
import pytest
from qjax_kernels import cpu

import qjax
from qjax.runtime import Device, Kernel, Runtime
from qjax.runtime.doctor import _accelerator, advice, path_of

from .conftest import invoke, json_of


def test_it_says_what_runs_each_format_on_another_chip():
    found = json_of("doctor", "--chip", "v6e")
    paths = {(p["weight"], p["activation"], p["rows"]): p for p in found["paths"]}
    assert found["device"] == {"platform": "tpu", "chip": "v6e", "cores": 1} and found["dtype"] == "bfloat16"
    assert paths["int4(group_size=128)", "", 1]["kernel"] == "tpu weight-only"
    assert paths["int8(per=\"channel\")", 'dynamic(int8(per="token"))', 512]["kernel"] == "tpu int8"
    assert paths["int8(per=\"channel\")", 'dynamic(int8(per="token")) rotated', 512]["kernel"] == "tpu rotated int8"
    assert [cache["kernel"] for cache in found["caches"]] == ["tpu decode attention"] * 3 + ["xla"] * 2
    assert "32 tokens share the scales" in found["caches"][4]["reasons"][0] and "tpu decode attention" in found["kernels"]
    three = paths["int3(group_size=128)", "", 1]
    assert three["kernel"] == "xla" and [r["kernel"] for r in three["reasons"]] == ["tpu fp8", "tpu weight-only", "tpu experts"]


def test_the_text_names_this_machine_its_kernels_and_what_is_missing():
    text = invoke("doctor", "--size", "512", "512").stdout
    assert text.startswith(f"jax {jax.__version__}, cpu, ") and "products with a weight of 512 x 512, float32 activations" in text
    assert "kernels: cpu int8, cpu weight-only" in text
    assert ("to do: there are no C++ kernels" in text) == bool(cpu.why_not_loaded())


def test_a_path_tells_why_no_kernel_runs_it():
    runtime = Runtime(Device("cpu", "plain"), (Kernel("small", "cpu", lambda r: f"{r.m} rows" if r.m > 4 else "", lambda r, o, a: o.x),))
    assert path_of(qjax.int8(), None, runtime, 1).kernel == "small"
    many = path_of(qjax.int8(), None, runtime, 512)
    assert (many.kernel, many.reasons) == ("xla", (("small", "512 rows"),))
    (reason,) = path_of(qjax.int8(), qjax.dynamic(qjax.uint8()), runtime, 1).reasons
    assert reason == ("small", "it takes float or int8 or fp8 activations, and these are not one symmetric scale a row, found as they come")
    assert path_of(qjax.bf16(), None, runtime, 1).reasons == (("", "bf16() has no codes"),)
    floats = Runtime(Device("cpu", "plain"), (dataclasses.replace(runtime.kernels[0], activations=(None,)),))
    assert path_of(qjax.int8(), qjax.dynamic(qjax.int8()), floats, 1).reasons == (("", "no kernel on cpu takes int8 activations"),)


@pytest.mark.parametrize(("file", "words"), [("nvidia0", "jax[cuda13]"), ("accel0", "jax[tpu]"), ("null", "")])
def test_an_accelerator_that_jax_does_not_see_is_named(tmp_path, file, words):
    (tmp_path / file).touch()
    assert words in _accelerator(Device("cpu", "avx2"), tmp_path)
    assert _accelerator(Device("cuda", "sm_90a"), tmp_path) == ""
    assert all(isinstance(text, str) for text in advice(Device("cpu", "avx2")))
