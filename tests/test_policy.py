"""Policies: first match wins, and a rule that does nothing is an error that names it."""

import json

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax import Policy, Rule
from qjax.formats.checkpoint import DOCUMENT

PARAMS = {
    "params": {
        "embed": {"embedding": jnp.ones((9, 4))},
        "attention": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
        "norm": {"scale": jnp.ones(4)},
        "head": {"kernel": jnp.ones((6, 3))},
    }
}


def fn(v, tokens):
    p = v["params"]
    x = p["embed"]["embedding"][tokens] * p["norm"]["scale"]
    return (x @ p["attention"]["kernel"] + p["attention"]["bias"]) @ p["head"]["kernel"]


TOKENS = jnp.arange(5)


def rows(*rules):
    return {row.path: row for row in qjax.sites(fn, Policy(rules))(PARAMS, TOKENS).rows}


def test_first_match_wins_and_the_rest_says_why():
    found = rows(Rule("*embed*", weight=None), Rule("attention/*", weight=qjax.int4()), Rule("*", weight=qjax.int8()))
    assert {p: r.spec for p, r in found.items() if r.spec} == {
        "attention/kernel": str(qjax.int4()),
        "head/kernel": str(qjax.int8()),
    }
    assert found["embed/embedding"].reason == "rule '*embed*' leaves it float"
    assert found["attention/bias"].reason == "it meets no data in a matmul, convolution or lookup, only add"
    assert rows(Rule("head/*", weight=qjax.int8()))["attention/kernel"].reason == "no rule matches its path"


def test_a_typo_is_named_with_what_it_may_have_meant():
    with pytest.raises(ValueError, match=r"`pattern` '\*atention\*' matches no parameter.*did you mean '\*attention\*'"):
        rows(Rule("*atention*", weight=qjax.int8()))


def test_the_last_part_of_a_path_is_said_to_need_a_star():
    with pytest.raises(ValueError, match=r"'kernel' matches no parameter of the program; did you mean '\*kernel'\?"):
        rows(Rule("kernel", weight=qjax.int8()))


def test_a_rule_for_biases_only_is_named():
    with pytest.raises(ValueError, match=r"'\*bias' matches only parameters that cannot be quantized, such as 'attention/bias'"):
        rows(Rule("*bias", weight=qjax.int8()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Policy([]), ValueError, "`rules` is empty"),
        (lambda: Policy(Rule("*", weight=qjax.int8())), TypeError, "must be a sequence, got one rule"),
        (lambda: Policy([("*", qjax.int8())]), TypeError, "must hold qjax.Rule values"),
        (lambda: Rule("", weight=qjax.int8()), TypeError, "`pattern` must be a non-empty string"),
        (lambda: Rule("*", weight="int8"), TypeError, "`weight` must be a spec such as"),
        (lambda: Rule("*", weight=qjax.int8), TypeError, "`weight` must be a spec such as"),
        (lambda: Rule("*", weight=qjax.int8(), method="gptq"), TypeError, "`method` must be a method such as"),
        (lambda: Rule("*", weight=qjax.int8(), method=qjax.gptq), TypeError, "`method` must be a method such as"),
        (lambda: Rule("*", method=qjax.gptq()), TypeError, "has nothing to do"),
    ],
)
def test_bad_rules_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": qjax.schedule(activations=10)}, r"got Schedule\(.*: write train=qjax.qat\(schedule=qjax.schedule\(...\)\)"),
        ({"train": qjax.lsq}, r"`train` must be .* got <function lsq .*; it is not called: write qjax.lsq\(...\)"),
        ({"train": qjax.qat}, r"; it is not called: write qjax.qat\(...\)"),
        ({"train": qjax.schedule}, r"; it is not called: write qjax.schedule\(...\)"),
        ({"train": type(qjax.lsq())}, r"`train` must be .*; give what it returns, not itself"),
        ({"train": lambda: qjax.lsq()}, r"`train` must be .*; give what it returns, not itself"),
        ({"train": qjax.gptq()}, r"`train` must be .*; a method goes to `method`"),
        ({"train": qjax.int4()}, r"`train` must be .*; a spec goes to `weight`"),
        ({"train": "lsq"}, r"`train` must be .* got 'lsq'$"),
        ({"weight": qjax.int4}, r"`weight` must be .*; it is not called: write qjax.int4\(...\)"),
        ({"weight": qjax.gptq()}, r"`weight` must be .*; a method goes to `method`"),
        ({"weight": qjax.dynamic(qjax.int8())}, r"`weight` must be .*; an activation spec goes to `activation`"),
        ({"weight": qjax.kv_cache(qjax.int8())}, r"`weight` must be .*; a cache spec goes to `cache`"),
        ({"method": qjax.gptq}, r"`method` must be .*; it is not called: write qjax.gptq\(...\)"),
        ({"method": qjax.int4()}, r"`method` must be .*; a spec goes to `weight`"),
        ({"method": qjax.lsq()}, r"`method` must be .*; how a rule trains goes to `train`"),
        ({"activation": qjax.int8()}, r"`activation` must be .*; write qjax.dynamic\(...\) around it"),
        ({"activation": qjax.dynamic}, r"`activation` must be .*; it is not called: write qjax.dynamic\(...\)"),
        ({"weight": None, "cache": qjax.int8()}, r"`cache` must be .*; write qjax.kv_cache\(...\) around it"),
    ],
)
def test_what_stands_in_the_wrong_place_is_told_where_it_goes(given, message):
    with pytest.raises(TypeError, match=message):
        Rule("*", **({"weight": qjax.int8()} | given))


def test_sites_refuses_what_quantize_would_with_a_remedy_for_all_parameters():
    params = {"a": jnp.ones((48, 104)), "b": jnp.ones((104, 4))}
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(group_size=16))])
    with pytest.raises(ValueError, match="take 8, the nearest size that divides those of all parameters of the rule"):
        qjax.sites(lambda p, x: x @ p["a"] @ p["b"], policy)(params, jnp.ones((2, 48)))
    params["a"] = jnp.ones((50, 104))  # groups of two would hold more scales than codes
    with pytest.raises(ValueError, match='take per="channel", or give them rules of their own, for none but 2 divides all, or pad=True'):
        qjax.sites(lambda p, x: x @ p["a"] @ p["b"], policy)(params, jnp.ones((2, 50)))


def test_sites_touches_no_number_and_counts_the_bytes_quantize_makes():
    policy = Policy([Rule("*", weight=qjax.int4(group_size=2))])
    shapes = jax.eval_shape(lambda: PARAMS)
    planned = qjax.sites(fn, policy)(shapes, jax.ShapeDtypeStruct((5,), jnp.int32))
    made = qjax.quantize(fn, PARAMS, policy, calibration=[TOKENS]).report
    assert [(r.path, r.nbytes, r.bits_per_weight) for r in planned.rows] == [
        (r.path, r.nbytes, r.bits_per_weight) for r in made.rows
    ]
    assert planned.nbytes == made.nbytes < planned.float_nbytes


def test_report_is_data_and_prints(monkeypatch):
    import json

    monkeypatch.setenv("COLUMNS", "140")
    report = qjax.quantize(fn, PARAMS, Policy([Rule("head/*", weight=qjax.int8())]), calibration=[TOKENS]).report
    document = json.loads(report.to_json())
    assert [r["path"] for r in document["rows"] if r["spec"]] == ["head/kernel"]
    assert "1 of 5 parameters quantized" in str(report)
    assert all(row.path in str(report) for row in report.rows)


def test_rules_for_caches_stand_beside_the_others(tmp_path):
    spec = qjax.kv_cache(qjax.uint4(scale_dtype="float16"), "channel", group_size=16, window=8)
    policy = Policy([Rule("*/key", cache=spec), Rule("*", weight=qjax.int8()), Rule("head/*", cache=qjax.kv_cache(None))])
    result = qjax.quantize(fn, PARAMS, policy, calibration=[TOKENS])
    assert {row.spec for row in result.report.rows if row.spec} == {str(qjax.int8())}  # a cache rule matches no parameter
    assert any("'*/key'" in n and "'head/*'" in n and str(spec) in n and "quantized_cache" in n for n in result.report.notes)
    qjax.save(tmp_path / "it", result)
    assert qjax.load(tmp_path / "it").policy == policy
    rules = json.loads((tmp_path / "it" / DOCUMENT).read_text())["policy"]["rules"]
    assert ["cache" in rule for rule in rules] == [True, False, True]  # older readers take what has none


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Rule("*", cache=qjax.int4()), TypeError, ["`cache`", "kv_cache"]),
        (lambda: Rule("*", weight=qjax.int4(), cache=qjax.kv_cache(qjax.int4())), ValueError, ["`weight`", "caches", "a rule for each"]),
        (lambda: Rule("*", activation=qjax.dynamic(qjax.int8()), cache=qjax.kv_cache(None)), ValueError, ["`activation`"]),
    ],
)
def test_a_cache_rule_has_nothing_else(make, error, words):
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value)
