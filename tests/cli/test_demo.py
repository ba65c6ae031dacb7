"""`qjax demo`: the second process on a tiny model, and what the gate reads of the whole of it, which the install line runs."""

import dataclasses
import os

import jax
import numpy as np
import pytest

import qjax
from qjax.cli import demo
from qjax.cli.demo import _second_process
from qjax.cli.digest import digest
from qjax.cli.shared import open_model

from . import demo_figures
from .conftest import error_of, invoke, json_of

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


def test_json_is_the_document_and_another_processs_other_logits_are_an_error(tmp_path, monkeypatch):
    same = {"identical": True}
    monkeypatch.setattr(demo, "_run", lambda folder, count, stages: {"second_process": same, "windows": count, "folder": folder.name})
    found = json_of("demo", "--quick", "--directory", tmp_path / "kept")
    assert found.pop("seconds") >= 0
    assert found == {"second_process": same, "windows": 32, "folder": "kept", "directory": str(tmp_path / "kept")}
    same["identical"] = False
    result = invoke("demo", "--json")
    assert result.exit_code == 1 and "logits of the second process differ" in result.stderr


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
    assert demo_figures.wrong(TABLE.replace("3.25  3.34", "4.00  3.34")) == ["int3 g128 gptq: 4.00 bits a weight for 3.25"]
    assert demo_figures.wrong(TABLE.replace("0.00426", "0.00926")) == ["KL of int4 g128 gptq is not below that of int4 g128 rtn"]
    assert len(demo_figures.wrong("")) == 11
