"""`qjax quantize`: what it writes, what it refuses, and that it never leaves half a checkpoint."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.cli.quantize import calibration_rows
from qjax.cli.shared import open_model
from qjax.cli.tables import report_table
from qjax.evaluation import calibration_windows
from qjax.formats.huggingface import load_checkpoint
from qjax.report import Report

from .conftest import error_of, invoke, json_of

LINEAR = 14  # of two layers
ONE_SHAPE = ["--keep", "*mlp*", "--keep", "*[kv]_proj*", "--keep", "*embed*", "--keep", "*lm_head*"]  # to compile once


def quantized(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, qjax.QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, qjax.QTensor)]


def test_rounding_gives_what_the_library_gives(tiny, packed):
    checkpoint, loaded = load_checkpoint(tiny), qjax.load(packed)
    w = checkpoint.params["layers_1"]["mlp"]["down_proj"]["kernel"]
    q = loaded.params["params"]["layers_1"]["mlp"]["down_proj"]["kernel"]
    groups = np.asarray(w).reshape(3, 16, 32)
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(7.5)
    expected = (np.clip(np.rint(groups / scale), -8, 7) * scale).reshape(48, 32)
    np.testing.assert_allclose(np.asarray(q), expected, rtol=1e-6)
    assert len(quantized(loaded.params)) == LINEAR


def test_what_stays_float_keeps_its_stored_dtype(tiny, packed):
    params = qjax.load(packed).params["params"]
    assert params["embed_tokens"]["embedding"].dtype == "bfloat16"
    assert params["lm_head"]["kernel"].dtype == "bfloat16"
    stored = load_checkpoint(tiny, "bfloat16").params["embed_tokens"]["embedding"]
    assert (np.asarray(params["embed_tokens"]["embedding"]) == np.asarray(stored)).all()


def test_the_document(tiny, tmp_path):
    document = json_of("quantize", tiny, tmp_path / "out", "--weight", "int4", "--group-size", 16)
    assert (document["quantized"], document["parameters"]) == (LINEAR, 21)
    kinds = {row["path"]: row["spec"] for row in document["rows"]}
    assert kinds["layers_0/self_attn/q_proj/kernel"] == "int4(group_size=16)"
    assert kinds["embed_tokens/embedding"] == ""
    elements = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    others = 2 * 264 * 32 + 5 * 32
    assert document["float_nbytes"] == 2 * (elements + others)
    assert document["nbytes"] == elements // 2 + elements // 16 * 4 + 2 * others
    assert document["disk_bytes"] > document["nbytes"]
    assert document["calibration"] is None


def test_a_packed_checkpoint_stands_alone(tiny, text, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    json_of("quantize", source, tmp_path / "out", "--group-size", 16)
    shutil.rmtree(source)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert json_of("eval", tmp_path / "moved", "--text", text)["windows"] == 12
    assert json_of("generate", tmp_path / "moved", "--prompt", "On ", "--max-new-tokens", 4)["text"] is not None
    assert list(tmp_path.iterdir()) == [tmp_path / "moved"]


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        (["--weight", "int8"], 'int8(per="channel")'),
        (["--weight", "int8", "--per", "tensor"], 'int8(per="tensor")'),
        (["--weight", "uint3", "--group-size", "8"], "uint3(group_size=8)"),
        (["--weight", "int2", "--group-size", "5", "--pad"], "int2(group_size=5, pad=True)"),
        (["--weight", "nf4", "--group-size", "16"], "nf4(group_size=16)"),
        (["--weight", "nf4_quantile", "--group-size", "16", "--double-quant"], "nf4_quantile(group_size=16, double_quant=True)"),
        (["--weight", "mxfp6_e3m2", "--pad"], 'mxfp6("e3m2", pad=True)'),
        (["--weight", "nvfp4", "--pad"], "nvfp4(pad=True)"),
        (["--weight", "bf16"], "bf16()"),
    ],
)
def test_weights(tiny, tmp_path, options, spec):
    document = json_of("quantize", tiny, tmp_path / "out", *options, *ONE_SHAPE)
    assert {row["spec"] for row in document["rows"]} == {spec, ""}
    assert {str(q.spec) for q in quantized(qjax.load(tmp_path / "out").params)} == {spec}


def test_keep(tiny, tmp_path):
    kept = json_of("quantize", tiny, tmp_path / "a", "--keep", "*layers_0*", "--keep", "*mlp*")
    assert {r["path"].split("/")[1] for r in kept["rows"] if r["spec"] and "layers" in r["path"]} == {"self_attn"}
    assert [bool(r["spec"]) for r in kept["rows"] if r["path"].startswith(("embed", "lm_head"))] == [True, True]
    everything = json_of("quantize", tiny, tmp_path / "b", "--keep-none")
    assert everything["quantized"] == LINEAR + 2


def test_mse(tiny, tmp_path):
    found = [json_of("quantize", tiny, tmp_path / str(n), "--weight", "int2", *ONE_SHAPE, *mse) for n, mse in enumerate(([], ["--mse"]))]
    errors = [sum(row["error"] for row in document["rows"] if row["spec"]) for document in found]
    assert errors[1] < errors[0]
    assert {row["method"] for row in found[1]["rows"] if row["spec"]} == {"rtn(mse)"}


def test_gptq(tiny, passages, tmp_path):
    arguments = ["--method", "gptq", "--calibration", passages, "--group-size", 16, "--act-order", "--samples", 12, *ONE_SHAPE]
    document = json_of("quantize", tiny, tmp_path / "out", *arguments)
    assert document["calibration"] == {"file": "passages.txt", "windows": 12, "window": 32, "lines": 12}
    assert {row["method"] for row in document["rows"] if row["spec"]} == {"gptq(act_order)"}
    assert all(q.perm is not None for q in quantized(qjax.load(tmp_path / "out").params))


@pytest.mark.slow
def test_gptaq_and_autoround(tiny, passages, tmp_path):
    given = ["--calibration", passages, "--group-size", 16, "--samples", 12, *ONE_SHAPE]
    for method, more, name in (
        ("gptaq", ["--group-aware", "--refine", 1], "gptaq(group_aware, refine=1)"),
        ("autoround", ["--steps", 3, "--no-mse"], "autoround(steps=3, mse=False)"),
    ):
        document = json_of("quantize", tiny, tmp_path / method, "--method", method, *more, *given)
        assert {row["method"] for row in document["rows"] if row["spec"]} == {name}


@pytest.mark.slow
def test_awq_and_integer_activations(tiny, passages, tmp_path):
    given = ["--calibration", passages, "--samples", 12, *ONE_SHAPE]
    document = json_of("quantize", tiny, tmp_path / "awq", "--method", "awq", "--group-size", 16, *given)
    assert {row["method"] for row in document["rows"] if row["spec"]} == {"awq"}
    assert any("its input is rescaled" in note for row in document["rows"] for note in row["notes"])
    arguments = ["--weight", "int8", "--activation", "static", "--method", "smoothquant", *given]
    document = json_of("quantize", tiny, tmp_path / "w8a8", *arguments)
    assert {row["kernel"] for row in document["rows"] if row["spec"]} == {"xla int8"}
    assert all(q.act_scale is not None for q in quantized(qjax.load(tmp_path / "w8a8").params))
    assert json_of("eval", tmp_path / "w8a8", "--against", tiny, "--text", passages)["kl"] < 0.05


@pytest.mark.slow
def test_it_says_what_becomes_of_the_activations(tiny, passages, tmp_path):
    given = ["--calibration", passages, "--samples", 8, "--weight", "int8", *ONE_SHAPE]
    static = invoke("quantize", tiny, tmp_path / "a", *given, "--activation", "static", "--observer", "percentile")
    assert static.exit_code == 0 and "\nactivations: static(int8" in static.stdout
    mixed = invoke("quantize", tiny, tmp_path / "b", *given, "--method", "llm_int8")
    assert mixed.exit_code == 0 and "\nactivations: dynamic(int8" in mixed.stdout and "capacity" not in mixed.stdout
    assert "activations:" not in invoke("quantize", tiny, tmp_path / "c", "--weight", "int8", *ONE_SHAPE).stdout
    found = {}
    for name in ("mse", "minmax"):
        arguments = [*given, "--activation", "static", "--observer", name, "--overwrite"]
        assert invoke("quantize", tiny, tmp_path / name, *arguments).exit_code == 0
        found[name] = [float(np.max(q.act_scale)) for q in quantized(qjax.load(tmp_path / name).params)]
    assert all(p <= m for p, m in zip(found["mse"], found["minmax"], strict=True)) and found["mse"] != found["minmax"]


@pytest.mark.parametrize(("notes", "want"), [(("x", "y"), ["layers_0/w: x", "layers_1/w: y"]), (("x", "x"), ["(layers_*/w): x"])])
def test_a_note_names_its_layer(notes, want):
    row = qjax.sites(lambda p, x: x @ p, qjax.Policy([qjax.Rule("*", weight=qjax.int8())]))(np.ones((8, 8)), np.ones((2, 8))).rows[0]
    rows = tuple(dataclasses.replace(row, path=f"layers_{i}/w", notes=(note,)) for i, note in enumerate(notes))
    lines = [line for line in report_table(Report(rows)) if isinstance(line, str) and line.startswith("note")]
    assert len(lines) == len(want) and all(line.endswith(words) for line, words in zip(lines, want, strict=True))


@pytest.mark.slow
def test_llm_int8(tiny, passages, tmp_path):
    given = ["--calibration", passages, "--samples", 8, *ONE_SHAPE]
    document = json_of("quantize", tiny, tmp_path / "mixed", "--weight", "int8", "--method", "llm_int8", *given)
    assert {row["kernel"] for row in document["rows"] if row["spec"]} == {"xla int8 + 16 bit outliers"}
    assert all("room for" in row["notes"][0] for row in document["rows"] if row["spec"])


def test_the_report_for_people(tiny, tmp_path):
    result = invoke("quantize", tiny, tmp_path / "out", "--group-size", 16)
    assert result.exit_code == 0
    assert "14 of 21 parameters quantized" in result.stdout
    assert "layers_*/mlp/down_proj/kernel" in result.stdout
    assert "lm_head/kernel" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stderr.startswith("quantizing: ")


# Calibration windows.


def test_long_lines_follow_the_protocol(tiny, passages):
    model, lines = open_model(str(tiny)), passages.read_text().splitlines()
    rows, used = calibration_rows(model, lines, 7, 32)
    assert used == 7
    np.testing.assert_array_equal(rows, calibration_windows(model.tokenizer, lines, 7, 32))


def test_short_lines_are_joined(tiny):
    model = open_model(str(tiny))
    lines = ["x" * 10, "", "y" * 10, "   ", "z" * 20, "w" * 50, "v" * 3]
    rows, used = calibration_rows(model, lines, 128, 32)
    assert used == 4  # the last one fills nothing
    byte = {letter: model.tokenizer.encode(letter).ids[0] for letter in "xyzw"}
    assert rows.tolist() == [
        [1, *[byte["x"]] * 10, 1, *[byte["y"]] * 10, 1, *[byte["z"]] * 9],
        [1, *[byte["w"]] * 31],
    ]


# What is refused.


def bad_inputs():
    gptq = ["--method", "gptq", "--calibration"]
    yield ["SRC/none", "DST"], 1, ["SRC/none", "is not a folder"]
    yield ["EMPTY", "DST"], 1, ["EMPTY", "config.json"]
    yield ["SRC", "DST", "--weight", "int9"], 2, ["--weight", "int9", "uint8"]
    yield ["SRC", "DST", "--group-size", "7"], 1, ["--group-size 7", "--pad", "48", "down_proj"]
    yield ["SRC", "DST", "--group-size", "7", *gptq, "PASSAGES"], 1, ["--group-size 7", "48", "down_proj"]
    yield ["SRC", "DST", "--keep", "*q_porj*"], 1, ["--keep '*q_porj*'", "*q_proj*"]
    yield ["SRC", "DST", "--keep", "*norm*"], 1, ["--keep '*norm*'", "cannot be quantized"]
    yield ["SRC", "DST", "--keep", "*", "--keep-none"], 2, ["--keep", "--keep-none"]
    yield ["SRC", "DST", "--method", "gptq"], 2, ["--calibration FILE"]
    yield ["SRC", "DST", *gptq, "MISSING"], 2, ["MISSING", "does not exist"]
    yield ["SRC", "DST", *gptq, "BLANK"], 1, ["BLANK", "32 tokens"]
    yield ["SRC", "DST", *gptq, "SHORT"], 1, ["SHORT", "32 tokens"]
    yield ["SRC", "DST", *gptq, "BINARY"], 1, ["BINARY", "UTF-8"]
    yield ["SRC", "DST", *gptq, "PASSAGES", "--window", "33"], 1, ["--window 33", "32 tokens"]
    yield ["SRC", "DST", *gptq, "PASSAGES", "--damping", "-1"], 1, ["damping", "-1"]
    yield ["SRC", "DST", *gptq, "PASSAGES", "--weight", "bf16"], 2, ["gptq", "bf16"]
    yield ["SRC", "DST", "--method", "smoothquant", "--calibration", "PASSAGES"], 2, ["smoothquant", "--activation"]
    yield ["SRC", "DST", "--activation", "static", "--weight", "nf4", "--calibration", "PASSAGES"], 2, ["--activation", "nf4"]
    yield ["SRC", "DST", "--activation", "static"], 2, ["--activation static", "--calibration FILE"]
    yield ["SRC", "DST", "--method", "awq", "--calibration", "PASSAGES", "--mse"], 2, ["--mse", "awq"]
    mixed = ["SRC", "DST", "--method", "llm_int8", "--calibration", "PASSAGES"]
    yield [*mixed, "--weight", "nf4"], 2, ["llm_int8", "--weight int8", "nf4"]
    yield [*mixed, "--weight", "int8", "--activation", "static"], 2, ["llm_int8", "--activation static"]
    yield ["SRC", "DST", "--method", "hqq"], 2, ["--method hqq", "--weight uint2", "int4"]
    yield ["SRC", "DST", "--method", "kmeans", "--calibration", "PASSAGES"], 2, ["--method kmeans", "--weight learned2", "int4"]
    learned = ["--weight", "learned3", "--calibration", "PASSAGES"]
    yield ["SRC", "DST", "--method", "gptq", *learned], 2, ["gptq", "learned3", "--method kmeans"]
    yield ["SRC", "DST", "--observer", "mse"], 2, ["--observer goes with --activation static", "float"]
    yield ["SRC", "DST", "--act-order"], 2, ["--act-order", "rtn"]
    yield ["SRC", "DST", "--refine", "2"], 2, ["--refine", "--method gptq or gptaq", "rtn"]
    yield ["SRC", "DST", *gptq, "PASSAGES", "--act-order", "--group-aware"], 2, ["--act-order", "--group-aware"]
    yield ["SRC", "DST", *gptq, "PASSAGES", "--steps", "9"], 2, ["--steps", "autoround", "gptq"]
    yield ["SRC", "DST", "--method", "autoround", "--weight", "nf4", "--calibration", "PASSAGES"], 2, ["autoround", "nf4", "gptq"]
    yield ["SRC", "DST", "--method", "autoround", *learned], 2, ["autoround", "learned3", "take --method kmeans"]
    yield ["SRC", "DST", "--method", "autoround", "--weight", "bf16", "--calibration", "PASSAGES"], 2, ["bf16: leave --method out"]
    yield ["SRC", "DST", "--per", "tensor", "--group-size", "8"], 2, ["--per", "--group-size"]
    yield ["SRC", "DST", "--weight", "nf4", "--per", "channel"], 2, ["--per", "nf4"]
    yield ["SRC", "DST", "--weight", "mxfp4", "--group-size", "8"], 2, ["--group-size", "mxfp4"]
    yield ["SRC", "DST", "--weight", "int4", "--double-quant"], 2, ["--double-quant", "int4"]
    yield ["SRC", "DST", "--weight", "fp16", "--group-size", "8"], 2, ["--group-size", "fp16"]
    yield ["TRUNCATED", "DST"], 1, ["model.safetensors", "truncated"]
    yield ["PACKED", "DST"], 1, ["PACKED", "packed"]
    yield ["SRC", "SRC"], 1, ["SRC", "config.json"]
    yield ["SRC", "SHORT"], 1, ["SHORT", "is a file"]
    yield ["SRC", "SHORT/below"], 1, ["SHORT"]


@pytest.mark.parametrize(("arguments", "code", "words"), list(bad_inputs()), ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_bad_input(tiny, packed, passages, tmp_path, arguments, code, words):
    names = {name: tmp_path / name for name in ("DST", "MISSING", "BLANK", "SHORT", "BINARY", "EMPTY", "TRUNCATED")}
    names |= {"SRC": tiny, "PACKED": packed, "PASSAGES": passages}
    names["BLANK"].write_text("\n  \n")
    names["SHORT"].write_text("too short\n")
    names["BINARY"].write_bytes(b"\xff\xfe\xff")
    names["EMPTY"].mkdir()
    shutil.copytree(tiny, names["TRUNCATED"])
    os.truncate(names["TRUNCATED"] / "model.safetensors", 5000)
    before = sorted(tmp_path.rglob("*"))

    def filled(word):
        head, _, rest = word.partition("/")
        return str(names.get(head, head)) + (f"/{rest}" if rest else "")

    line = error_of("quantize", *map(filled, arguments), code=code)
    for word in words:
        assert filled(word) in line, line
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_checkpoint_is_replaced_only_when_asked(tiny, tmp_path):
    folder = tmp_path / "out"
    json_of("quantize", tiny, folder, "--weight", "int8")
    before = (folder / "qjax.json").read_bytes()
    line = error_of("quantize", tiny, folder, "--weight", "int4", code=1)
    assert str(folder) in line
    assert "--overwrite" in line
    assert (folder / "qjax.json").read_bytes() == before
    json_of("quantize", tiny, folder, "--weight", "int4", "--overwrite")
    assert {q.spec.bits for q in quantized(qjax.load(folder).params)} == {4}


def test_an_error_leaves_the_previous_checkpoint(tiny, tmp_path):
    folder = tmp_path / "out"
    json_of("quantize", tiny, folder)
    before = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    error_of("quantize", tiny, folder, "--group-size", 7, "--overwrite", code=1)
    assert sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_ctrl_c_leaves_nothing(tiny, tmp_path):
    """The calibration text is a pipe, so that the command is at work, for certain, when it is interrupted.

    It listens to ^C even where the tests run in the background, whose processes do not.
    """
    listen = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_module('qjax.cli')"
    pipe, folder = tmp_path / "pipe", tmp_path / "new" / "out"
    os.mkfifo(pipe)
    command = ["quantize", tiny, folder, "--method", "gptq", "--calibration", pipe]
    with subprocess.Popen(
        [sys.executable, "-c", listen, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process, open(pipe, "w"):  # waits until the command reads
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"\nqjax: interrupted\n")  # the line of ^C is ended first
    assert list(tmp_path.iterdir()) == [pipe]


def environment():
    root = str(Path(qjax.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


@pytest.mark.slow
def test_json_is_all_of_stdout_in_a_process_of_its_own(tiny, tmp_path):
    command = [sys.executable, "-m", "qjax.cli", "quantize", str(tiny), str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert json.loads(done.stdout)["destination"] == str(tmp_path / "out")
    assert done.stderr.startswith("quantizing: ")
    assert done.stderr.count("\n") == 1


# Long work.


def test_a_dry_run_prices_and_writes_nothing(tiny, passages, tmp_path):
    options = ["--method", "gptq", "--calibration", passages, "--group-size", 16, "--samples", 12, *ONE_SHAPE]
    document = json_of("quantize", tiny, tmp_path / "out", *options, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    plan = document["plan"]
    assert (plan["batches"], plan["rows"], plan["passes"], plan["problems"]) == (2, 12 * 32, 1, [])
    assert plan["seconds"] > 0 and plan["peak"] > plan["live"] > 0 and plan["statistics"] == 32 * 32 * 4 + 4 + 4
    done = json_of("quantize", tiny, tmp_path / "out", *options)
    keys = ("path", "spec", "nbytes", "float_nbytes")
    assert [[row[k] for k in keys] for row in document["rows"]] == [[row[k] for k in keys] for row in done["rows"]]


def test_a_dry_run_lists_what_would_be_refused(tiny, tmp_path):
    result = invoke("quantize", tiny, tmp_path / "out", "--group-size", 7, "--dry-run")
    assert result.exit_code == 1 and result.stderr == ""
    text = " ".join(result.stdout.split())
    assert text.startswith("would be refused: --group-size 7 does not divide the 48 contracted values")
    assert "or --pad, which pads" in text and "data: none is used" in text
    assert "take 8, the nearest size that divides those of all" in text and "nothing was written" in text
    assert list(tmp_path.iterdir()) == []


def test_one_size_that_fits_all_is_named(tiny, tmp_path):
    line = error_of("quantize", tiny, tmp_path / "out", "--group-size", 12, code=1)
    assert "the 32 contracted values" in line and "13 more" not in line and "take 16, the nearest size that divides" in line


def test_resume_goes_on_and_is_removed(tiny, passages, tmp_path, monkeypatch):
    options = ["--method", "gptq", "--calibration", passages, "--group-size", 16, "--samples", 8, *ONE_SHAPE]
    folder, kept = tmp_path / "out", tmp_path / "out.resume"
    with monkeypatch.context() as patch:
        patch.setattr(qjax, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("as if the disk were full")))
        error_of_long = invoke("quantize", tiny, folder, *options, "--resume")
    assert error_of_long.exit_code == 1 and "as if the disk were full" in error_of_long.stderr
    assert kept.is_dir() and not folder.exists()
    line = error_of("quantize", tiny, folder, *options, code=1)
    assert "--resume" in line and str(kept) in line
    other = invoke("quantize", tiny, folder, *options, "--act-order", "--resume")
    assert other.exit_code == 1 and "differs in its policy" in other.stderr
    assert other.stderr.startswith(f"qjax: error: --resume: {str(kept)!r} holds")
    assert "give another DST, or remove that folder" in other.stderr
    with monkeypatch.context() as patch:
        patch.setattr(qjax, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = invoke("quantize", tiny, folder, *options, "--resume")
    pieces = len(list(kept.glob("leaf.*")))
    said = f"{pieces} finished pieces are kept in `{kept}`; repeat the command with --resume to go on"
    assert stopped.exit_code == 130 and pieces and stopped.stderr.endswith(f"\nqjax: interrupted: {said}\n")
    monkeypatch.setattr(type(qjax.gptq()), "quantize", lambda *_: pytest.fail("solved again"))
    resumed = invoke("quantize", tiny, folder, *options, "--resume", "--json")
    assert json.loads(resumed.stdout)["destination"] == str(folder)
    assert f"took over {pieces} finished pieces" in resumed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_keeping_everything_is_refused(tiny, tmp_path):
    line = error_of("quantize", tiny, tmp_path / "out", "--keep", "*", code=1)
    assert "--keep '*' leaves nothing to quantize" in line
    keeps = ["--keep", "*layers*", "--keep", "*embed*", "--keep", "*lm_head*"]
    assert "leaves nothing to quantize" in error_of("quantize", tiny, tmp_path / "out", *keeps, code=1)


def test_padding_that_makes_a_checkpoint_larger_is_said(tiny, tmp_path):
    result = invoke("quantize", tiny, tmp_path / "out", "--weight", "int8", "--group-size", 64, "--pad", *ONE_SHAPE)
    assert result.exit_code == 0
    assert "qjax: warning: `layers_0/self_attn/o_proj/kernel`" in result.stderr and "no fewer than the 2048 before" in result.stderr
