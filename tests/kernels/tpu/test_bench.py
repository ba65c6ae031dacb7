"""experiments/tpu: without a TPU it says so, and its estimates name every generation."""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

FILE = pathlib.Path(__file__).parents[3] / "experiments" / "tpu" / "bench.py"


def load():
    spec = importlib.util.spec_from_file_location("tpu_bench", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_tpu_it_says_so(capsys):
    load().main(["--rows", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("no TPU")
    assert all(any(line.startswith(chip) for line in lines) for chip in ("v5e", "v5p", "v6e", "tpu7x"))
    assert not any("W8A8" in line for line in lines if line.startswith("tpu7x"))
    told = [line.split(" | ") for line in FILE.with_name("README.md").read_text().splitlines() if line.startswith(("| v", "| tpu"))]
    assert len(told) == 4
    for chip, plain, packed, *_ in told:
        (line,) = (line for line in lines if line.startswith(f"{chip[2:]} 16x14336x4096"))
        assert f"bf16 {plain} us, W4A16 {packed} us" in line


@pytest.mark.slow
def test_the_shipped_model_is_measured_through_the_runtime():
    """On whatever device is there: what runs on a TPU but for its kernels."""
    base, *ways = load().whole_model(count=2, repeats=1)
    lost = [float(line.split("perplexity ")[1].split(",")[0]) for line in (base, *ways)]
    assert [line.split(":")[0] for line in ways] == ["shipped model, W4A16 g128", "shipped model, W8A8"]
    assert all(abs(after / lost[0] - 1) < 0.1 for after in lost[1:]) and all(", by " in line for line in ways)


def test_products_are_measured_through_the_kernels(monkeypatch):
    module = load()
    w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 128)), jnp.float32)
    monkeypatch.setattr(module, "weights", lambda: {"w": w})
    with pltpu.force_tpu_interpret_mode():
        lines = module.measured("v6e", 16, repeats=1)
    errors = [float(line.split("error ")[1].split(",")[0]) for line in lines]
    assert ["W4A16" in lines[0], "W8A8" in lines[1]] == [True, True]
    assert 0.05 < errors[0] < 0.15 and 0.003 < errors[1] < 0.02


def test_codes_stand_for_the_weight():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(200, 8)), jnp.float32)
    codes, scale = load().rounded(w, 4, 128)
    assert codes.dtype == jnp.int4 and scale.shape == (2, 8)
    steps = np.repeat(scale, 128, axis=0)[:200]
    assert np.all(np.abs(np.float64(codes) * steps - w) <= 0.51 * steps)
