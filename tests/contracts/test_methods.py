"""What every post-training method promises, whatever it minimises: one suite, all methods pass it."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibration import CrossMoments, Rows, divide_columns, hessian
from qjax.core import IntSpec, LearnedSpec, QTensor
from qjax.ptq.hqq import HQQ
from qjax.ptq.input_scale import quantize_scaled
from qjax.ptq.kmeans import KMeans
from qjax.ptq.low_rank import LowRank
from qjax.ptq.method import Problem, fills_zeros, needs_float
from qjax.ptq.online_rotation import Online

K, N = 48, 10
METHODS = [
    qjax.rtn(),
    qjax.rtn(mse=True),
    qjax.gptq(),
    qjax.gptq(mse=False),
    qjax.gptq(act_order=True, mse=False),
    qjax.gptq(act_order=True, static_groups=True),
    qjax.gptaq(1.0, group_aware=True, refine=1, mse=False),
    qjax.hqq(),
    qjax.kmeans(),
    qjax.kmeans(weighted=False),
    qjax.low_rank(4),
    qjax.loftq(2, iterations=2),
    qjax.low_rank(3, kind="lqer", then=qjax.gptq(mse=False), dtype="float32"),
    qjax.awq(),
    qjax.smoothquant(),
    qjax.smoothquant("search", then=qjax.gptq()),
    qjax.llm_int8(),
    qjax.online_rotation(qjax.gptq()),
    qjax.autoround(steps=50, lr=0.005),
]
SPECS = [qjax.int4(), qjax.int3(group_size=8), qjax.uint4(group_size=16), qjax.int4(group_size=32, pad=True), qjax.nf4(8)]
SPECS += [qjax.nf4(8, double_quant=True), qjax.nvfp4(), qjax.mxfp4(pad=True), qjax.fp8_e4m3()]
# Of these, with the methods that solve for codes or ranges, only what they become: one program a pair.
COARSE = [qjax.ternary(group_size=8), qjax.binary(group_size=8)]
MORE_SPECS = [*COARSE, qjax.mxint8(pad=True), qjax.fp8_e4m3(block=(5, 16)), qjax.int4(per="tensor")]
SOLVING = [qjax.rtn(mse=True), qjax.gptq(), qjax.gptq(act_order=True, static_groups=True), qjax.awq(), qjax.low_rank(4)]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
# The first two run in the ordinary test line, all of them in the gate.
every_spec = pytest.mark.parametrize("spec", [*SPECS[:2], *(pytest.param(s, marks=pytest.mark.slow) for s in SPECS[2:])], ids=str)


def paired(method, spec) -> bool:
    """True for every method with one of the first two specs: those pairs run in the ordinary test line, the others in the gate."""
    return spec in SPECS[:2] and (METHODS.index(method) + SPECS.index(spec)) % 2 == 0


def accepted(method, spec):
    """The spec, or what a method that does not take it has in its place."""
    if isinstance(method, HQQ) and not (isinstance(spec, IntSpec) and not spec.symmetric):
        return IntSpec(spec.bits, False, False, spec.granularity, pad=spec.pad, zero_dtype="float32")
    if isinstance(method, KMeans):
        return LearnedSpec(min(spec.bits, 4), spec.granularity, pad=spec.pad)
    return spec


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def only_what_it_accepts(request):
    """A method that refuses a spec says so by name and names others; of such pairs nothing more is asked."""
    given = getattr(request.node, "callspec", None)
    method, spec = (given.params.get(name) for name in ("method", "spec")) if given else (None, None)
    if method is not None and spec is not None and refuses(method, spec):
        with pytest.raises(ValueError, match=r"`method` .* 'layers/w' .*take .* or another method \(qjax"):
            method.shapes(problem(jax.ShapeDtypeStruct((K, N), jnp.float32), spec))
        pytest.skip(f"{method.name} refuses {spec}")


def refuses(method, spec):
    return "autoround" in method.name and not isinstance(spec, IntSpec)


def pairs():
    """Every method with every spec that it accepts, once: specs that have the same in their place are one."""
    for method in METHODS:
        met = set()
        for spec in sorted(SPECS, key=lambda s: not paired(method, s)):
            if not refuses(method, spec) and (own := accepted(method, spec)) not in met:
                met.add(own)
                yield pytest.param(method, spec, id=f"{spec}-{method.name}", marks=() if paired(method, spec) else pytest.mark.slow)


every_pair = pytest.mark.parametrize(("method", "spec"), list(pairs()))


def weight(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def state_of(method, stack=1):
    """Statistics of correlated activations; None for a method that needs no data."""
    return None if method.observer is None else statistics(method.observer, needs_float(method), stack)


@functools.cache
def statistics(observer, compared, stack, columns=K, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((stack, 96, columns)) @ rng.standard_normal((stack, columns, columns))
    floats = jnp.asarray(x + 0.05 * rng.standard_normal(x.shape), jnp.float32) if compared else None
    return observer.update(observer.init(stack, columns), Rows(jnp.asarray(x, jnp.float32), reference=floats))


def problem(w, spec, axes=(-2,), stacked=(), groups=1):
    return Problem(w, spec, axes, stacked, groups, "layers/w")


def solved(method, w, spec, state, **how) -> QTensor:
    spec = accepted(method, spec)
    return method.quantize(problem(jnp.asarray(w), spec, **how), state).q


def stack():
    """Three weights, each with an output of zeros: one program serves all tests of a method and a spec, for compiling takes the time."""
    w = np.array(weight(3, K, N))
    w[..., 3] = 0
    return w


@functools.cache
def once(method, spec) -> QTensor:
    return solved(method, stack(), spec, state_of(method, stack=3), stacked=(-3,))


decoded = jax.jit(QTensor.dequantize)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def plain(method):
    """The rounding that a method falls back to."""
    if isinstance(method, Online):
        return dataclasses.replace(method, then=plain(method.then))
    if isinstance(method, KMeans):
        return qjax.rtn()
    if hasattr(method, "then") and method.then is not None:
        return plain(method.then)
    if method.observer is None:
        return method
    return qjax.rtn(mse=getattr(getattr(method, "options", method), "mse", False))


@every_method
def test_it_is_a_value_with_a_name(method):
    copy = dataclasses.replace(method)
    assert copy == method and hash(copy) == hash(method)
    assert sum(other == method for other in METHODS) == 1
    assert len({other.name for other in METHODS}) == len(METHODS)


@every_method
@every_spec
def test_the_result_stands_for_the_weight(method, spec):
    spec = accepted(method, spec)
    q = once(method, spec)
    assert_stands_for_the_weight(method, spec, q, jnp.float32)
    if method == qjax.rtn():
        assert_same_bits(q.dequantize(), decoded(q))


@pytest.mark.slow
@pytest.mark.parametrize("method", SOLVING, ids=lambda m: m.name)
@pytest.mark.parametrize("spec", MORE_SPECS, ids=str)
def test_of_more_specs_the_result_stands_for_the_weight_and_is_no_worse_than_rounding(method, spec):
    q = once(method, spec)
    assert_stands_for_the_weight(method, spec, q, jnp.float32, most=0.7 if spec in COARSE else 0.2)
    assert_no_worse_than_rounding(method, spec)


@every_pair
def test_the_result_stands_for_a_weight_of_16_bits(method, spec):
    spec = accepted(method, spec)
    q = solved(method, stack().astype(jnp.bfloat16), spec, state_of(method, stack=3), stacked=(-3,))
    assert_stands_for_the_weight(method, spec, q, jnp.bfloat16)


def assert_stands_for_the_weight(method, spec, q, dtype, most=0.2):
    w, back = stack(), decoded(q)
    assert (q.shape, q.dtype, q.spec, back.dtype) == (w.shape, dtype, spec, dtype)
    error = np.sum(np.square(w - np.float32(back))) / np.sum(np.square(w))
    # Random codes would have an error of 1 or more; what moves codes for the sake of the output pays with weight error.
    assert 0 < error < most
    back = np.asarray(back)
    assert not back[..., 3].any() and back[..., 4].any()  # zeros stay zeros
    planned = method.shapes(problem(jax.ShapeDtypeStruct(w.shape, dtype), spec, stacked=(-3,)))
    chex.assert_trees_all_equal_shapes_and_dtypes(planned, q)
    assert planned.nbytes == q.nbytes


@every_method
@every_spec
def test_on_its_data_it_is_no_worse_than_rounding(method, spec):
    assert_no_worse_than_rounding(method, spec)


def assert_no_worse_than_rounding(method, spec):
    w, spec, h = stack(), accepted(method, spec), np.asarray(hessian(state_of(qjax.gptq(), stack=3)))

    def loss(q):
        delta = np.asarray(decoded(q)) - w
        if isinstance(method, KMeans):  # knows of the data only the power of columns
            power = np.diagonal(h, axis1=1, axis2=2)[:, :, None] if method.weighted else 1.0
            return np.sum(np.square(delta) * power, axis=(1, 2))
        if method.observer is None:  # knows the weight only
            return np.sum(np.abs(delta) ** (1.0 if isinstance(method, HQQ) else 2.4), axis=(1, 2))
        return np.einsum("skn,skj,sjn->s", delta, h, delta)

    assert np.all(loss(once(method, spec)) <= 1.0001 * loss(once(qjax.rtn(), spec)))


@every_pair
def test_without_data_it_rounds(method, spec):
    spec = accepted(method, spec)
    if isinstance(method, LowRank):
        pytest.skip("without data its low-rank part is that of the weight's error")
    if isinstance(method, HQQ) or method == qjax.kmeans(weighted=False):
        pytest.skip("its data is the weight")
    state = None if method.observer is None else method.observer.init(3, K)
    outcome = method.quantize(problem(jnp.asarray(stack()), spec, stacked=(-3,)), state)
    assert_same_bits(decoded(outcome.q), decoded(once(plain(method), spec)))
    assert method.observer is None or any("no calibration data" in note for note in outcome.notes)


@every_method
@every_spec
def test_stacked_parts_are_independent(method, spec):
    w, state, spec = stack(), state_of(method, stack=3), accepted(method, spec)
    w[1] = w[2]
    if state is not None:
        state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[[0, 2, 2]]), state)
    found, want = np.asarray(decoded(solved(method, w, spec, state, stacked=(-3,)))), np.asarray(decoded(once(method, spec)))
    assert_same_bits(found, want[[0, 2, 2]])


@pytest.mark.parametrize(
    ("method", "spec"),
    [pytest.param(m, s, id=f"{s}-{m.name}", marks=() if paired(m, s) else pytest.mark.slow) for m in METHODS for s in SPECS[:2]],
)
def test_a_stack_is_what_its_parts_are(method, spec):
    state, whole = state_of(method, stack=3), np.asarray(decoded(once(method, accepted(method, spec))))
    for i in range(3):
        mine = None if state is None else jax.tree.map(lambda leaf, i=i: jnp.asarray(np.asarray(leaf)[i : i + 1]), state)
        # One program over a stack sums in another order than one over a matrix.
        np.testing.assert_allclose(whole[i], decoded(solved(method, stack()[i], spec, mine)), atol=1e-5)


@every_pair
def test_how_the_weight_is_stored_does_not_matter(method, spec):
    """Contracted axes behind the kept ones, several of both, and the stack between them."""
    w, spec = stack().reshape(3, 6, 8, 5, 2).transpose(3, 1, 0, 4, 2), accepted(method, spec)
    back = np.asarray(decoded(solved(method, w, spec, state_of(method, stack=3), axes=(-4, -1), stacked=(-3,))))
    assert_same_bits(back.transpose(2, 1, 4, 0, 3).reshape(3, K, N), decoded(once(method, spec)))


@every_method
def test_what_was_pruned_stays_pruned(method):
    w = weight(K, N)
    smallest = jnp.argsort(jnp.argsort(jnp.abs(w).reshape(K // 4, 4, N), axis=1), axis=1) < 2
    w = jnp.where(smallest.reshape(K, N), 0, w)
    pruned = problem(w, accepted(method, qjax.uint4(group_size=16)))
    if fills_zeros(method):
        with pytest.raises(ValueError, match=r"`method` .* keeps no exact zeros, and 50 % of 'layers/w' is: .* take .*qjax\."):
            method.quantize(pruned, state_of(method))
        return
    back = np.asarray(method.quantize(pruned, state_of(method)).q.dequantize())
    assert not back[np.asarray(w) == 0].any() and back[np.asarray(w) != 0].any()


def wrappers():
    """Every method of the suite that hands the rounding over to another, with that other in its place."""
    seen = {type(m): m for m in METHODS if hasattr(m, "then")}
    return [lambda then, m=m: dataclasses.replace(m, then=then) for m in seen.values()]


def test_whatever_wraps_a_method_does_what_it_needs():
    assert len(wrappers()) == 4
    for wrap in wrappers():
        assert needs_float(wrap(qjax.gptaq())) and not needs_float(wrap(qjax.gptq()))
        assert needs_float(wrap(qjax.online_rotation(qjax.gptaq()))) and fills_zeros(wrap(qjax.online_rotation()))
        compared = wrap(qjax.gptaq()).observer.init(1, 4)
        assert sum(isinstance(part, CrossMoments) for part in jax.tree.leaves(compared, is_leaf=lambda x: isinstance(x, CrossMoments))) == 1


@every_method
def test_with_an_input_scale_it_still_stands_for_the_weight(method):
    """s w is what is rounded, on the statistics of x / s; the packed weight divides."""
    w, s, spec = weight(3, K, N, dtype=jnp.bfloat16), jnp.exp(weight(3, K, 1, seed=2)), accepted(method, qjax.int4(group_size=8))
    state = state_of(method, stack=3)
    q = quantize_scaled(method, problem(w, spec, stacked=(-3,)), state, s).q
    assert (q.shape, q.dtype, q.input_scale.shape) == (w.shape, w.dtype, (3, 1, K))
    x = None if state is None else divide_columns(state, s[..., 0])
    want = solved(method, w.astype(jnp.float32) * s, spec, x, stacked=(-3,)).dequantize() / s
    assert_same_bits(q.dequantize(), want.astype(jnp.bfloat16))


@every_method
def test_twice_is_the_same_and_compiles_once(method):
    spec, state, compiled = qjax.int4(group_size=8), state_of(method), []
    first = solved(method, weight(K, N), spec, state)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None
    )
    other = solved(method, weight(K, N, seed=5), spec, state_of(method))
    assert not compiled, f"{len(compiled)} programs compiled for a weight of the same shape"
    assert_same_bits(solved(method, weight(K, N), spec, state), first)
    assert not np.array_equal(np.asarray(other.codes), np.asarray(first.codes))


@every_method
def test_a_weight_that_is_not_finite_is_refused_by_name(method):
    params = {"up": {"kernel": weight(K, N).at[2, 3].set(jnp.nan)}}
    policy = qjax.Policy([qjax.Rule("*", weight=accepted(method, qjax.int4()), method=method)])
    with pytest.raises(ValueError, match="up/kernel"):
        qjax.quantize(lambda p, x: x @ p["up"]["kernel"], params, policy, calibration=[jnp.ones((4, K))])


@pytest.mark.parametrize("method", [m for m in METHODS if m.observer is not None], ids=lambda m: m.name)
def test_data_that_is_not_finite_is_refused_by_name(method):
    x = weight(4, K).at[1, 2].set(jnp.inf)
    policy = qjax.Policy([qjax.Rule("*", weight=accepted(method, qjax.int4()), method=method)])
    with pytest.raises(ValueError, match=r"`calibration` batch 0 gives the input of 'w' \(dot_general\) NaN or infinity"):
        qjax.quantize(lambda p, x: x @ p["w"], {"w": weight(K, N)}, policy, calibration=[x])


# The same promises over a whole program, where a method also chooses scales and what becomes of activations.

LAYERS, WIDE = 2, 40


def layer(x, w):
    h = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w["norm"][None, None]
    return x + jax.nn.relu(h @ w["up"]) @ w["down"]


def model(p, x):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, p)[0]


def unrolled(p, x):
    for i in range(LAYERS):
        x = layer(x, jax.tree.map(lambda w, i=i: w[i], p))
    return x


def model_params():
    """Norms with a few large channels, whose rows of the weights are small, as language models have them."""
    large = jnp.where(jnp.arange(K) % 16 == 3, 50.0, 1.0)
    up = weight(LAYERS, K, WIDE, seed=3) / (5 * large[None, :, None])
    return {"norm": jnp.tile(large, (LAYERS, 1)), "up": up, "down": weight(LAYERS, WIDE, K, seed=4) / 8}


WHOLE = [*METHODS, qjax.smoothquant(then=qjax.llm_int8()), qjax.awq(then=qjax.llm_int8())]
QUICK = ("smoothquant", "llm_int8")


def rule_of(method):
    """A rule with what a method needs."""
    rounds = any(name in method.name for name in ("smoothquant", "llm_int8", "online_rotation"))
    activation = qjax.dynamic(qjax.int8()) if rounds else None
    spec = accepted(method, qjax.int4() if activation is None else qjax.int8())
    return qjax.Rule("*", weight=spec, method=method, activation=activation)


@functools.cache
def case():
    """Parameters, inputs and what the float program makes of them."""
    params, x = model_params(), weight(3, 32, K, seed=5)
    return params, x, model(params, x)


@functools.cache
def error_of_rounding(spec, activation):
    params, x, want = case()
    plain = qjax.quantize(model, params, qjax.Policy([qjax.Rule("*", weight=spec, activation=activation)]), [x])
    return float(jnp.linalg.norm(jax.jit(qjax.quantized(model))(plain.params, x) - want))


@pytest.mark.parametrize("method", [m if m.name in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in WHOLE], ids=lambda m: m.name)
def test_a_whole_program_is_no_worse_than_rounded_and_the_same_in_every_form(method):
    (params, x, want), rule = case(), rule_of(method)
    policy, most = qjax.Policy([rule]), error_of_rounding(rule.weight, rule.activation)
    result = qjax.quantize(model, params, policy, [x])
    got = jax.jit(qjax.quantized(model))(result.params, x)
    error = float(jnp.linalg.norm(got - want))
    assert 0 < error <= 1.0001 * most
    rows = [row for row in result.report.rows if row.spec]
    assert {row.method for row in rows} == {method.name}
    assert {row.kernel for row in rows} == {"xla int8 + 16 bit outliers" if "llm_int8" in method.name else
                                            "xla int8" if rows[0].activation else "xla"}  # fmt: skip
    assert_same_bits(qjax.quantized(model)(result.params, x), got)
    # What the layers of a stack become is what they become one by one; sums in another order may move a code that lies on an edge.
    apart = qjax.quantize(unrolled, params, policy, [x])
    other = jax.jit(qjax.quantized(unrolled))(apart.params, x)
    assert float(jnp.linalg.norm(other - got)) < 0.05 * most
