"""The measurements of kernels on CPUs run as their README says, at sizes that take no time; what they print is not judged."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from qjax_kernels import cpu

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "kernels"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(cpu.why_not_loaded()), reason="no C++ kernels")]


def run(name, *arguments):
    done = subprocess.run([sys.executable, name, *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_products_go_on_where_they_were_cut_off(tmp_path):
    kept = tmp_path / "cpu.json"
    arguments = ["--shapes", "64x129", "--seconds", "0.01", "--cold-bytes", "1e6", "--json", str(kept)]
    run("cpu.py", *arguments, "--rows", "1")
    first = json.loads(kept.read_text())["tables"]["64x129 cold"]["seconds"]["1"]
    assert set(first) >= {"XLA f32 (N,K)", "W4 g128", "W8A8", "W4A8 g128"}
    out = run("cpu.py", *arguments, "--rows", "1", "2")
    assert json.loads(kept.read_text())["tables"]["64x129 cold"]["seconds"]["1"] == first
    assert re.search(r"\| 2 \| [\d.]+ \| [\d.]+ ms [\d.]+x", out) and "of the bandwidth at M = 1: " in out
    assert re.search(r"reads, GB/s: NumPy [\d.]+", out) and "of that in jax's memory: " in out


def test_products_follow_one_another_in_one_program(tmp_path):
    kept = tmp_path / "cpu.json"
    arguments = ["--shapes", "64x129", "--rows", "1", "--seconds", "0.01", "--cold-bytes", "1e5", "--json", str(kept)]
    out = run("cpu.py", *arguments, "--following", "2e5")
    tables = json.loads(kept.read_text())["tables"]
    assert tables["64x129 following"]["seconds"]["1"].keys() == tables["64x129 cold"]["seconds"]["1"].keys()
    assert "#### N = 64, K = 129, products that follow one another in one program, each with a cold weight" in out
    assert out.count("of the bandwidth at M = 1: ") == 2


def test_a_narrow_model_decodes_from_weights_that_were_never_float():
    out = run("decode_1b.py", "--alone", "--kinds", "int4 g128", "--layers", "1", "--width", "256", "--tokens", "2", "--prompt", "2")
    row = json.loads(out.splitlines()[-1])
    assert row["tokens_per_second"] > 0
    bits = row["parameter_bytes"] * 8 / row["weights"]
    assert 4.25 <= bits < 4.3  # 4 and a float32 scale for 128; norms are float
