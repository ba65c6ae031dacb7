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


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import table

    return table


def test_pairs_are_turned_round_only_if_both_models_say_so_when_all_pairs_are_counted(table):
    np.testing.assert_allclose(table.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])  # by hand
    np.testing.assert_allclose(table.benjamini_hochberg([0.01, 0.04, 0.03]), [0.03, 0.04, 0.04])
    t, p = table.student(np.arange(5.0), np.zeros(5))  # 2 / (sqrt(2.5) / sqrt(5)); p of a table of t with 4 degrees of freedom
    assert (round(t, 4), round(p, 4)) == (2.8284, 0.0237) and table.student(np.arange(5.0), np.zeros(5), scatter=1e3)[0] < 0.01
    assert table.reversal((-3.0, 0.001), (2.0, 0.02)) == 0.02 and table.reversal((-3.0, 0.001), (-2.0, 0.02)) == 1.0

    def record(model, method, losses):
        return {"model": model, "key": method or "float", "bits": 4, "size": "g64", "method": method, "losses": losses, "kls": losses}

    noise = 0.01 * np.random.default_rng(0).standard_normal(20)
    records = [record("one", None, [3.0] * 20), record("two", None, [3.0] * 20)]
    for model, sizes in (("one", (0.1, 0.2, 0.3)), ("two", (0.2, 0.1, 0.3))):
        for i, size in enumerate(sizes):
            records.append(record(model, "abc"[i], list(3.0 + size + noise * (1 + i))))
    pairs = list(table.compared(records, "one", "two", "perplexity", {}))
    assert [pair[1:3] for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert (table.holm([table.reversal(*pair[3:]) for pair in pairs]) < 0.05).tolist() == [True, False, False]


@pytest.mark.slow
def test_the_second_model_learns_its_teacher_and_is_loaded_as_a_function_of_its_parameters(second_model, tmp_path):
    config = second_model.Config(vocabulary=32, width=24, layers=2, heads=3, kv_heads=1, hidden=40, context=8)
    table = 3 * jnp.eye(32)[(jnp.arange(32) + 1) % 32]  # the next token is likely one more

    def made(key, count):
        starts = jax.random.randint(key, (count, 1), 0, 32)
        return np.asarray((starts + jnp.arange(8)) % 32, np.int32)

    source = second_model.Teacher(lambda table, tokens: table[tokens], table, made)
    params, again = (second_model.fit(config, source, steps=200, batch=8, seed=0, chunk=50) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))  # by its seed alone

    second_model.save(params, tmp_path / "weights.safetensors")
    apply, loaded = second_model.load_second(tmp_path / "weights.safetensors", jnp.float32, config)
    tokens = jnp.asarray(made(jax.random.key(9), 8))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, rounded))
    logits = apply(loaded, tokens)
    assert logits.shape == (8, 8, 32)
    entropy = -jnp.sum(jax.nn.softmax(table) * jax.nn.log_softmax(table), axis=-1).mean()
    loss = -jnp.mean(jnp.sum(jax.nn.softmax(table[tokens]) * jax.nn.log_softmax(logits), axis=-1))
    assert entropy < loss < 0.9 * math.log(32)
    half, halved = second_model.load_second(tmp_path / "weights.safetensors", jnp.bfloat16, config)
    assert half(halved, tokens).dtype == jnp.bfloat16

    policy = qjax.Policy([*second_model.KEEP, qjax.Rule("*", weight=qjax.int3(group_size=8))])
    rows = [row for row in qjax.sites(apply, policy)(loaded, tokens).rows if row.spec]
    assert sorted(row.path for row in rows) == sorted(f"layers/{name}/kernel" for name in ("query", "key", "value", "out", "up", "down"))
    assert all(row.shape[0] == config.layers for row in rows)


def test_weights_that_were_not_trained_are_asked_for(second_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run `python second_model\.py` first"):
        second_model.load_second(tmp_path / "none.safetensors")


@pytest.mark.slow
def test_the_teacher_makes_windows_that_begin_as_all_do_and_differ_by_key(second_model):
    source = second_model.teacher(16)
    first, other = (source.windows(jax.random.key(seed), 3) for seed in (0, 1))
    assert first.shape == (3, 16) and (first[:, 0] == second_model.START).all()
    assert (first != other).any() and np.array_equal(first, source.windows(jax.random.key(0), 3))
    assert source.logits(source.params, jnp.asarray(first)).shape == (3, 16, 4096)


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
