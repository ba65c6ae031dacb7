"""The report is data, and prints."""

import json

import jax.numpy as jnp
import pytest

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
    assert lines[-1] == "error: |w - w_hat|^2 / |w|^2 of the weights"


LONG = "encoder/layers_12345678/self_attention/query_projection_with_a_long_name"


def printables():
    """Each kind of value that prints as a table, with what must stand in its text whole."""
    fn = lambda p, x: jnp.tanh(x @ p[LONG])  # noqa: E731
    params, x = {LONG: 1e-3 * jnp.ones((16, 4))}, jnp.linspace(-123.4, 567.8, 32).reshape(2, 16)
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8())])
    found = qjax.calibrate(fn, params, [x, x + 1])
    row = found.rows[0]
    yield qjax.quantize(fn, params, policy, calibration=[x]).report, [LONG, "16x4", "80 B", "dot_general"]
    yield found, [LONG, f"{row.lo:.4g} .. {row.hi:.4g}", f"{row.least:.4g} .. {row.most:.4g}"]
    yield qjax.compare(found, found), [LONG, "within", "x 1"]
    relu = lambda p, x: jnp.maximum(x @ p[LONG], 0) @ p["down"]  # noqa: E731
    yield qjax.rewrite(relu, {LONG: jnp.ones((16, 4)), "down": jnp.ones((4, 2))}, [x], [qjax.equalization()]), [LONG, "down"]


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_no_name_and_no_number_is_cut(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for value, words in printables():
        text = str(value)
        assert all(word in text for word in words), text
        assert "…" not in text and len({len(line) for line in text.splitlines() if line[:1] in "│┃┏└"}) == 1, text
    assert max(map(len, str(report()).splitlines())) <= max(columns, 111)  # no wider than the columns need


def test_a_result_prints_in_one_line_and_is_no_tree_of_parameters():
    fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.ones((16, 4))}, jnp.ones((2, 16))
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8())])
    result = qjax.quantize(fn, params, policy, calibration=[x])
    assert repr(result) == str(result) == "Result(1 of 1 parameters quantized, 256 B -> 80 B)"
    for transform in (qjax.quantized, qjax.overflow):
        with pytest.raises(TypeError, match=r"`params` is a Result, .* pass its parameters, result\.params"):
            transform(fn)(result, x)
