"""What the script for an H200 is asked is checked before a device is, and that it runs without one."""

import argparse
import json
import pathlib
import subprocess
import sys
import types

import jax
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "experiments" / "kernels"))

import h200
from h200 import PARTS, UNFINISHED, counts, main, markdown, positive, read_options, several_of, sizes, wrong
from h200_timing import Clock, Record


@pytest.mark.parametrize(
    ("read", "text", "named"),
    [
        (several_of(PARTS), "correct,speed", "'speed' of 'correct,speed'; known are correct"),
        (counts, "8,0", "'0' of '8,0'"),
        (counts, "-3", "'-3'"),
        (positive, "0", "'0'; give a whole number from 1 on"),
        (positive, "-1", "'-1'"),
        (sizes, "4096", "K x N"),
        (sizes, "4096x100", "multiples of 128 and of 64"),
        (sizes, "0x64", "K x N"),
    ],
)
def test_what_is_unknown_is_named(read, text, named):
    with pytest.raises(argparse.ArgumentTypeError, match=named):
        read(text)


@pytest.mark.parametrize(
    ("arguments", "version", "named"),
    [
        (["--dry", "--parts", "search,again"], (0, 11, 2), "neither search nor again"),
        (["--dry", "--parts", "ceilings,search"], (0, 11, 2), "search of a dry run"),
        (["--dry", "--rows", "3"], (0, 11, 2), "--rows: a dry run has its own"),
        (["--dry", "--parts", "times", "--names", "W8A8"], (0, 11, 2), "--names: a dry run has its own"),
        (["--budget", "nan"], (0, 11, 2), "--budget: nan; give seconds, more than the 15"),
        (["--dry"], (0, 10, 2), "jax 0.11 or newer"),
        (["--cases", "0"], (0, 11, 2), "--cases: '0'"),
        (["--out", __file__], (0, 11, 2), "is a file; give a folder"),
    ],
)
def test_what_would_check_nothing_is_refused(arguments, version, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["h200.py", "--out", str(tmp_path), *arguments])
    monkeypatch.setattr("jax.__version_info__", version)
    with pytest.raises(SystemExit):
        read_options()
    assert named in capsys.readouterr().err


def test_what_the_budget_was_not_enough_for_is_noted(capsys):
    clock = Clock(100)
    assert not clock.spent(20, "times") and clock.left_out == []
    assert clock.spent(200, "search W4A16") and clock.left_out == ["search W4A16"]
    assert "search W4A16: left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("child", "right", "status"), [(0, True, 0), (UNFINISHED, True, UNFINISHED), (UNFINISHED, False, 1), (0, False, 1), (9, True, 9)]
)
def test_the_status_says_whether_all_was_done_and_right(child, right, status, tmp_path, monkeypatch, capsys):
    Record(tmp_path).add("correct", {"right": right})
    monkeypatch.setattr(sys, "argv", ["h200.py", "--out", str(tmp_path)])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=child))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    assert ("goes on" in capsys.readouterr().out) == (child == UNFINISHED)


def test_lists_may_have_spaces():
    assert several_of(PARTS)("correct, times") == ["correct", "times"]
    assert counts("1, 8") == [1, 8] and sizes("128x64, 4096x14336") == [(128, 64), (4096, 14336)]


def test_results_that_are_not_right_are_listed():
    good = {"correct": [{"kind": "int4", "right": True}], "stress": [{"name": "W8A8", "different": 0}], "times": [{"us": 1.0}]}
    assert wrong(good) == []
    bad = {"correct": [{"right": False}, {"failed": "run"}], "stress": [{"different": 3}, {"failed": "run"}], "search": [{"failed": "no"}]}
    assert len(wrong({part: good.get(part, []) + rows for part, rows in bad.items()})) == 5


def test_tables_of_a_dry_run_say_that_they_are_none(tmp_path):
    for folder, more in (("device", {}), ("dry", {"dry": True})):
        record = Record(tmp_path / folder)
        record.add("device", {"kind": "cpu"} | more)
        record.add("times", {"name": "bf16", "k": 256, "n": 128, "m": 1, "us": 3.0, "device us": 2.0})
        assert ("A dry run" in markdown(record)) == bool(more) and "| 256 x 128 | 1 | 2.0 |" in markdown(record)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of these kernels needs jax 0.11 or newer")
def test_a_dry_run_where_jax_has_the_interpreter_finds_its_parts_right(tmp_path):
    pytest.importorskip("absl")
    command = [sys.executable, h200.__file__, "--out", str(tmp_path), "--dry", "--parts", "correct,stress,times", "--budget", "240"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "h200.json").read_text())
    assert all(row["right"] for row in found["correct"]) and [row["different"] for row in found["stress"]] == [0]
    assert {(row["name"], row["m"]) for row in found["times"]} == {(name, m) for name in ("bf16", "W4A16 XLA") for m in (1, 8)}
