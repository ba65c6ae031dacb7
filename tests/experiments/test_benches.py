"""The benchmarks run as their READMEs say, at sizes at which a machine is not worn out; what they print is not judged."""

import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
ALONE = [
    ("gptq_solver", ["--size", "128", "--small", "128", "--repeats", "2", "--cold-repeats", "1", "--all"], r"qjax +median +[\d.]+ s"),
    ("gptq_model", ["--repeats", "1", "--ways", "paper"], r'"without": [\d.]+'),
    ("w8a8", ["--windows", "8", "--tables", "w8a8", "--rows", "float", "static min-max"], r"static min-max \| [\d.]+ \|"),
    ("ptq_methods", ["--model", "shipped", "--only", "4 g64 FP4", "--windows", "4", "--json", "TMP/r.json", "--cache", "TMP/cache"],
     r"FP4: \d\d\.\d{3} in"),
    ("qat_step_time", ["--batch", "1", "--length", "32", "--turns", "1", "--rows", "W8"], r"\| W8 \| [\d.]+ \|"),
    ("qat_digits", ["--seeds", "1", "--folds", "2", "--images", "200", "--epochs", "1", "--tuning", "1", "--methods", "--distill", "--rows",
                    "W2A2"], r"W2A2, QAT \| [\d.]+ %"),
    ("qat_language_model", ["--steps", "1", "--batch", "1", "--windows", "8", "--rows", "W2", "--methods", "rounding", "--trains",
                            "learned steps"], r"QAT learned steps \| [\d.]+ \|"),
    ("optimizer_states", ["--steps", "2", "--batch", "1", "--length", "32", "--windows", "2", "--rows", "Adam, 8 bit"],
     r"Adam, 8 bit \| [\d.]+ \|"),
    ("qlora_language_model", ["--tables", "adapt", "--steps", "1", "--batch", "1", "--windows", "8", "--rows", "QLoRA"],
     r"QLoRA \| [\d,]+ \| [\d.]+ \|"),
    ("tpu", ["--rows", "16"], r"no TPU"),
    ("trace_cost", ["1"], r'"interpreted / by hand": [\d.]+'),
]


def test_every_experiment_is_here_and_has_a_record():
    assert sorted(name for name, *_ in ALONE) == sorted(path.parent.name for path in FOLDER.glob("*/bench.py"))
    for name, *_ in ALONE:
        text = (FOLDER / name / "README.md").read_text()
        assert "**Question.**" in text and "**Command.**" in text and "\n|" in text, name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments", "figure"), ALONE, ids=lambda v: v if isinstance(v, str) else "")
def test_it_runs(name, arguments, figure, tmp_path):
    arguments = [word.replace("TMP", str(tmp_path)) for word in arguments]
    done = subprocess.run([sys.executable, "bench.py", *arguments], cwd=FOLDER / name, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(figure, done.stdout), done.stdout


@pytest.mark.slow
def test_the_digits_run():
    small = ["--seeds", "1", "--folds", "2", "--images", "200", "--epochs", "1", "--rows", "W8A8 static min-max"]
    done = subprocess.run([sys.executable, "digits.py", *small], cwd=FOLDER / "w8a8", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"W8A8 static min-max \| [\d.]+ % \| [+-][\d.]+ %", done.stdout), done.stdout
