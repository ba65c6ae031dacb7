"""`qjax calibrate`: what a text makes the model's products read, and which of two texts is another."""

import pytest

import qjax
from qjax.cli.quantize import batches_of, calibration_rows
from qjax.cli.shared import open_model

from .conftest import error_of, invoke, json_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts of sheep and one of capitals."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"passage {n * 7919} says something about {n * n} sheep" for n in range(80)]
    for name, part in (("a", lines[:40]), ("b", lines[40:]), ("other", [line.upper() for line in lines[40:]])):
        (folder / name).write_text("\n".join(part))
    return {name: folder / name for name in ("a", "b", "other")}


def test_it_says_what_the_library_says(tiny, texts):
    found = json_of("calibrate", tiny, "--data", texts["a"], "--observer", "percentile", "--percentile", 99, "--bits", 4,
                    "--asymmetric", "--only", "*down_proj*")  # fmt: skip
    model = open_model(str(tiny))
    rows, used = calibration_rows(model, texts["a"].read_text().splitlines(), 128, 32)
    options = {"observer": qjax.percentile(99), "spec": qjax.uint4()}
    want = qjax.calibrate(model.apply, model.params, batches_of(rows, 8), "*down_proj*", **options)
    assert [(row["name"], row["lo"], row["hi"], row["drift"]) for row in found["rows"]] == [
        (row.name, row.lo, row.hi, row.drift) for row in want.rows
    ]
    assert found["text"] == {"file": "a", "windows": len(rows), "window": 32, "lines": used}
    assert found["batches"] == 5 and 0 < found["rows"][0]["outside"] <= 0.011


@pytest.mark.slow
def test_a_text_of_another_kind_shows_and_one_of_the_same_does_not(tiny, texts):
    other = json_of("calibrate", tiny, "--compare", texts["a"], texts["other"], "--only", "*layers_0*")
    same = json_of("calibrate", tiny, "--compare", texts["a"], texts["b"], "--only", "*layers_0*")
    assert "layers_0/self_attn/q_proj/kernel" in other["shifted"] and same["shifted"] == []
    distances = [row["distance"] for row in other["rows"] if row["shifted"]]
    assert distances == sorted(distances, reverse=True) and distances[-1] > max(row["distance"] for row in same["rows"])
    assert (other["a"]["file"], other["b"]["file"]) == ("a", "other")


def test_a_short_text_still_has_two_halves(tiny, texts, tmp_path):
    (tmp_path / "short").write_text("\n".join(texts["a"].read_text().splitlines()[:5]))
    only = ["--only", "*layers_0/mlp/up*"]
    assert json_of("calibrate", tiny, "--compare", tmp_path / "short", texts["b"], *only)["rows"][0]["shifted"] is not None
    one = invoke("calibrate", tiny, "--compare", tmp_path / "short", texts["b"], *only, "--batch-size", 8)
    text = " ".join(one.stdout.split())
    assert one.exit_code == 0 and "1 cannot be judged" in text and "give a longer A, or smaller --batch-size" in text
    assert "`a`" not in text and "layers_0/mlp/up_proj/kernel" in text and "%" in text


def test_for_people(tiny, packed, texts):
    shown = invoke("calibrate", packed, "--data", texts["a"], "--only", "*mlp*")
    assert shown.exit_code == 0, shown.stderr or shown.exception
    assert "layers_*/mlp/down_proj/kernel" in shown.stdout and shown.stderr.startswith("reading a: ")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    shown = invoke("calibrate", tiny, "--compare", texts["a"], texts["other"], "--only", "*layers_0/mlp/up*")
    assert "1 of 1 inputs have shifted" in shown.stdout and max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["TINY"], 2, ["--data FILE"]),
        (["TINY", "--data", "A", "--compare", "A", "A"], 2, ["exclude each other"]),
        (["TINY", "--data", "A", "--percentile", "99"], 2, ["--percentile goes with --observer percentile"]),
        (["TINY", "--data", "NONE"], 2, ["NONE"]),
        (["TINY", "--data", "SHORT"], 1, ["SHORT", "less than one window of 32 tokens"]),
        (["TINY", "--data", "A", "--only", "nothing"], 1, ["error: --only 'nothing' matches no parameter"]),
        (["TINY", "--data", "A", "--window", "64"], 1, ["--window 64"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_input(tiny, texts, tmp_path, arguments, code, words):
    (tmp_path / "SHORT").write_text("short")
    names = {"TINY": tiny, "A": texts["a"], "NONE": tmp_path / "NONE", "SHORT": tmp_path / "SHORT"}
    line = error_of("calibrate", *(names.get(word, word) for word in arguments), code=code)
    assert all(word in line for word in words), line
