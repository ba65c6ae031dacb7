"""A killed quantization goes on where it was, with the same result to the bit; another job's folder is refused."""

import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.ptq import long_job
from tests.ptq.long_job import DATA, GPTQ, JOBS, LAYERS, PARAMS, fn

ROOT = Path(__file__).parents[2]


def kill(job, folder, phase, step):
    command = [sys.executable, "-m", long_job.__name__, job, str(folder), phase, str(step)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def kept(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


# Of calibration, in the second layer, when its gate and up are done and its down is not; of rescaling, when the first scales are.
@pytest.mark.parametrize(
    "job, phase, step, solved",
    [
        pytest.param("plain", "calibrate", 5, 5, marks=pytest.mark.slow),
        pytest.param("rescaled", "calibrate", 5, 6, marks=pytest.mark.slow),  # with the head, which is rounded without data
        pytest.param("rescaled", "rescale", len(DATA) + 1, 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_job_goes_on_with_the_same_result_to_the_bit(tmp_path, job, phase, step, solved):
    folder, policy = tmp_path / "job", JOBS[job]
    kill(job, folder, phase, step)
    before, events = kept(folder), []
    assert sum(name.startswith("leaf") for name in before) == solved
    assert any(name.startswith("scales") for name in before) == (job == "rescaled")
    result = qjax.quantize(fn, PARAMS, policy, DATA, resume=folder, progress=events.append)
    whole = qjax.quantize(fn, PARAMS, policy, DATA)
    chex.assert_trees_all_equal(result.params, whole.params)
    assert jax.tree.structure(result.params) == jax.tree.structure(whole.params)
    assert result.report.rows == whole.report.rows
    after = kept(folder)
    assert {name: after[name] for name in before} == before  # nothing that was finished is made again
    assert sum(name.startswith("leaf") for name in after) == 3 * LAYERS + (job == "rescaled")
    first = next(e for e in events if e.phase == "calibrate" and e.done == 1)
    assert (first.remaining is None) == (phase == "calibrate")  # what was found says nothing about the time


def test_a_finished_folder_gives_the_result_without_solving(tmp_path, monkeypatch):
    params, policy = {"w": PARAMS["head"]}, qjax.Policy([qjax.Rule("*", weight=qjax.int4(group_size=8), method=GPTQ)])
    arguments = lambda p, x: x @ p["w"], params, policy, DATA
    one = qjax.quantize(*arguments, resume=tmp_path)
    monkeypatch.setattr(type(qjax.gptq()), "quantize", lambda *_: pytest.fail("solved again"))
    again = qjax.quantize(*arguments, resume=str(tmp_path))
    chex.assert_trees_all_equal(one.params, again.params)


def small(**changes):
    given = {
        "fn": lambda p, x: jnp.tanh(x @ p["w"]),
        "params": {"w": jnp.eye(8)},
        "policy": qjax.Policy([qjax.Rule("*", weight=qjax.int4(), method=qjax.rtn(mse=True))]),
        "calibration": [jnp.ones((2, 8))],
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"params": {"w": jnp.eye(8).at[0, 0].set(2)}}, "parameters;"),
        ({"calibration": [jnp.zeros((2, 8))]}, "calibration;"),
        ({"calibration": [jnp.ones((2, 8))] * 2}, "calibration;"),
        ({"policy": qjax.Policy([qjax.Rule("*", weight=qjax.int4(), method=qjax.rtn())])}, "policy;"),
        ({"fn": lambda p, x: jnp.sin(x @ p["w"])}, "program;"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_another_job_is_refused_by_name_and_nothing_is_lost(tmp_path, changes, words):
    qjax.quantize(**small(), resume=tmp_path)
    before = kept(tmp_path)
    with pytest.raises(ValueError, match=f"`resume` .* holds the work of another job: it differs in its {words} give another folder"):
        qjax.quantize(**small(**changes), resume=tmp_path)
    assert kept(tmp_path) == before
    qjax.quantize(**small(), resume=tmp_path)


def test_other_folders_and_damage_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds 'thesis.txt', which no quantization kept: give a new folder"):
        qjax.quantize(**small(), resume=tmp_path / "mine")
    with pytest.raises(FileExistsError, match="is a file: give a folder"):
        qjax.quantize(**small(), resume=tmp_path / "mine" / "thesis.txt")
    qjax.quantize(**small(), resume=tmp_path / "job")
    (file,) = (tmp_path / "job").glob("leaf.*")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{file.name}` is damaged.*remove it"):
        qjax.quantize(**small(), resume=tmp_path / "job")
    file.unlink()
    qjax.quantize(**small(), resume=tmp_path / "job")
    assert np.array_equal(np.frombuffer(file.read_bytes(), np.uint8), np.frombuffer(content, np.uint8))
