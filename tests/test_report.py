"""The report is data, and prints."""

import json

import jax.numpy as jnp

import qjax
from qjax.report import format_bytes


def report():
    params = {"w": jnp.linspace(-1, 1, 64).reshape(16, 4), "b": jnp.zeros(4)}
    policy = qjax.Policy([qjax.Rule("w", weight=qjax.int8())])
    return qjax.quantize(lambda p, x: x @ p["w"] + p["b"], params, policy, calibration=[jnp.ones((2, 16))]).report


def test_bytes_for_people():
    assert [format_bytes(n) for n in (999, 1000, 8397312, 16_000_000_000)] == ["999 B", "1.00 kB", "8.40 MB", "16.00 GB"]


def test_json_holds_what_the_rows_hold():
    whole = report()
    document = json.loads(whole.to_json())
    assert [row["path"] for row in document["rows"]] == ["b", "w"]
    assert document["rows"][1]["error"] == whole.rows[1].error and 0 < whole.rows[1].error < 1e-4
    assert document["nbytes"] == 64 + 4 * 4 + 4 * 4 and document["float_nbytes"] == 4 * 64 + 4 * 4


def test_it_prints_what_was_quantized_and_why_not(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    lines = str(report()).splitlines()
    assert lines[0].startswith("1 of 2 parameters quantized, 272 B -> 96 B")
    (b,) = (line for line in lines if line.startswith("│ b "))
    (w,) = (line for line in lines if line.startswith("│ w "))
    assert "dot_general" in w and "rtn" in w and "int8" in w
    assert "float32" in b and "it meets no data" in b
