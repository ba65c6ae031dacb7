"""A state knows of which policy it is: whatever changes of it is found, in every transformation, and nothing else is."""

import dataclasses
import functools
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import Policy, Rule
from qjax.core import IntSpec
from qjax.training.fingerprint import described
from tests.program.cases import normal
from tests.runtime.test_cache import CAPACITY, WIDTH, attend, rows

STATIC, DYNAMIC = qjax.static(qjax.int8()), qjax.dynamic(qjax.int8())
PARAMS = {"a": normal(8, 8) / 3, "b": normal(8, 4, seed=1) / 3}
X = normal(5, 8, seed=2)
OTHER = r"`quant` is of another policy: .* cannot change between steps: call init again; .*fq\.carried\(.*fq\.from_packed"


def fn(p, x):
    with jax.named_scope("scores"):
        s = jnp.einsum("bd,cd->bc", x, x)
    return jax.nn.relu(s @ x @ p["a"]) @ p["b"]


def fake(*rules, folds=None):
    return qjax.fake_quant(fn, Policy(rules), "float", folds)


def train(**kwargs):
    return qjax.qat(qjax.lsq(), qjax.lsq(), **kwargs)


def rules(weight=IntSpec(4), act=STATIC, how=None, product=DYNAMIC, rotated=False):  # noqa: B008  # frozen
    method = qjax.online_rotation() if rotated else None
    return Rule("*scores:*", activation=product, method=method), Rule("*", weight=weight, activation=act, train=how or train())


MOVED = qjax.schedule(weights=2, bits=((0, 8), (4, 4)))
CHANGES = {
    "the rule of scales": rules(IntSpec(4, scale_rule="full")),
    "bits": rules(qjax.int3()),
    "a sign": rules(IntSpec(4, signed=False, symmetric=True)),
    "the dtype of scales": rules(qjax.int4(scale_dtype="bfloat16")),
    "bits of activations": rules(act=qjax.static(qjax.int4())),
    "what observes them": rules(act=qjax.static(qjax.int8(), observer=qjax.percentile(99.0))),
    "a number of the observer": rules(act=qjax.static(qjax.int8(), observer=qjax.percentile(99.9))),
    "where scales begin": rules(how=qjax.qat(qjax.lsq("mse"), qjax.lsq())),
    "the product": rules(product=qjax.dynamic(qjax.int4())),
    "a rotation of the product": rules(rotated=True),
    "an operand of it": rules(product=(DYNAMIC, qjax.dynamic(qjax.int4()))),
}
STEPPED = {
    "a step": rules(how=train(schedule=dataclasses.replace(MOVED, weights=3))),
    "the step of bits": rules(how=train(schedule=dataclasses.replace(MOVED, bits=((0, 8), (5, 4))))),
    "rounded gradients": rules(how=train(schedule=MOVED, gradient=DYNAMIC)),
}


@functools.cache
def begun(*given):
    fq = fake(*given)
    return fq, fq.init(jax.random.key(0), PARAMS, X)


@pytest.mark.parametrize("name", CHANGES | STEPPED)
def test_what_changes_of_a_policy_is_found_though_no_shape_does(name):
    _, quant = begun(*(rules() if name in CHANGES else rules(how=train(schedule=MOVED))))
    other, own = begun(*(CHANGES | STEPPED)[name])
    assert jax.tree.map(jnp.shape, {**quant, "policy": 0}) == jax.tree.map(jnp.shape, {**own, "policy": 0})
    for call in (lambda: other(PARAMS, X, quant=quant), lambda: jax.jit(lambda q: other(PARAMS, X, quant=q))(quant),
                 lambda: jax.vmap(lambda q: other(PARAMS, X, quant=q))(jax.tree.map(lambda a: jnp.stack([a, a]), quant)),
                 lambda: other.calibrate(quant, PARAMS, [X]), lambda: other.leaves(PARAMS, X, quant=quant),
                 lambda: qjax.convert(other, PARAMS, X, quant=quant)):  # fmt: skip
        with pytest.raises(ValueError, match=OTHER):
            call()


def test_rules_that_change_places_between_weights_of_one_shape_are_another_policy():
    """The same specs, the same shapes, each for the other weight."""
    params, one, two = {"a": normal(8, 8), "b": normal(8, 8)}, qjax.int4(), qjax.int4(scale_rule="full")
    states, fqs = [], []
    for a, b in ((one, two), (two, one)):
        rules = [Rule(path, weight=spec, train=qjax.lsq()) for path, spec in (("a", a), ("b", b))]
        fqs.append(qjax.fake_quant(lambda p, x: x @ p["a"] @ p["b"], Policy(rules)))
        states.append(fqs[-1].init(jax.random.key(0), params, X))
    for fq, quant in zip(fqs, states[::-1], strict=True):
        with pytest.raises(ValueError, match=OTHER):
            fq(params, X, quant=quant)
    turned = qjax.fake_quant(fqs[0].fn, Policy(fqs[0].policy.rules[::-1]))  # the order of rules that name different weights is none
    assert turned(params, X, quant=states[0]).shape == (5, 8)


def test_what_means_the_same_is_the_same_policy():
    fq, quant = begun(*rules())
    product, weight = rules()
    same = fake(product, Rule("a", **{f: getattr(weight, f) for f in ("weight", "activation", "train")}), dataclasses.replace(weight))
    np.testing.assert_array_equal(same(PARAMS, X, quant=quant), fq(PARAMS, X, quant=quant))
    assert quant["policy"].keys() == same.init(jax.random.key(1), PARAMS, 2 * X)["policy"].keys()
    method = fake(product, dataclasses.replace(weight, method=qjax.gptq()))  # chooses codes after training
    method(PARAMS, X, quant=quant)


def test_the_entry_goes_where_the_state_goes():
    fq, quant = begun(*rules(how=train(schedule=MOVED)))
    (name,) = quant["policy"]
    assert name[0] == "x" and int(name[1:], 16) >= 0 and len(name) == 9
    assert fq.labels(quant)["policy"] == {name: "fixed"}
    by_quant = jax.grad(lambda q: fq(PARAMS, X, quant=q).sum())(quant)
    assert by_quant["policy"] == {name: 0}
    many = jax.vmap(lambda key: fq.init(key, PARAMS, X))(jax.random.split(jax.random.key(0), 3))
    assert many["policy"][name].shape == (3,)
    assert jax.vmap(lambda q: fq(PARAMS, X, quant=q))(many).shape == (3, 5, 4)
    for after in (fq.advance(quant), fq.calibrate(quant, PARAMS, [X]), jax.tree.map(lambda a: a + 0, quant)):
        assert after["policy"].keys() == {name}
    moving = fake(Rule("*", weight=qjax.int4(), activation=STATIC, train=qjax.moving_range(0.5)))
    start = moving.init(jax.random.key(0), PARAMS, X)
    assert moving.tracked(PARAMS, X, quant=start)[1]["policy"] == start["policy"] != {name: 0}
    assert fake(Rule("*", weight=qjax.int4())).init(jax.random.key(0), PARAMS, X) == {}


def test_a_state_without_the_entry_or_for_a_policy_without_state_is_refused():
    fq, quant = begun(*rules())
    with pytest.raises(ValueError, match=r"`quant` must be what `init` gave .* call init again"):
        fq(PARAMS, X, quant={k: v for k, v in quant.items() if k != "policy"})
    with pytest.raises(ValueError, match=OTHER):
        fake(Rule("*", weight=qjax.int4()))(PARAMS, X, quant=quant)


def test_caches_count_whether_the_program_takes_one_or_not():
    def read(w, x, cache=None, at=None):
        return x @ w if cache is None else attend(w, x, cache, at)

    weight = Rule("*", weight=qjax.int4(), train=qjax.lsq())
    build = lambda *more: qjax.fake_quant(read, Policy([*more, weight]))  # noqa: E731
    x, w, cache = rows(3), rows(WIDTH, 1) / 4, jnp.zeros((CAPACITY, WIDTH))
    fq = build(Rule("2", cache=qjax.kv_cache(qjax.int8(), window=2)))
    quant = fq.init(jax.random.key(0), w, x)
    assert fq(w, x, quant=quant).shape == (3, WIDTH) and fq(w, x, cache, jnp.int32(0), quant=quant)[1].shape == cache.shape
    for other in (build(), build(Rule("2", cache=qjax.kv_cache(qjax.int8(), window=3)))):
        with pytest.raises(ValueError, match=OTHER):
            other(w, x, quant=quant)


def test_modules_keep_and_check_it():
    built = lambda spec: Policy([Rule("kernel", weight=spec, train=qjax.lsq())])  # noqa: E731
    model, other = (qjax.linen.fake_quant(nn.Dense(4), built(spec)) for spec in (qjax.int4(), qjax.int3()))
    variables = qjax.linen.begin(model, jax.random.key(0), model.init(jax.random.key(1), X), X)
    assert set(qjax.linen.labels(variables)["quant"]["state"]["policy"].values()) == {"fixed"}
    assert qjax.linen.advance(variables)["quant"]["state"]["policy"] == variables["quant"]["state"]["policy"]
    for call in (lambda: other.apply(variables, X), lambda: qjax.linen.convert(other, variables, X)):
        with pytest.raises(ValueError, match=OTHER):
            call()
    module = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    fq, theirs = (qjax.nnx.begin(qjax.nnx.fake_quant(module, built(spec)), jax.random.key(0), X) for spec in (qjax.int4(), qjax.int3()))
    assert not jax.tree.leaves(nnx.state(fq.quant.policy, qjax.nnx.Learned)) and fq(X).shape == (5, 4)
    fq.quant = theirs.quant
    for call in (lambda: fq(X), lambda: qjax.nnx.convert(fq, X)):
        with pytest.raises(ValueError, match=OTHER):
            call()


@dataclasses.dataclass(frozen=True)
class Box:
    held: object
    plain: int = 0


class Plain:
    def __init__(self, held):
        self.held = held


DISTINCT = [
    None, True, 1, 2, 1.5, "1", "a", np.float32(2.5), np.arange(3), np.arange(3.0), np.arange(4).reshape(2, 2), np.arange(4), (1, 2),
    (2, 1), {"a": 1}, {"b": 1}, frozenset({"a"}), Box(1), Box(2), Box(Box(1)), Box(1, plain=1), Plain(1),
    Plain(np.arange(2)), Plain(np.arange(3)), functools.partial(normal, 3), functools.partial(normal, 4), functools.partial(normal, seed=4),
    jnp.tanh, np.tanh, normal, rules,
    lambda x: x + 1, lambda x: x + 2, lambda x, y=2: x, lambda x, y=3: x, np.dtype("int8"), jnp.float32, jnp.bfloat16,
]  # fmt: skip


def test_all_that_values_hold_is_told_apart():
    found = [repr(described(value)) for value in DISTINCT]
    assert len(set(found)) == len(found) and not any("0x7" in text or " at " in text for text in found)
    same = [(1, np.int64(1)), (0.5, np.float32(0.5)), (np.arange(3.0), jnp.arange(3.0).astype(float)), ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    for a, b in same[:2] + same[3:]:
        assert described(a) == described(b)
    make = lambda n: lambda x: x + n  # noqa: E731
    assert described(make(1)) == described(make(1)) != described(make(2))
    with pytest.raises(TypeError, match="`policy` holds a object, whose content cannot be told"):
        described(object())


def test_the_digits_are_the_same_in_every_process():
    """Sets and addresses differ between processes; the digits of a policy that was saved must not. Change them knowingly."""
    policy = (
        'qjax.Policy([qjax.Rule("*", weight=qjax.int4(group_size=4), activation=qjax.static(qjax.int8(), observer=qjax.percentile(99.0)), '
        "train=qjax.qat(qjax.lsq(), qjax.lsq(), schedule=qjax.schedule(weights=5)))])"
    )
    code = (
        f"import jax, jax.numpy as jnp, qjax; fq = qjax.fake_quant(lambda p, x: x @ p['w'], {policy}); "
        "print(*fq.init(jax.random.key(0), {'w': jnp.ones((8, 2))}, jnp.ones((3, 8)))['policy'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "xefa72642"



@pytest.mark.parametrize("how", [qjax.ste(rounding="stochastic"), qjax.qat(schedule=qjax.schedule(weights=5))], ids=["random", "schedule"])
@pytest.mark.parametrize("act", [None, DYNAMIC], ids=["weights", "activations"])
def test_programs_of_other_arguments_are_of_the_same_policy(how, act):
    """A head that only training has; an embedding whose tied head evaluation leaves out."""

    def model(p, ids, train):
        x = p["embed"][ids]
        y = x @ p["a"]
        return (y @ p["embed"].T, y @ p["b"]) if train else y

    params = PARAMS | {"embed": normal(8, 8, seed=3)}
    fq = qjax.fake_quant(model, Policy([Rule("*", weight=qjax.int4(), activation=act, train=how)]), "float")
    quant = fq.init(jax.random.key(0), params, jnp.arange(8), True)
    assert fq(params, jnp.arange(8), False, quant=quant).shape == (8, 8)
    learned = qjax.fake_quant(model, Policy([Rule("*", weight=qjax.int4(), train=qjax.lsq())]))
    with pytest.raises(ValueError, match=r"of this policy and of another program: it differs in \['weights'\]\['b'\]"):
        learned(params, jnp.arange(8), False, quant=learned.init(jax.random.key(0), params, jnp.arange(8), True))


def test_what_a_rule_has_no_use_for_is_no_other_policy():
    weight_only = [fake(Rule("*", weight=qjax.int4(), train=how)) for how in (qjax.lsq(), qjax.qat(qjax.lsq()))]
    names = [fq.init(jax.random.key(0), PARAMS, X)["policy"].keys() for fq in weight_only]
    assert names[0] == names[1]


def test_constants_of_functions_are_the_same_in_every_process():
    program = (
        "import sys; from qjax.training.fingerprint import described\n"
        "def f(x): return x in {'alpha', 'beta', 'gamma', 'delta'} or (1j, b'x', ...)\n"
        "def g(x): return g(x - 1) if x else f(x)\n"
        "print(described(f) if sys.version_info else 0, described(g))"
    )
    run = functools.partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = {run(env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("0", "1", "2")}
    assert len(found) == 1 and "alpha" in found.pop()


def test_keys_and_functions_that_call_themselves_have_a_content():
    def again(x):
        return again(x - 1) if x else 0

    assert described(again) == described(again)
    assert described(jax.random.key(3)) == described(jax.random.key(3)) != described(jax.random.key(4))
