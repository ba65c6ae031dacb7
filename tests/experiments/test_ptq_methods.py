"""The parts of the comparison of methods: its second model, the pairs with references, its figures."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "ptq_methods"


@pytest.fixture
def second_model(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import second_model

    return second_model


@pytest.fixture
def figure(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import figure

    return figure


@pytest.mark.slow
def test_the_second_model_trains_and_is_loaded_as_a_function_of_its_parameters(second_model, tmp_path):
    config = second_model.Config(vocabulary=32, width=24, layers=2, heads=3, kv_heads=1, hidden=40, context=8)
    ids = np.arange(400, dtype=np.int32) % 32
    texts = second_model.Texts([ids[:300]], ids[300:364].reshape(8, 8), ids[336:].reshape(8, 8))
    params, log = second_model.fit(config, texts, steps=40, batch=8, seed=0, rate=0.1, every=20)
    again, _ = second_model.fit(config, texts, steps=40, batch=8, seed=0, rate=0.1, every=20)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))  # by its seed alone
    assert len(log) == 2 and float(log[-1].split()[3]) < float(log[0].split()[3]) < 1.05 * math.log(32)

    second_model.save(params, tmp_path / "weights.safetensors")
    apply, loaded = second_model.load(tmp_path / "weights.safetensors", jnp.float32, config)
    tokens = jnp.asarray(texts.heldout)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, rounded))
    assert apply(loaded, tokens).shape == (8, 8, 32)
    half, halved = second_model.load(tmp_path / "weights.safetensors", jnp.bfloat16, config)
    assert half(halved, tokens).dtype == jnp.bfloat16

    policy = qjax.Policy([*second_model.KEEP, qjax.Rule("*", weight=qjax.int3(group_size=8))])
    rows = [row for row in qjax.sites(apply, policy)(loaded, tokens).rows if row.spec]
    assert sorted(row.path for row in rows) == sorted(f"layers/{name}/kernel" for name in ("query", "key", "value", "out", "up", "down"))
    assert all(row.shape[0] == config.layers for row in rows)


def test_weights_that_were_not_trained_are_asked_for(second_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run `python second_model\.py` first"):
        second_model.load_second(tmp_path / "none.safetensors")


def test_the_parts_of_the_texts_do_not_meet(second_model):
    texts = second_model.read_texts(64)
    rows = second_model.calibration(texts.train, 64, count=16)
    assert rows.shape == (16, 64) and texts.stop.shape[1] == texts.heldout.shape[1] == 64
    seen = {tuple(window) for ids in texts.train for window in np.lib.stride_tricks.sliding_window_view(ids, 24)}
    for part in (texts.stop, texts.heldout):
        assert not any(tuple(row[20:44]) in seen for row in part)
    assert all(tuple(row[20:44]) in seen for row in rows)
    assert len(np.unique(texts.heldout, axis=0)) == len(texts.heldout)


def records():
    found = [
        {"model": "one", "key": "float", "losses": [9.0, 9.0, math.log(40), math.log(40)]},
        {"model": "one", "key": "3 g128 broken", "error": ["no"]},
    ]
    for bits, rounded in ((4, 42.0), (2, 90.0)):
        for size, more in (("channel", 0.05), ("g128", 0.125), ("g32", 0.5)):
            for method, kept in (("rounding", 1.0), ("GPTQ", 0.4), ("NF4", 1.2)):
                score = 40 + kept * (rounded - 40)
                losses = [0.0, 0.0, math.log(score), math.log(score)]
                found.append(
                    {"model": "one", "method": method, "bits": bits, "size": size, "bits_per_weight": bits + more, "losses": losses}
                )
    return found


def test_figures_name_every_method_and_repeat_to_the_byte(figure, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(records()))
    rows, floats = figure.read(tmp_path / "results.json")
    assert len(rows) == 18 and floats == {"one": pytest.approx(40)}
    assert {round(share) for r, share in figure.gap_closed(rows, floats) if r["method"] == "GPTQ"} == {60}
    assert {round(share) for r, share in figure.gap_closed(rows, floats) if r["method"] == "NF4"} == {-20}
    for name, draw in (("perplexity", figure.draw_bits), ("gap", figure.draw_gap)):
        for copy in "ab":
            figure.save(draw(rows, floats), tmp_path / f"{name}-{copy}.svg")
        first = (tmp_path / f"{name}-a.svg").read_bytes()
        assert first == (tmp_path / f"{name}-b.svg").read_bytes() and b"GPTQ" in first and b"NF4" in first


def test_results_without_the_float_model_are_refused(figure, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(records()[1:]))
    with pytest.raises(ValueError, match="no record of the float model for one"):
        figure.read(tmp_path / "results.json")


def test_labels_move_apart_and_no_further(figure):
    assert figure.spread([0.1, 0.5, 0.9], 0.2).tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert figure.spread([0.5, 0.5, 0.9], 0.2).tolist() == pytest.approx([0.4, 0.6, 0.9])
    crowded = figure.spread([0.3, 0.1, 0.2, 0.25], 0.2)
    assert np.argsort(crowded).tolist() == [1, 2, 3, 0] and np.diff(np.sort(crowded)).min() > 0.2 - 1e-9
