"""What a module trains on, in every family: what its report says, and what its program holds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import qjax
from qjax import Policy, Rule
from tests.families.families import DEFINITIONS, NAMES, family
from tests.families.linen_models import made
from tests.families.test_programs import INTEGER, operations
from tests.program.cases import normal

INT8 = Policy([Rule("*", weight=qjax.int8(), activation=qjax.dynamic(qjax.int8()))])
ORDINARY = ("decoder, linen", "residual, nnx", "scanned, nnx")


def module_of(name, forward):
    """The trainable module of a family, its report, and its program as a function of what it trains."""
    which, _, kind = name.partition(", ")
    module, make, _ = DEFINITIONS[which]
    inputs = family(name).data[0]
    if kind == "linen":
        variables = made(module, *inputs)[1]
        model = qjax.linen.fake_quant(module, INT8, forward=forward)
        return qjax.linen.report(model, variables, *inputs), jax.jit(model.apply).lower(variables, *inputs)
    model = qjax.nnx.fake_quant(make(rngs=nnx.Rngs(0)), INT8, forward=forward)
    model.eval()
    run = jax.jit(lambda state, *inputs: nnx.merge(nnx.graphdef(model), state)(*inputs))
    return qjax.nnx.report(model, *inputs), run.lower(nnx.state(model), *inputs)


def rounded(report):
    """The rows of what is rounded; an NNX state holds statistics among its parameters, and the split of a module does not."""
    return {row.path: row for row in report.rows if row.spec}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ORDINARY else pytest.mark.slow) for n in NAMES])
def test_the_report_of_a_module_is_that_of_its_function_and_of_its_program(name):
    own = family(name)
    for forward in ("integer", "float"):
        report, lowered = module_of(name, forward)
        want = qjax.fake_quant(own.fn, INT8, forward).report(own.params, *own.data[0])
        assert rounded(report) == rounded(want) and report.notes == want.notes
        on_integers = {row.path: row.kernel.split(", ").count("xla int8") for row in report.rows}
        lines = operations(lowered.as_text())
        assert (sum(map(bool, map(INTEGER.search, lines))) > 0) == any(on_integers.values()) == (forward == "integer")


X = normal(4, 8)
BOTH = Policy([Rule("a*", weight=qjax.int8(), activation=qjax.static(qjax.int8()), train=qjax.lsq("extremes")),
               Rule("b*", weight=qjax.int4(group_size=2), activation=qjax.dynamic(qjax.int8()))])  # fmt: skip


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(8, name="a")(x))
        return nn.Dense(4, name="b")(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.b(self.norm(self.a(x)))


def kernels(report):
    return {path: row.kernel for path, row in rounded(report).items()}


def test_reports_need_no_state_no_numbers_and_no_training_mode():
    want, shape = {"a/kernel": "xla int8", "b/kernel": "xla"}, jax.ShapeDtypeStruct(X.shape, X.dtype)
    model = qjax.linen.fake_quant(Linen(), BOTH, forward="integer")
    plain = model.init(jax.random.key(0), X)
    begun = qjax.linen.begin(model, jax.random.key(0), plain, X)
    for variables in (plain, begun, jax.eval_shape(lambda: begun)):
        report = qjax.linen.report(model, variables, shape)
        assert kernels(report) == want and "share scales" in next(row for row in report.rows if row.path == "b/kernel").notes[-1]
    assert jnp.isfinite(model.apply(begun, X)).all()
    fq = qjax.nnx.fake_quant(NNX(nnx.Rngs(0)), BOTH, forward="integer")
    fq.eval()
    before = nnx.state(fq)
    for module in (fq, qjax.nnx.begin(fq, jax.random.key(0), X), nnx.eval_shape(lambda: fq)):
        assert kernels(qjax.nnx.report(module, shape)) == want
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, nnx.state(fq)))


def test_a_part_that_is_named_as_the_state_is_stays():
    """Where the policy has no state there is nothing to take out of the module."""

    class Named(nnx.Module):
        def __init__(self, rngs):
            self.quant = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.quant(x)

    model = Named(nnx.Rngs(0))
    fq = qjax.nnx.fake_quant(model, INT8, forward="integer")
    assert kernels(qjax.nnx.report(fq, X)) == {"quant/kernel": "xla int8"}
    packed = qjax.nnx.convert(fq, X).params
    assert jnp.allclose(qjax.quantized(qjax.nnx.function(model))(packed, X), fq(X), rtol=1e-4, atol=1e-5)


def test_what_is_no_trainable_module_has_no_report():
    model, module = qjax.linen.fake_quant(Linen(), BOTH), qjax.nnx.fake_quant(NNX(nnx.Rngs(0)), BOTH)
    variables = Linen().init(jax.random.key(0), X)
    cases = [
        (lambda: qjax.linen.report(Linen(), variables, X), r"`model` of qjax.linen.report .* the order is \(model, variables, \*args\)"),
        (lambda: qjax.linen.report(model, X), "`variables` must be those of the module, .* got ArrayImpl"),
        (lambda: qjax.linen.report(model, variables), "`args` are not those of the function: missing a required argument: 'x'"),
        (lambda: qjax.linen.report(model, variables, X, train=True), "qjax.linen.report runs the module in evaluation"),
        (lambda: qjax.linen.fake_quant(Linen(), BOTH, forward="int8"), "`forward` must be one of 'float', 'integer', None, got 'int8'"),
        (lambda: qjax.nnx.report(NNX(nnx.Rngs(0)), X), r"`model` of qjax.nnx.report .* call it as report\(model, \*args\)"),
        (lambda: qjax.nnx.report(module), "`args` are not those of the function: missing a required argument: 'x'"),
        (lambda: qjax.nnx.fake_quant(NNX(nnx.Rngs(0)), BOTH, forward="int8"), "`forward` must be one of 'float', 'integer', None"),
    ]
    for call, says in cases:
        with pytest.raises((TypeError, ValueError), match=says):
            call()


def test_a_module_of_floats_that_asks_for_integers_is_refused():
    """As a function is."""
    floats = Policy([Rule("b*", weight=qjax.int4(group_size=2), activation=qjax.dynamic(qjax.int8()))])
    model = qjax.linen.fake_quant(Linen(), floats, forward="integer")
    module = qjax.nnx.fake_quant(NNX(nnx.Rngs(0)), floats, forward="integer")
    for call in (lambda: model.apply(model.init(jax.random.key(0), X), X), lambda: module(X)):
        with pytest.raises(ValueError, match="`forward`='integer' and no product of this policy runs on integers"):
            call()
