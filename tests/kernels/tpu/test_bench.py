"""experiments/tpu: without a TPU it says so, and its estimates name every generation."""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np

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


def test_codes_stand_for_the_weight():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(200, 8)), jnp.float32)
    codes, scale = load().rounded(w, 4, 128)
    assert codes.dtype == jnp.int4 and scale.shape == (2, 8)
    steps = np.repeat(scale, 128, axis=0)[:200]
    assert np.all(np.abs(np.float64(codes) * steps - w) <= 0.51 * steps)
