"""A plan prices a job from shapes alone: what it would make is what quantizing makes, and nothing is computed."""

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax import Policy, Rule
from qjax.ptq.work import forward
from tests.program.cases import CASES, normal
from tests.ptq.long_job import DATA, LAYERS, PARAMS, POLICY, D, fn

RATES = qjax.Rates(1e10, 1e8)
SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, DATA))


def test_it_needs_shapes_alone_and_foretells_the_bytes():
    plan = qjax.plan(fn, SHAPES[0], POLICY, SHAPES[1], rates=RATES)
    numbers = qjax.plan(fn, PARAMS, POLICY, DATA, rates=RATES)
    assert plan == numbers
    rounded = Policy([Rule("*", weight=qjax.int4(group_size=8))])
    priced = qjax.plan(fn, SHAPES[0], rounded, SHAPES[1][:1], rates=RATES)
    result = qjax.quantize(fn, PARAMS, rounded, DATA[:1])
    assert [(r.path, r.spec, r.nbytes, r.bits_per_weight) for r in priced.report.rows] == [
        (r.path, r.spec, r.nbytes, r.bits_per_weight) for r in result.report.rows
    ]
    assert (priced.passes, priced.statistics, priced.live, priced.problems) == (0, 0, 0, ())


def test_the_counts_of_a_scanned_model():
    plan = qjax.plan(fn, *SHAPES[:1], POLICY, SHAPES[1], rates=RATES)
    assert (plan.batches, plan.rows) == (3, 3 * 18)
    assert plan.passes == 3  # one to rescale, one in pieces for GPTQ, one for static ranges
    assert forward(qjax.trace(fn, PARAMS, DATA[0])) == 2 * 18 * (3 * LAYERS + 1) * D * D
    solver = D**3 / 3 + 2 * D**3
    gram = 2 * 3 * 18 * D * D
    search = 4 * 512 * D * D * 5
    assert plan.work.products == pytest.approx(3 * 3 * 2 * 18 * (3 * LAYERS + 1) * D * D + 3 * LAYERS * (solver + gram + search))
    assert plan.seconds > plan.work.products / RATES.products
    assert plan.peak >= plan.report.nbytes + plan.statistics + plan.live


def test_statistics_do_not_grow_with_the_data_and_live_values_do():
    policy = Policy([Rule("*", weight=qjax.int4(), method=qjax.gptq())])
    few, many = (qjax.plan(fn, SHAPES[0], policy, SHAPES[1] * n, rates=RATES) for n in (1, 4))
    assert few.statistics == many.statistics == D * D * 4 + 4 + 4  # a Hessian, its count, whether all was finite
    assert many.live == 4 * few.live > 0


def test_what_would_be_refused_is_listed_not_raised():
    params = {"a": jnp.ones((8, 12)), "b": jnp.ones((12, 8))}
    both = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    plan = qjax.plan(both, params, Policy([Rule("*", weight=qjax.int4(group_size=6))]), [jnp.ones((2, 8))], rates=RATES)
    (problem,) = plan.problems
    assert "`group_size`=6 does not divide the 8 contracted values of `a`: take 4" in problem
    assert [bool(row.spec) for row in plan.report.rows] == [False, True]
    assert "take 4" in plan.report.rows[0].reason  # the size that fits all of the rule, as the headline names it
    assert plan.lines()[0] == f"would be refused: {problem}" and problem in str(plan)


def lines_of(policy, params, data):
    plan = qjax.plan(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, policy, data, rates=RATES)
    return plan, "\n".join(plan.lines())


PAIR = {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 16))}


def test_bits_a_weight_are_those_of_all_weights():
    plan, text = lines_of(Policy([Rule("a", weight=qjax.int2()), Rule("b", weight=qjax.int8())]), PAIR, [jnp.ones((2, 16))])
    made = sum(row.nbytes for row in plan.report.rows)
    assert f"{8 * made / 512:.2f} bits a weight" in text
    assert "data: none is used" in text and "passes" not in text and "0.0 s" not in text


def told(policy, fn, params, data):
    """The phases that run over the batches, by how often."""
    begun = []
    qjax.quantize(fn, params, policy, data, progress=lambda p: begun.append(p.phase) if p.done == 0 and p.phase != "round" else None)
    return len(begun)


def test_the_passes_are_those_that_quantize_makes():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    data = [normal(4, 16)] * 2
    for method in (qjax.llm_int8(), qjax.llm_int8(capacity=8)):
        policy = Policy([Rule("*", weight=qjax.int8(), method=method)])
        plan = qjax.plan(fn, PAIR, policy, data, rates=RATES)
        assert plan.passes == told(policy, fn, PAIR, data) == 1 and plan.statistics > 0
    shapes = [jax.ShapeDtypeStruct((4, 16), jnp.float32)]
    assert qjax.plan(fn, PAIR, policy, shapes, rates=RATES).passes == told(policy, fn, PAIR, shapes) == 0
    act = qjax.static(qjax.int8(), observer=qjax.entropy())
    policy = Policy([Rule("*", weight=qjax.int8(), activation=act)])
    plan = qjax.plan(fn, PAIR, policy, data, rates=RATES)
    state = sum(x.nbytes for x in jax.tree.leaves(act.observer.init(1, 16)))
    assert plan.passes == told(policy, fn, PAIR, data) == 1 and plan.statistics == 2 * (state + 4)


def test_products_are_in_the_plan():
    def squared(p, x):
        y = x @ p
        with jax.named_scope("square"):
            return y @ y.T

    (name,) = (product.name for product in qjax.trace(squared, PAIR["a"], normal(4, 16)).products)
    policy = Policy([Rule("*", weight=qjax.int8()), Rule(name, activation=qjax.static(qjax.int8()))])
    data = [normal(4, 16)]
    plan = qjax.plan(squared, PAIR["a"], policy, data, rates=RATES)
    assert plan.passes == told(policy, squared, PAIR["a"], data) == 1 and plan.statistics > 0
    result = qjax.quantize(squared, PAIR["a"], policy, data)
    keys = ("path", "what", "activation", "nbytes")
    assert [[getattr(r, k) for k in keys] for r in plan.report.rows] == [[getattr(r, k) for k in keys] for r in result.report.rows]
    missing = Policy([Rule("*", weight=qjax.int8()), Rule("nothing:*", activation=qjax.static(qjax.int8()))])
    with pytest.raises(ValueError, match=r"'nothing:\*'"):
        qjax.plan(squared, PAIR["a"], missing, data, rates=RATES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_program_has_a_price(case):
    plan = qjax.plan(case.fn, case.params, Policy([Rule("*", weight=qjax.int4(), method=qjax.gptq())]), [case.inputs], rates=RATES)
    assert plan.seconds > 0 and plan.rows > 0


def test_the_rates_are_measured_where_they_are_not_given():
    plan = qjax.plan(lambda p, x: x @ p, normal(4, 4), Policy([Rule("*", weight=qjax.int4())]), [jnp.ones((2, 4))])
    assert plan.rates.products > 1e7 and plan.rates.steps > 1e4


def test_a_pruned_weight_is_priced_with_its_passes():
    fn, x = (lambda p, x: x @ p["w"]), [normal(4, 16)]
    dense, method = {"w": normal(16, 8)}, qjax.gptq(mse=False)
    pruned = {"w": dense["w"].at[::2, ::2].set(0).at[1::2, 1::2].set(0)}

    def work(params, method):
        policy = qjax.Policy([qjax.Rule("*", weight=qjax.int4(), method=method)])
        return qjax.plan(fn, params, policy, x, rates=RATES).work.products

    shapes = jax.eval_shape(lambda: pruned)
    assert work(shapes, method) == work(dense, method) < work(pruned, method) == work(dense, qjax.gptq(mse=False, refine=2))
    assert work(pruned, method) - work(dense, method) == 2 * 2 * 8 * 16**2


def test_the_plan_names_rules_of_caches():
    policy = qjax.Policy([qjax.Rule("*", weight=qjax.int8()), qjax.Rule("2/*", cache=qjax.kv_cache(qjax.int8(), window=4))])
    note = 'rule \'2/*\' (kv_cache(int8(), per="token", window=4)) names caches, which are no parameters: pack them'
    notes = qjax.plan(lambda p, x: x @ p, normal(8, 4), policy, [normal(2, 8)], rates=RATES).report.notes
    assert any(text.startswith(note) for text in notes)
    assert qjax.quantize(lambda p, x: x @ p, normal(8, 4), policy, [normal(2, 8)]).report.notes == notes
