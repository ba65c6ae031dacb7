"""Every method on every family, in Linen and in NNX, by the same lines: it runs, it is close, and the report has all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.families.families import NAMES, WEIGHTS, family
from tests.test_modules import dequantized

INT8, INT4 = qjax.int8(), qjax.int4()
# name -> (what a rule has, largest relative error of the result). Random weights have no redundancy to hide the rounding in, and at 4 bit
# some tokens go to other experts; unrelated results would be at 1.4. The tied embedding is rounded, too, and read twice.
METHODS = {
    "int8": ({"weight": INT8}, 0.05),
    "int4": ({"weight": qjax.int4(group_size=12, pad=True)}, 0.45),
    "dynamic": ({"weight": INT8, "activation": qjax.dynamic(INT8)}, 0.06),
    "static": ({"weight": INT8, "activation": qjax.static(INT8)}, 0.08),
    "awq": ({"weight": INT4, "method": qjax.awq()}, 0.45),
    "smoothquant": ({"weight": INT8, "activation": qjax.static(INT8), "method": qjax.smoothquant("search")}, 0.08),
    "gptq": ({"weight": INT4, "method": qjax.gptq()}, 0.45),
    "gptaq": ({"weight": INT4, "method": qjax.gptaq(group_aware=True, refine=1)}, 0.45),
}
ORDINARY = {
    ("int8", "encoder, linen"), ("dynamic", "decoder, nnx"), ("static", "residual, nnx"),
    ("gptq", "experts dispatched, nnx"),
}  # fmt: skip
# int8 and GPTQ on every family in both forms, the others on every family in one.
EVERYWHERE = ("int8", "gptq")
ALL = [
    (method, name) for i, method in enumerate(METHODS) for j, name in enumerate(NAMES)
    if (method in EVERYWHERE or (i + j + j // 2) % 2 == 0 or (method, name) in ORDINARY)
    and ("bf16" not in name or method in ("int8", "dynamic"))
]  # fmt: skip
CASES = [pytest.param(*case, marks=() if case in ORDINARY else pytest.mark.slow) for case in ALL]


def quantized_family(name, settings):
    model = family(name)
    return model, qjax.quantize(model.fn, model.params, qjax.Policy([qjax.Rule("*", **settings)]), calibration=model.data)


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def check_rows(report, settings):
    """Exactly the weights are quantized; nothing else could be, and each row says why."""
    for row in report.rows:
        assert bool(row.spec) == (row.path.split("/")[-1] in WEIGHTS), row.path
        assert row.spec or "it meets no data in a matmul, convolution or lookup, only" in row.reason, row
        if not row.spec:
            continue
        assert row.error is not None and 0 < row.error < 0.05 and row.nbytes < row.float_nbytes
        looked_up = set(row.ops) == {"gather"}
        assert bool(row.activation) == ("activation" in settings and not looked_up)
        assert row.kernel == ("xla" if not row.activation else "xla, xla int8" if "gather" in row.ops else "xla int8")


@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_method_on_a_family(method, name):
    settings, bound = METHODS[method]
    model, result = quantized_family(name, settings)
    check_rows(result.report, settings)
    assert not result.report.notes
    want = jax.jit(model.fn)(model.params, *model.data[1])
    got = jax.jit(qjax.quantized(model.fn))(result.params, *model.data[1])
    assert got.dtype == want.dtype
    assert 0 < distance(got, want) < bound
    if "activation" not in settings:
        # All that moved the result is in the codes: it is the one of the numbers that they stand for.
        assert distance(got, jax.jit(model.fn)(dequantized(result.params), *model.data[1])) < (2e-2 if "bf16" in name else 1e-5)


def test_after_a_relu_an_asymmetric_range_has_half_the_step():
    """The symmetric range keeps half its codes for numbers that never come: a quarter of the squared error without it."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.standard_normal((24, 44)), jnp.float32), "b": jnp.asarray(rng.standard_normal((44, 10)), jnp.float32)}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    x, errors = jnp.asarray(rng.standard_normal((200, 24)), jnp.float32), {}
    for spec in (INT8, qjax.uint8()):
        rules = [qjax.Rule("a", weight=None), qjax.Rule("b", weight=INT8, activation=qjax.static(spec))]
        result = qjax.quantize(fn, params, qjax.Policy(rules), calibration=[x])
        rounded = {**params, "b": result.params["b"].dequantize()}
        errors[str(spec)] = distance(jax.jit(qjax.quantized(fn))(result.params, x), fn(rounded, x)) ** 2
    symmetric, asymmetric = errors.values()
    assert asymmetric < 0.3 * symmetric


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual, linen", "residual, nnx"])
def test_asymmetric_ranges_are_better_in_a_network_of_relus(name):
    """By extreme values; where a range clips, as that of entropy does, the clipping hides the smaller step."""
    errors = []
    for spec in (INT8, qjax.uint8()):
        model, result = quantized_family(name, {"weight": INT8, "activation": qjax.static(spec)})
        run = jax.jit(qjax.quantized(model.fn))
        errors.append(distance(run(result.params, *model.data[1]), jax.jit(model.fn)(model.params, *model.data[1])))
    assert errors[1] < 0.9 * errors[0], errors
