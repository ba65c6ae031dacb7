"""`qjax eval` and `qjax inspect`."""

import jax
import numpy as np
import pytest

import qjax
from qjax.cli.evaluate import score_table
from qjax.cli.shared import open_model
from qjax.evaluation import encode, windows
from qjax.formats.huggingface import load_checkpoint
from qjax.report import render

from .conftest import error_of, invoke, json_of


@pytest.fixture(scope="module")
def expected(tiny, packed, text):
    """Perplexities, divergence and agreement, from the logits by NumPy in float64."""
    rows = windows(encode(load_checkpoint(tiny).tokenizer, text.read_text()), 32, 1)
    log_p, log_q = (log_probabilities(open_model(str(folder)), rows) for folder in (tiny, packed))
    return {
        "float": perplexity(log_p, rows),
        "packed": perplexity(log_q, rows),
        "kl": np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)),
        "top1": np.mean(log_p.argmax(-1) == log_q.argmax(-1)),
    }


def log_probabilities(model, rows):
    halves = [np.asarray(model.forward(model.params, rows[i : i + 8]), np.float64) for i in (0, 4)]
    logits = np.concatenate([halves[0], halves[1][4:]])[:, :-1]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def perplexity(log_p, rows):
    return np.exp(-np.mean(np.take_along_axis(log_p, rows[:, 1:, None], axis=-1)))


def test_eval_against_the_float_model(tiny, packed, text, expected):
    found = json_of("eval", packed, "--text", text, "--against", tiny)
    assert found["perplexity"] == pytest.approx(expected["packed"], rel=1e-5)
    assert found["against"]["perplexity"] == pytest.approx(expected["float"], rel=1e-5)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(expected["top1"], abs=1e-9)
    assert (found["windows"], found["window"]) == (12, 32)
    difference = found["loss_difference"]
    assert difference["nats"] == pytest.approx(np.log(expected["packed"] / expected["float"]), abs=1e-6)
    assert difference["low"] <= difference["nats"] <= difference["high"]


def test_eval_of_a_float_model_alone(tiny, text, expected):
    found = json_of("eval", tiny, "--text", text)
    assert found["perplexity"] == pytest.approx(expected["float"], rel=1e-5)
    assert (found["kl"], found["top1_agreement"], found["against"], found["loss_difference"]) == (None,) * 4
    assert found["bits_per_weight"] == 32
    assert found["disk_bytes"] == (tiny / "model.safetensors").stat().st_size
    assert found["memory_bytes"] == 4 * sum(w.size for w in jax.tree.leaves(load_checkpoint(tiny).params))
    assert found["tokens_per_second"] > 0


def test_sizes_of_a_packed_model(packed, text):
    found = json_of("eval", packed, "--text", text, "--limit", 8)
    params = qjax.load(packed).params
    assert found["memory_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert found["bits_per_weight"] == 4 + 32 / 16
    everything = sum(path.stat().st_size for path in packed.rglob("*") if path.is_file())
    assert found["memory_bytes"] < found["disk_bytes"] < everything
    assert found["windows"] == 8


def test_a_model_against_itself(packed, text):
    found = json_of("eval", packed, "--text", text, "--against", packed)
    assert (found["kl"], found["top1_agreement"]) == (0, 1)


def test_eval_for_people(tiny, packed, text):
    result = invoke("eval", packed, "--text", text, "--against", tiny)
    assert result.exit_code == 0
    assert "perplexity" in result.stdout
    assert "95 % interval" in result.stdout
    assert result.stderr.startswith("evaluating: ")


def test_the_table_fits_a_narrow_terminal():
    row = {"perplexity": 47.42283, "kl": 0.00867, "top1_agreement": 0.9225750, "bits_per_weight": 4.25, "disk_bytes": 13_855_773,
           "memory_bytes": 16_790_000, "tokens_per_second": 1152.2}  # fmt: skip
    text = render(score_table([row], ["int4 g128 gptq"]), width=80)
    assert "int4 g128 gptq      47.423" in text
    assert max(map(len, text.splitlines())) <= 80


def bad_inputs():
    yield ["NONE"], 1, ["NONE", "is not a folder"]
    yield ["TINY", "--text", "NONE"], 2, ["--text", "NONE"]
    yield ["TINY", "--text", "SHORT"], 1, ["SHORT", "9 tokens", "32"]
    yield ["TINY", "--window", "64"], 1, ["--window 64", "32"]
    yield ["TINY", "--against", "books-llama-4m"], 1, ["books-llama-4m", "4096", "264"]
    yield ["DUMB", "--text", "SHORT"], 1, ["DUMB", "tokenizer.json"]
    yield ["BARE"], 1, ["BARE", "qjax quantize"]
    yield ["DAMAGED"], 1, ["DAMAGED", "damaged"]


@pytest.mark.parametrize(("arguments", "code", "words"), list(bad_inputs()), ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_bad_input(tiny, packed, tmp_path, arguments, code, words):
    names = {name: str(tmp_path / name) for name in ("NONE", "SHORT", "DUMB", "BARE", "DAMAGED")} | {"TINY": str(tiny)}
    (tmp_path / "SHORT").write_text("too short")
    (tmp_path / "DUMB").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "DUMB" / name).write_bytes((tiny / name).read_bytes())
    qjax.save(tmp_path / "BARE", {"w": np.zeros(3, np.float32)})
    (tmp_path / "DAMAGED").mkdir()
    (tmp_path / "DAMAGED" / "qjax.json").write_bytes((packed / "qjax.json").read_bytes().replace(b"264", b"265", 1))
    line = error_of("eval", *(names.get(word, word) for word in arguments), code=code)
    for word in words:
        assert word in line, line


def test_inspect_packed(tiny, packed):
    found = json_of("inspect", packed)
    assert (found["kind"], found["quantized"], found["parameters"], found["tokenizer"]) == ("packed", 14, 21, True)
    assert found["policy"][-1].startswith("Rule('*', weight=int4(group_size=16)")
    assert found["written_by"]["qjax"] == qjax.__version__
    assert found["metadata"]["config"]["hidden_size"] == 32
    assert "tokenizer" not in found["metadata"]
    params = {"params": load_checkpoint(tiny).params}
    assert found["source"] == {"sha256": qjax.formats.checkpoint.fingerprint(params), "of": "float parameters"}
    assert all(0 < row["error"] < 0.02 for row in found["rows"] if row["spec"])


def test_inspect_float(tiny):
    found = json_of("inspect", tiny)
    assert (found["kind"], found["quantized"], found["parameters"]) == ("float", 0, 21)
    assert {row["path"]: row["ops"] for row in found["rows"]}["lm_head/kernel"] == ["dot_general"]
    assert found["nbytes"] == 2 * sum(w.size for w in jax.tree.leaves(load_checkpoint(tiny).params))


def test_inspect_for_people(tiny, packed):
    short = invoke("inspect", packed).stdout
    assert "layers_*/self_attn/q_proj/kernel" in short
    assert "layers_1/self_attn/q_proj/kernel" in invoke("inspect", packed, "--every").stdout
    assert "policy: Rule('*embed*', weight=None)" in short
    assert "16 of 21 parameters can be quantized" in invoke("inspect", tiny).stdout
    assert max(map(len, short.splitlines())) <= 80


def test_inspect_reads_a_checkpoint_saved_by_the_library(tmp_path):
    qjax.save(tmp_path / "bare", {"w": np.zeros(3, np.float32)})
    found = json_of("inspect", tmp_path / "bare")
    assert (found["rows"], found["policy"], found["tokenizer"]) == ([], [], False)
    assert invoke("inspect", tmp_path / "bare").exit_code == 0
