"""What `qjax tune` remembers, and what the choice makes of it."""

import os

import jax
import pytest

import qjax
from qjax.core import quantize
from qjax.runtime import Device, Kernel, Request, Runtime, Weight, choose, device_of
from qjax.runtime.installed import runtime_of
from qjax.runtime.timing import time_product
from qjax.runtime.tuning import key_of, read_tuned, tuned_file, write_tuned
from tests.cli.conftest import invoke, json_of
from tests.program.cases import normal
from tests.runtime.test_kernels import COLUMNS, HERE, LAID, PLAIN, run, why_not

REQUEST = Request(HERE, 3, 8, 8, Weight("int", 4))
FIRST, SECOND = (Kernel(name, "cpu", lambda request: "", run) for name in ("first", "second"))


def test_what_was_fastest_comes_first_and_xla_is_no_exception():
    assert choose(REQUEST, (FIRST, SECOND), tuned={key_of(REQUEST): "second"}).kernel is SECOND
    assert choose(REQUEST, (FIRST, SECOND), tuned={key_of(REQUEST): "gone"}).kernel is FIRST
    slower = choose(REQUEST, (FIRST,), tuned={key_of(REQUEST): "xla"})
    assert slower.kernel is None and slower.reasons == (("first", "slower than XLA when `qjax tune` measured it"),)
    assert choose(REQUEST, (FIRST,), force="first", tuned={key_of(REQUEST): "xla"}).kernel is FIRST
    laid = Kernel("laid", "cpu", lambda request: "", run, COLUMNS)
    assert choose(REQUEST, (laid,), laid=COLUMNS, tuned={key_of(REQUEST): "xla"}).kernel is laid


def test_rows_are_remembered_by_powers_of_two():
    keys = [key_of(Request(HERE, m, 8, 8, Weight("int", 4))) for m in (1, 2, 3, 4, 5, 8)]
    assert len(set(keys)) == 4 and keys[2] == keys[3] and keys[4] == keys[5]


def test_a_file_keeps_what_was_measured_before(tmp_path):
    path = tuned_file(Device("tpu", "TPU v4", 2), tmp_path / "new")
    assert path.name == "tpu-TPU-v4-2.json" and read_tuned(path) == {}
    write_tuned(path, {"a": "x", "b": "y"})
    write_tuned(path, {"b": "z"})
    assert read_tuned(path) == {"a": "x", "b": "z"} and os.listdir(path.parent) == [path.name]
    for text in ("{", "[]", '{"format": "another"}', '{"format": "qjax kernels 1", "fastest": {"a": 1}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"qjax tune"):
            read_tuned(path)


def test_a_program_follows_what_was_measured(tmp_path):
    def fn(p, x):
        return x @ p

    q, x = quantize(normal(8, 8), qjax.int4(), (0,)), normal(3, 8)
    request = Request(HERE, 3, 8, 8, Weight("int", 4), "float32")
    write_tuned(tuned_file(HERE, tmp_path), {key_of(request): "xla"})

    def text(**how):
        return jax.jit(qjax.quantized(fn, kernels=(PLAIN,), device=HERE, **how)).lower(q, x).as_text()

    assert "reduce_precision" in text() and "reduce_precision" not in text(tuned=tmp_path)
    assert runtime_of(device=HERE).tuned == {}  # tests look into no cache folder of this machine
    with pytest.raises(ValueError, match=r"`tuned` must be the folder of what `qjax tune --folder` measured; .*gone' is no folder"):
        runtime_of(device=HERE, tuned=tmp_path / "gone")


def test_every_way_takes_turns():
    runtime = Runtime(HERE, (PLAIN, LAID, Kernel("few", "cpu", lambda r: why_not(r, 2), run)))
    timing = time_product(qjax.int4(), None, Request(HERE, 3, 16, 8, Weight("int", 4), "float32"), runtime, seconds=0.01, cold=False)
    assert set(timing.seconds) == {"plain w", "columns w", "xla", "float"} and all(t > 0 for t in timing.seconds.values())
    assert timing.fastest != "float"


def test_the_command_measures_and_remembers(tmp_path):
    arguments = ("--size", 32, 64, "--rows", 2, "--spec", "int4", "--seconds", 0.01, "--warm")
    (row,) = json_of("bench", *arguments)["products"]
    assert (row["n"], row["k"], row["rows"]) == (32, 64, 2) and {"xla", "float"} <= set(row["seconds"])
    found = json_of("tune", *arguments, "--folder", tmp_path)
    (kept,) = read_tuned(tuned_file(device_of(), tmp_path)).items()
    assert kept == ("int4 channel, float32, 32 x 64, 2 rows", found["products"][0]["fastest"])


@pytest.mark.parametrize(("target", "kernel"), [("v6e", "tpu weight-only"), ("h200", "hopper weight-only")])
def test_bench_for_a_target_estimates_and_says_so(target, kernel):
    arguments = ("--target", target, "--size", 4096, 4096, "--rows", 16, "--spec", "int4", "--spec", "nf4")
    found = json_of("bench", *arguments)
    packed, table = found["products"]
    assert found["estimate"] and "no measurement" in found["note"] and packed["kernel"] == kernel
    assert packed["bytes"] >= 4096 * 4096 // 2 and packed["seconds"] == max(packed["compute"], packed["memory"])
    assert "codebook" in table["why_not"] and "seconds" not in table
    shown = invoke("bench", *arguments).stdout
    assert "an estimate" in shown and "no estimate for nf4" in shown


@pytest.mark.parametrize(
    ("target", "more", "why"),
    [
        ("h200", ("--size", 4100, 4096), "cuda by groups would run it, of which there is no estimate: N must be a multiple of 64"),
        ("h200", ("--size", 4096, 4096, "--dtype", "float32"), "takes bfloat16 rows"),
        ("v6e", ("--size", 4096, 4096, "--dtype", "float32"), "float32 ones take six passes"),
    ],
)
def test_what_cannot_be_estimated_is_said_beside_what_can(target, more, why):
    arguments = ("--target", target, "--rows", 16, "--spec", "int4", *more)
    (row,) = json_of("bench", *arguments)["products"]
    assert why in row["why_not"] and "seconds" not in row
