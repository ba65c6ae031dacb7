"""What a schedule freezes stands still, to the bit, whatever optimizers add; before, it moves."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
from qjax import Policy, Rule
from tests.parameters import every_other
from tests.program.cases import normal
from tests.training.test_state import STACK, X, scanned

STEPS, FREEZE = 7, 4
PLAN = qjax.schedule(freeze=FREEZE)
STATIC, UNSIGNED = qjax.static(qjax.int8()), qjax.static(qjax.uint8())
PARAMS = {"w": STACK}
OPTIMIZERS = {"adam": optax.adam(1e-2), "decay": optax.adamw(1e-2, weight_decay=0.5), "momentum": optax.sgd(1e-4, momentum=0.9)}


def fake(train, weight=qjax.int4(), act=STATIC, product=None):  # noqa: B008  # frozen
    rules = [] if product is None else [Rule("*scores*:*", activation=product, train=train)]
    return qjax.fake_quant(scanned, Policy([*rules, Rule("*", weight=weight, activation=act, train=train)]))


def learned(quant):
    """What an optimizer trains of a state, as NumPy has it."""
    marks = jax.tree.leaves(qjax.training.state.labels(quant))
    return [np.asarray(a) for a, mark in zip(jax.tree.leaves(quant), marks, strict=True) if mark == "learned"]


def optimizer_of(fq, quant, optimizer):
    return optax.multi_transform({"weights": optax.adam(1e-3), "learned": optimizer, "fixed": optax.set_to_zero()},
                                 ({"w": "weights"}, fq.labels(quant)))  # fmt: skip


def trained(fq, optimizer, quant, params=PARAMS, more=lambda quant: 0.0):
    """What is learned at the begin of each step, what moved it then, and the last parameters and state, without an advance."""
    tx = optimizer_of(fq, quant, optimizer)
    wanted = scanned(PARAMS, X) + 0.3

    @jax.jit
    def step(both, state):
        loss = lambda both: jnp.sum((fq(both[0], X, quant=both[1]) - wanted) ** 2) + more(both[1])  # noqa: E731
        by = jax.grad(loss)(both)
        updates, state = tx.update(by, state, both)
        return optax.apply_updates(both, updates), state, by[1]

    both, state, seen, slopes = (params, quant), tx.init((params, quant)), [], []
    for i in range(STEPS):
        if i:
            both = both[0], fq.advance(both[1])
        seen.append(both[1])
        both, state, by = step(both, state)
        slopes.append(by)
    assert step._cache_size() == 1
    return seen, slopes, both


CASES = {
    "lsq": (fake(qjax.qat(qjax.lsq(), qjax.lsq(), schedule=PLAN), product=STATIC), "adam"),
    "lsq that decays": (fake(qjax.qat(qjax.lsq(), qjax.lsq(), schedule=PLAN)), "decay"),
    "lsq+": (fake(qjax.qat(qjax.lsq(), qjax.lsq(), schedule=PLAN), qjax.uint4(), UNSIGNED, UNSIGNED), "momentum"),
    "pact": (fake(qjax.qat(qjax.lsq(), qjax.pact(), schedule=PLAN), act=UNSIGNED), "decay"),
    "pact alone": (fake(qjax.qat(qjax.ste(), qjax.pact(), schedule=PLAN), act=UNSIGNED), "adam"),
    "adaround": (fake(qjax.qat(qjax.adaround(), qjax.ste(), schedule=PLAN)), "adam"),
}


@pytest.mark.parametrize("name", every_other(CASES))
def test_what_is_frozen_stands_still_to_the_bit_and_moves_before(name):
    fq, optimizer = CASES[name]
    more = lambda quant: 0.02 * qjax.training.rounding_penalty(quant, FREEZE) if name == "adaround" else 0.0  # noqa: E731
    seen, slopes, (params, moved) = trained(fq, OPTIMIZERS[optimizer], fq.init(jax.random.key(0), PARAMS, X), more=more)
    numbers = [learned(quant) for quant in seen]
    assert len(numbers[0]) > 0
    for before, after in itertools.pairwise(numbers[: FREEZE + 1]):  # by the updates of steps 0 to FREEZE - 1
        assert any((a != b).any() for a, b in zip(before, after, strict=True))
    for quant in numbers[FREEZE + 1 :]:
        chex.assert_trees_all_equal(quant, numbers[FREEZE])
    assert all(any(g.any() for g in learned(by)) == (i < FREEZE) for i, by in enumerate(slopes))
    assert not any(g.any() for by in slopes for g in jax.tree.leaves(by["held"]))

    # The update of the last step moved them: neither the function nor what is packed has them so, and the two agree.
    assert any((a != b).any() for a, b in zip(learned(moved), numbers[-1], strict=True))
    advanced = fq.advance(moved)
    chex.assert_trees_all_equal(learned(advanced), numbers[FREEZE])
    run = jax.jit(lambda p, q: (fq(p, X, quant=q), fq.leaves(p, X, quant=q)(p)))
    chex.assert_trees_all_equal(run(params, moved), run(params, {**advanced, "step": moved["step"]}))
    result, same = (qjax.convert(fq, params, X, quant=quant) for quant in (moved, advanced))
    chex.assert_trees_all_equal((result.params, result.sites), (same.params, same.sites))
    np.testing.assert_array_equal(result.params["w"].dequantize(), run(params, moved)[1]["w"])
    packed = jax.jit(qjax.quantized(scanned, sites=result.sites))(result.params, X)
    np.testing.assert_allclose(packed, run(params, moved)[0], rtol=1e-3, atol=1e-3)


def test_labels_and_the_step_of_each_rule():
    early = qjax.qat(qjax.lsq(), qjax.ste(), schedule=qjax.schedule(freeze=0))
    fn = lambda p, x: x @ p["from"] @ p["late"] @ p["never"]  # noqa: E731  # a path may be named as an entry is
    rules = [Rule("from", weight=qjax.int4(), train=early), Rule("late", weight=qjax.uint4(), train=qjax.qat(qjax.lsq(), schedule=PLAN)),
             Rule("never", weight=qjax.int4(), train=qjax.lsq())]  # fmt: skip
    fq = qjax.fake_quant(fn, Policy(rules))
    params = {name: normal(8, 8, seed=i) / 3 for i, name in enumerate(("from", "late", "never"))}
    quant = fq.init(jax.random.key(0), params, X)
    assert set(jax.tree.leaves(fq.labels(quant)["held"])) == {"fixed"}
    assert jax.tree.map(jnp.shape, quant["held"]["weights"]) == {
        "from": {"scale": (8, 1), "from": ()}, "late": {"scale": (8, 1), "offset": (8, 1), "from": ()}}  # fmt: skip
    moved = {**quant, "weights": jax.tree.map(lambda a: a * 1.5, quant["weights"])}
    same = lambda a, b, path: bool((a["weights"][path]["scale"] == b["weights"][path]["scale"]).all())  # noqa: E731
    by = jax.grad(lambda q: fq(params, X, quant=q).sum())(moved)["weights"]
    assert not by["from"]["scale"].any() and by["late"]["scale"].any() and by["never"]["scale"].any()
    after = fq.advance(moved)
    assert same(after, quant, "from") and same(after, moved, "late") and same(after, moved, "never")
    later = fq.advance({**moved, "step": jnp.float32(FREEZE)})
    assert same(later, quant, "late") and same(later, moved, "never")  # nothing was recorded on the way: what `init` found


@pytest.mark.slow
def test_seeds_freeze_together_and_at_steps_of_their_own():
    fq = fake(qjax.qat(qjax.lsq(), qjax.lsq(), schedule=PLAN), product=STATIC)
    quant = fq.init(jax.random.key(0), PARAMS, X)
    moved = {**quant, **{kind: jax.tree.map(lambda a: a * 1.25, quant[kind]) for kind in ("weights", "activations", "products")}}
    steps = jnp.float32([0, FREEZE - 1, FREEZE, FREEZE + 1])
    many = {**jax.tree.map(lambda a: jnp.stack([a] * 4), moved), "step": steps}
    for advance in (fq.advance, jax.vmap(fq.advance), jax.jit(fq.advance)):
        after = advance(many)
        np.testing.assert_array_equal(after["step"], steps + 1)
        for seed, kept in enumerate((moved, moved, quant, quant)):
            for kind in ("weights", "activations", "products"):
                chex.assert_trees_all_equal(jax.tree.map(lambda a, i=seed: a[i], after[kind]), kept[kind])
    outs = jax.jit(jax.vmap(lambda q: fq(PARAMS, X, quant=q)))(many)
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-6)
    np.testing.assert_allclose(outs[2], jax.jit(functools.partial(fq, PARAMS, X))(quant=quant), rtol=1e-4, atol=1e-4)
    assert not np.allclose(outs[1], outs[2], rtol=1e-3)


def test_new_data_set_frozen_ranges_anew():
    fq = fake(qjax.qat(qjax.lsq(), qjax.lsq("extremes"), schedule=PLAN), product=STATIC)
    quant = {**fq.init(jax.random.key(0), PARAMS, X), "step": jnp.float32(FREEZE + 2)}
    wide = fq.calibrate(quant, PARAMS, [3 * X])
    assert not np.array_equal(wide["activations"]["w"]["scale"], quant["activations"]["w"]["scale"])
    after = fq.advance(wide)
    chex.assert_trees_all_equal([after[k] for k in ("activations", "products")], [wide[k] for k in ("activations", "products")])
    chex.assert_trees_all_equal(after["held"]["weights"], quant["held"]["weights"])


def test_new_data_leave_what_is_frozen_of_weights_and_are_seen_through_it():
    """Weights that an update moved after the freeze are neither held so by `calibrate`, nor do activations pass through them."""

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    train = qjax.qat(qjax.lsq("extremes"), qjax.lsq("extremes"), schedule=PLAN)
    fq = qjax.fake_quant(fn, Policy([Rule("*", weight=qjax.int2(), activation=STATIC, train=train)]))
    params = {"a": normal(8, 6) / 3, "b": normal(6, 4, seed=1) / 3}
    quant = {**fq.init(jax.random.key(0), params, X), "step": jnp.float32(FREEZE + 2)}
    moved = {**quant, "weights": jax.tree.map(lambda a: 3 * a, quant["weights"])}
    still, after = fq.calibrate(quant, params, [2 * X]), fq.calibrate(moved, params, [2 * X])
    chex.assert_trees_all_equal(after["held"]["weights"], quant["held"]["weights"])
    chex.assert_trees_all_equal([after[k] for k in ("activations", "held")], [still[k] for k in ("activations", "held")])
    chex.assert_trees_all_equal(after["held"]["activations"]["b"]["scale"], after["activations"]["b"]["scale"])
    chex.assert_trees_all_equal(after["weights"], moved["weights"])  # as they were: the next advance undoes the update
    early = fq.calibrate({**moved, "step": jnp.float32(0)}, params, [2 * X])  # before, what is learned counts
    assert not np.array_equal(early["activations"]["b"]["scale"], still["activations"]["b"]["scale"])


def test_modules_hold_what_is_frozen():
    rule = Rule("kernel", weight=qjax.int4(), train=qjax.qat(qjax.lsq(), schedule=qjax.schedule(freeze=1)))
    model, tx = qjax.linen.fake_quant(nn.Dense(4), Policy([rule])), OPTIMIZERS["decay"]
    variables = qjax.linen.begin(model, jax.random.key(0), model.init(jax.random.key(1), X), X)
    opt = optax.multi_transform({"weights": tx, "learned": tx, "fixed": optax.set_to_zero()}, qjax.linen.labels(variables))
    state, scales = opt.init(variables), []
    module = qjax.nnx.begin(qjax.nnx.fake_quant(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), Policy([rule])), jax.random.key(0), X)
    trains = nnx.Any(nnx.Param, qjax.nnx.Learned)
    optimizer = nnx.Optimizer(module, tx, wrt=trains)
    for _ in range(4):
        scales.append((variables["quant"]["state"]["weights"]["kernel"]["scale"], module.quant.weights.kernel.scale[...]))
        by = jax.grad(lambda v: jnp.sum(model.apply(v, X) ** 2))(variables)
        updates, state = opt.update(by, state, variables)
        variables = qjax.linen.advance(optax.apply_updates(variables, updates))
        optimizer.update(module, nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=nnx.DiffState(0, trains))(module))
        qjax.nnx.advance(module)
    for start, frozen, *rest in zip(*scales, strict=True):
        assert (start != frozen).any()
        chex.assert_trees_all_equal(rest, [frozen] * 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": qjax.int4(), "activation": qjax.dynamic(qjax.int8())},
        {"weight": qjax.int4(), "train": qjax.qat(qjax.ste(), qjax.lsq(), schedule=PLAN)},
        {"weight": qjax.int4(), "activation": STATIC},
        {"weight": qjax.uint2(zero_dtype="float32"), "train": qjax.qat(qjax.dorefa(), schedule=PLAN)},
        {"weight": qjax.int4(), "activation": UNSIGNED, "train": qjax.qat(qjax.ste(), qjax.pact(1.0, learns=False), schedule=PLAN)},
    ],
    ids=str,
)
def test_a_freeze_of_nothing_is_refused(settings):
    with pytest.raises(ValueError, match=r"`freeze`=4 of the schedule has nothing to hold, .*: leave `freeze` out, or train with"):
        Rule("*", **{"train": qjax.qat(schedule=PLAN), **settings})
    with pytest.raises(ValueError, match="has nothing to hold"):
        Rule("*scores:*", activation=qjax.dynamic(qjax.int8()), train=qjax.qat(qjax.lsq(), qjax.lsq(), schedule=PLAN))


@pytest.mark.parametrize("how", ["function", "linen", "nnx"])
def test_a_state_that_freezes_can_be_donated_step_after_step(how):
    train = qjax.qat(qjax.lsq(), schedule=qjax.schedule(freeze=2))
    policy = qjax.Policy([qjax.Rule("*kernel", weight=qjax.int4(), train=train)])
    key, x = jax.random.key(0), jnp.ones((2, 6))
    if how == "nnx":
        model = qjax.nnx.begin(qjax.nnx.fake_quant(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), policy), key, x)
        graphdef, state = nnx.split(model)

        def step(state):
            model = nnx.merge(graphdef, state)
            qjax.nnx.advance(model)
            return nnx.split(model)[1]

    elif how == "linen":
        module = nn.Dense(3)
        model, variables = qjax.linen.fake_quant(module, policy), module.init(key, x)
        state, step = qjax.linen.begin(model, key, variables, x), qjax.linen.advance
    else:
        fq = qjax.fake_quant(lambda p, x: x @ p["kernel"], policy)
        state, step = fq.init(key, {"kernel": jnp.ones((6, 3))}, x), fq.advance
    for _ in range(3):
        state = step(state)  # outside of jit, too, copies are arrays of their own
        state = jax.jit(step, donate_argnums=0)(state)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))


def test_nnx_variables_keep_what_else_they_hold():
    train = qjax.qat(qjax.lsq(), schedule=qjax.schedule(freeze=2))
    fq = qjax.nnx.fake_quant(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), qjax.Policy([qjax.Rule("*kernel", weight=qjax.int4(), train=train)]))
    fq = qjax.nnx.begin(fq, jax.random.key(0), jnp.ones((2, 6)))
    fq.quant.weights.kernel.scale.set_metadata(out_sharding=("a",))
    qjax.nnx.advance(fq)
    assert fq.quant.step[...] == 1 and fq.quant.weights.kernel.scale.out_sharding == ("a",)


def test_what_was_learned_goes_on_under_a_longer_schedule():
    def of(freeze):
        train = qjax.qat(qjax.lsq(), schedule=qjax.schedule(freeze=freeze))
        return qjax.fake_quant(lambda p, x: x @ p["kernel"], qjax.Policy([qjax.Rule("*", weight=qjax.int4(), train=train)]))

    params, x, key = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)}, jnp.eye(6), jax.random.key(0)
    quant = of(10).init(key, params, x)
    for _ in range(12):
        moved = quant["weights"]["kernel"]["scale"] * 1.1
        quant = of(10).advance({**quant, "weights": {"kernel": {"scale": moved}}})
    with pytest.raises(ValueError, match=r"of another policy.*fq\.carried\(quant, fq\.init"):
        of(20)(params, x, quant=quant)
    longer = of(20).carried(quant, of(20).init(jax.random.key(1), params, x))
    np.testing.assert_array_equal(longer["weights"]["kernel"]["scale"], quant["weights"]["kernel"]["scale"])
    np.testing.assert_array_equal(of(20)(params, x, quant=longer), of(10)(params, x, quant=quant))
    late = {**longer, "step": jnp.float32(30)}  # what is held is what was carried
    packed = qjax.convert(of(20), params, x, quant=late).params["kernel"]
    np.testing.assert_array_equal(packed.dequantize(), of(20)(params, x, quant=late))
    with pytest.raises(ValueError, match="no number of the same name and shape"):
        of(20).carried({"policy": {"x0": jnp.float32(0)}, "weights": {"other": {"scale": jnp.ones((3, 1))}}}, longer)
