"""`qjax demo`: the second process on a tiny model, and the whole of it on the model that ships."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.cli.demo import _second_process
from qjax.cli.digest import digest
from qjax.cli.shared import open_model

from . import demo_figures
from .conftest import error_of, json_of

TOKENS = np.arange(256, dtype=np.int32).reshape(8, 32)


@pytest.fixture(scope="module")
def found(packed):
    return _second_process(open_model(str(packed)), packed, TOKENS)


@pytest.mark.slow
def test_a_second_process_gives_the_same_logits_to_the_last_bit(found):
    assert found["identical"] is True
    assert found["here"]["sha256"] == found["there"]["sha256"]
    assert found["here"]["logits"] == 8 * 32 * 264
    assert found["there"]["process"] != found["here"]["process"] == os.getpid()


@pytest.mark.slow
def test_the_digest_notices_one_bit_of_one_weight(packed, found):
    model = open_model(str(packed))
    kernel = model.params["params"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    changed = dataclasses.replace(kernel, codes=kernel.codes.at[0, 0].set(kernel.codes[0, 0] ^ 1))
    params = jax.tree.map(
        lambda q: changed if q is kernel else q, model.params, is_leaf=lambda x: isinstance(x, qjax.QTensor)
    )
    assert digest(model, TOKENS)["sha256"] == found["there"]["sha256"]
    assert digest(dataclasses.replace(model, params=params), TOKENS)["sha256"] != found["there"]["sha256"]


@pytest.mark.slow
def test_a_second_process_that_fails_says_why(packed, tmp_path):
    with pytest.raises(OSError, match=r"second process .* is not a folder"):
        _second_process(open_model(str(packed)), tmp_path / "nothing", TOKENS)


def test_a_folder_in_use_is_refused_before_any_work(tmp_path):
    (tmp_path / "int4-g128-gptq").mkdir()
    (tmp_path / "int4-g128-gptq" / "notes.txt").touch()
    assert "notes.txt" in error_of("demo", "--directory", tmp_path, code=1)


TABLE = """
model           perplexity     nats  agrees  weight     disk    memory     / s
float32             47.051                    32.00  8.40 MB  16.79 MB    1000
int8 rtn            47.057  0.00004  99.42%    8.10  5.37 MB   5.29 MB     639
int4 g128 rtn       47.423  0.00867  92.26%    4.25  3.86 MB   3.77 MB     398
int4 g128 gptq      47.163  0.00426  94.79%    4.25  3.86 MB   3.77 MB     417
int3 g128 gptq      47.874  0.02016  88.81%    3.25  3.34 MB   3.24 MB     390
"""


def test_the_gate_notices_a_figure_of_the_whole_demo_that_is_off():
    assert demo_figures.wrong(TABLE) == []
    assert demo_figures.wrong(TABLE.replace("47.423", "47.431")) == ["int4 g128 rtn: 47.431 for 47.423"]
    assert demo_figures.wrong(TABLE.replace("47.163", "47.311")) == ["int4 g128 gptq: 47.311, not below 47.242"]
    assert len(demo_figures.wrong("")) == 5


@pytest.mark.slow
def test_the_demo_of_less_text(tmp_path):
    root = str(Path(qjax.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "qjax.cli", "demo", "--quick", "--json", "--directory", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True)
    found = json.loads(done.stdout)
    rows = {row["model"]: row for row in found["rows"]}
    perplexities = {name: row["perplexity"] for name, row in rows.items()}
    assert abs(perplexities["int8 rtn"] / perplexities["float32"] - 1) < 0.001
    assert all(0.99 < perplexity / perplexities["float32"] < 1.05 for perplexity in perplexities.values())
    packed = list(rows)[1:]
    assert rows["int4 g128 gptq"]["kl"] < rows["int4 g128 rtn"]["kl"]
    assert rows["int8 rtn"]["kl"] < 1e-4 < rows["int4 g128 rtn"]["kl"] < 0.02
    assert all(0.85 < rows[name]["top1_agreement"] < 1 for name in packed)
    assert [round(row["bits_per_weight"], 2) for row in rows.values()] == [32, 8.1, 4.25, 4.25, 3.25]
    for name in packed:
        assert rows[name]["memory_bytes"] < rows[name]["disk_bytes"] < rows["float32"]["disk_bytes"]
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert found["second_process"]["identical"] is True
    assert found["second_process"]["here"]["process"] != found["second_process"]["there"]["process"]
    assert (found["windows"], found["window"], found["calibration_windows"]) == (32, 256, 32)
    for paragraph in found["paragraphs"].values():
        assert paragraph.startswith(found["prompt"])
        assert len(paragraph) > 200
    assert found["paragraphs"]["float32"] != found["paragraphs"]["int4 g128 gptq"]
    assert "measuring: " in done.stderr
    kept = json_of("inspect", tmp_path / "demo" / "int3-g128-gptq")
    assert kept["quantized"] == 28
