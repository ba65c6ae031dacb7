"""Products of two activations on integers: exact against NumPy's float64, integers in the program, gradients, transformations."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qjax
from qjax.models import Llama, LlamaConfig
from qjax.models.llama import stack_layers
from tests.program.cases import normal
from tests.runtime.test_integer import FLOAT, INTEGER

INT8, UINT8 = qjax.int8(), qjax.uint8()
# Subscripts of products as models have them: plain, grouped heads, batch axes in the middle, two contracted axes, no free axis.
FORMS = {
    "scores": ("btd,bsd->bts", (2, 5, 8), (2, 7, 8)),
    "values": ("bts,bsd->btd", (2, 5, 7), (2, 7, 8)),
    "grouped": ("bkgtd,bksd->bkgts", (2, 2, 3, 5, 8), (2, 2, 7, 8)),
    "heads": ("...qhd,...khd->...hqk", (2, 5, 3, 4), (2, 7, 3, 4)),
    "plain": ("ij,kj->ik", (5, 13), (1, 13)),
    "two_axes": ("abcd,dcbe->bae", (4, 2, 3, 5), (5, 3, 2, 6)),
    "no_free_axis": ("bd,bd->b", (6, 9), (6, 9)),
}
SPECS = [
    qjax.dynamic(INT8),
    qjax.dynamic(UINT8),
    qjax.static(UINT8),
    pytest.param(qjax.dynamic(INT8, per="tensor"), marks=pytest.mark.slow),
    pytest.param(qjax.dynamic(qjax.integer(8, symmetric=False)), marks=pytest.mark.slow),
    pytest.param(qjax.dynamic(qjax.int4(scale_rule="full")), marks=pytest.mark.slow),
    pytest.param(qjax.static(INT8), marks=pytest.mark.slow),
]


def rounded(x, act, axes):
    """What a value becomes, by NumPy alone: the grid in float32 as it is specified, its numbers in float64."""
    x, spec = np.asarray(x, np.float32), act.spec
    axes = tuple(axes) if act.per_token else tuple(range(x.ndim))
    hi, lo = x.max(axes, keepdims=True), x.min(axes, keepdims=True)
    if spec.symmetric:
        scale = np.maximum(hi, -lo) / np.float32(spec.qmax + (0.5 if spec.scale_rule == "half" else 0.0))
        zero = 0
    else:
        lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
        scale = (hi * np.float32(0.5) - lo * np.float32(0.5)) / np.float32(127.5)
        zero = np.clip(np.round(spec.qmin - lo / scale), spec.qmin, spec.qmax)
    codes = np.clip(np.round(x / scale) + zero, spec.qmin, spec.qmax)
    return (codes.astype(np.float64) - zero) * scale.astype(np.float64)


def contracted(subscripts):
    (lhs, rhs), out = subscripts.replace("...", "").split("->")[0].split(","), subscripts.split("->")[1]
    return [[i for i, label in enumerate(part) if label not in out] for part in (lhs, rhs)]


def shifted(subscripts):
    """Positions among all axes, for subscripts with an ellipsis of one axis."""
    return [[i + subscripts.startswith("...") for i in axes] for axes in contracted(subscripts)]


def everything(p, operands):
    out = {name: jnp.einsum(FORMS[name][0], *pair) for name, pair in operands.items()}
    return out | {"weight": operands["plain"][0] @ p["w"]}


def quantized(fn, params, inputs, act, weight=INT8, calibration=None):
    rules = [qjax.Rule("*", weight=weight), qjax.Rule("*:dot_general.*", activation=act)]
    return qjax.quantize(fn, params, qjax.Policy(rules), calibration=calibration or [inputs])


@pytest.mark.parametrize("act", SPECS, ids=str)
def test_every_form_is_the_product_of_the_rounded_numbers(act):
    operands = {n: (normal(*a) + 0.5, normal(*b, seed=1) - 0.2) for n, (_, a, b) in FORMS.items()}
    result = quantized(everything, {"w": normal(13, 3)}, (operands,), act)
    run = jax.jit(qjax.quantized(everything, sites=result.sites))
    got = run(result.params, operands)
    for name, (subscripts, *_) in FORMS.items():
        x, y = (rounded(v, act, axes) for v, axes in zip(operands[name], shifted(subscripts), strict=True))
        np.testing.assert_allclose(got[name], np.einsum(subscripts, x, y), rtol=3e-6, atol=3e-6, err_msg=name)
    text = run.lower(result.params, operands).as_text()
    assert len(INTEGER.findall(text)) == len(FORMS)
    assert len(FLOAT.findall(text)) == 1  # the weight, which has no activation spec


def test_a_spec_for_each_operand():
    fn = lambda p, x, y: lax.dot_general(x, y, (((1,), (1,)), ((), ())))  # noqa: E731
    x, y = jax.nn.softmax(normal(6, 9)), normal(4, 9, seed=1)
    pair = (qjax.static(UINT8), qjax.dynamic(INT8))
    result = qjax.quantize(fn, {}, qjax.Policy([qjax.Rule(":dot_general.0", activation=pair)]), calibration=[(x, y)])
    want = rounded(x, pair[0], ()) @ rounded(y, pair[1], (1,)).T
    np.testing.assert_allclose(jax.jit(qjax.quantized(fn, sites=result.sites))({}, x, y), want, rtol=3e-6, atol=1e-6)
    (q,) = result.sites.values()
    assert q.nbytes == 8 and q.rhs_scale is None and str(q) == 'QProduct(static(uint8(per="tensor")) x dynamic(int8(per="token")), 8 bytes)'
    # What lies beyond a static range is clipped: twice the probabilities give less than twice the product's largest entries.
    np.testing.assert_allclose(jax.jit(qjax.quantized(fn, sites=result.sites))({}, 100 * jnp.ones_like(x), y),
                               float(x.max()) * np.ones(x.shape) @ rounded(y, pair[1], (1,)).T, rtol=1e-5, atol=1e-5)  # fmt: skip


def test_zeros_constants_and_rows_of_very_different_size():
    fn = lambda p, x: x @ x.T @ jnp.ones((4, 2))  # noqa: E731
    q = qjax.quantize(fn, {}, qjax.Policy([qjax.Rule("*:*", activation=qjax.dynamic(INT8))]), calibration=[normal(4, 8)])
    run = jax.jit(qjax.quantized(fn, sites=q.sites))
    assert len(q.sites) == 2 and not np.asarray(run({}, jnp.zeros((4, 8)))).any()
    # The largest value is half a step beyond the largest code.
    want = fn({}, 3 * jnp.ones((4, 8))) * (127 / 127.5) ** 4
    np.testing.assert_allclose(run({}, 3 * jnp.ones((4, 8))), want, rtol=1e-5)
    rows = normal(4, 8) * jnp.array([[0.0], [1e-3], [1.0], [1e3]])
    one = lambda p, x: x @ x.T  # noqa: E731
    got = jax.jit(qjax.quantized(one, sites={":dot_general.0": q.sites[":dot_general.0"]}))({}, rows)
    want = np.asarray(one({}, rows))
    np.testing.assert_array_less(np.abs(got - want), 0.03 * np.sqrt(np.outer(np.diag(want), np.diag(want))) + 1e-30)


CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, max_position_embeddings=32)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 64)


def decoder(**settings):
    model = Llama(CONFIG, **settings)
    shapes = jax.eval_shape(Llama(CONFIG).init, jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda w: 0.2 * normal(*w.shape) if len(w.shape) > 1 else jnp.ones(w.shape), shapes)
    return model, {"params": stack_layers(params) if settings.get("scan_layers") else params}


def operand_types(compiled):
    """The types of the operands of every `dot` of a compiled program."""
    types = dict(re.findall(r"%?([\w.\-]+) = ([a-z0-9]+)\[", compiled))
    return [{types[name] for name in pair} for pair in re.findall(r" dot\(%?([\w.\-]+), %?([\w.\-]+)\)", compiled)]


@pytest.mark.parametrize("act", [pytest.param(qjax.dynamic(INT8), marks=pytest.mark.slow), qjax.static(UINT8)], ids=str)
def test_a_scanned_rematerialised_bf16_decoder_has_no_float_product_left(act):
    model, params = decoder(scan_layers=True, remat=True, dtype=jnp.bfloat16)
    policy = qjax.Policy([qjax.Rule("*", weight=INT8, activation=qjax.dynamic(INT8)), qjax.Rule("*:dot_general.*", activation=act)])
    result = qjax.quantize(model.apply, params, policy, calibration=[TOKENS])
    run = jax.jit(qjax.quantized(model.apply, sites=result.sites))
    lowered = run.lower(result.params, TOKENS)
    text = lowered.as_text()
    # One body of a loop: seven weights and two products in it, the head outside.
    assert len(INTEGER.findall(text)) == 10 and not FLOAT.search(text)
    assert operand_types(lowered.compile().as_text()) == [{"s8"}] * 10
    got, want = run(result.params, TOKENS), jax.jit(model.apply)(params, TOKENS)
    assert got.dtype == want.dtype and np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)
    # Only what a rule names: without `sites` the two products are float.
    plain = jax.jit(qjax.quantized(model.apply)).lower(result.params, TOKENS).as_text()
    assert len(INTEGER.findall(plain)) == 8 and len(FLOAT.findall(plain)) == 2


def test_layers_under_scan_compute_what_layers_apart_compute_and_differentiate():
    def layer(x, w):
        with jax.named_scope("mix"):
            return jnp.tanh(jax.nn.softmax(x @ w @ x.T) @ x)

    def scanned(p, x):
        return lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None)), x, p["w"])[0]

    def apart(p, x):
        for i in range(3):
            x = layer(x, p["w"][i])
        return x

    params, x = {"w": normal(3, 8, 8)}, normal(6, 8, seed=1)
    policy, found = qjax.Policy([qjax.Rule("*:*", activation=(qjax.static(UINT8), qjax.static(INT8)))]), []
    for fn in (scanned, apart):
        sites = qjax.quantize(fn, params, policy, calibration=[x]).sites
        run = qjax.quantized(fn, sites=sites)
        out = jax.jit(jax.value_and_grad(lambda x, run=run: jnp.sum(jnp.square(run(params, x)))))(x)
        # By layer, then by product of the layer.
        scales = np.stack([np.ravel(q.lhs_scale) for q in sites.values()]).reshape(-1)
        found.append((out, scales.reshape(2, 3) if fn is scanned else scales.reshape(3, 2).T))
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)
    assert len(np.unique(found[0][1])) == 6  # each layer has its own
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[0][0], found[1][0])


def test_the_gradient_of_both_operands_is_that_of_the_float_product():
    fn = lambda p, x, y: jnp.einsum("btd,bsd->bts", x, y)  # noqa: E731
    x, y, t = normal(2, 5, 8), normal(2, 7, 8, seed=1), normal(2, 5, 7, seed=2)
    policy = qjax.Policy([qjax.Rule("*:*", activation=qjax.static(INT8))])
    sites = qjax.quantize(fn, {}, policy, calibration=[(x, y)]).sites
    loss = lambda f: lambda x, y: jnp.sum(f({}, x, y) * t)  # noqa: E731
    got = jax.jit(jax.grad(loss(qjax.quantized(fn, sites=sites)), (0, 1)))(x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, jax.grad(loss(fn), (0, 1))(x, y))


@pytest.mark.parametrize("act", [qjax.dynamic(INT8), qjax.static(UINT8)], ids=str)
def test_vmap_and_scan_give_what_a_loop_gives(act):
    fn = lambda p, x: jax.nn.softmax(x @ x.T) @ x  # noqa: E731
    xs = normal(4, 5, 8, seed=3)
    sites = qjax.quantize(fn, {}, qjax.Policy([qjax.Rule("*:*", activation=act)]), calibration=list(xs)).sites
    run = qjax.quantized(fn, sites=sites)
    want = jnp.stack([jax.jit(run)({}, x) for x in xs])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: run({}, x)))(xs), want)
    np.testing.assert_array_equal(jax.jit(lambda xs: lax.map(lambda x: run({}, x), xs))(xs), want)


@pytest.mark.parametrize("act", [qjax.dynamic(INT8), qjax.static(UINT8)], ids=str)
def test_linen_and_nnx_modules_with_a_causal_mask(act):
    x, mask = normal(2, 16, 8), nn.make_causal_mask(jnp.ones((2, 16)))
    rules = [qjax.Rule("*kernel", weight=INT8, activation=qjax.dynamic(INT8)), qjax.Rule("*:dot_general.*", activation=act)]
    linen = nn.MultiHeadDotProductAttention(num_heads=2)
    variables = linen.init(jax.random.key(0), x)

    class Masked(nnx.Module):
        def __init__(self):
            self.heads = nnx.MultiHeadAttention(num_heads=2, in_features=8, rngs=nnx.Rngs(0), decode=False)

        def __call__(self, x):
            return self.heads(x, mask=mask)

    module, policy = Masked(), qjax.Policy(rules)
    cases = (
        (lambda p, x: linen.apply(p, x, mask=mask), variables, qjax.linen.quantize(linen, variables, policy, [x], mask=mask)),
        (qjax.nnx.function(module), nnx.state(module), qjax.nnx.quantize(module, policy, [x])),
    )
    for fn, params, result in cases:
        assert len(result.sites) == 2
        run = jax.jit(qjax.quantized(fn, sites=result.sites))
        text = run.lower(result.params, x).as_text()
        assert len(INTEGER.findall(text)) == 6 and not FLOAT.search(text)
        got, want = run(result.params, x), jax.jit(fn)(params, x)
        assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
        # Static ranges are causal: what comes later changes nothing before it. A dynamic range of the values is found over all
        # positions, which are the contracted axis, so it moves with them, by rounding steps.
        later = run(result.params, x.at[:, 9:].set(0.0))[:, :9]
        assert np.array_equal(later, got[:, :9]) == act.static
        np.testing.assert_allclose(later, got[:, :9], atol=0.02 * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_a_cache_is_read_by_the_same_products():
    """Prefill and decoding trace to the same names, so one `sites` serves both."""
    from qjax.models import init_cache

    model, params = decoder()
    result = quantized(model.apply, params, TOKENS, qjax.static(UINT8))
    run = jax.jit(qjax.quantized(model.apply, sites=result.sites))
    whole = run(result.params, TOKENS)
    cache = init_cache(CONFIG, 2, 16)
    _, cache = run(result.params, TOKENS[:, :15], cache, 0)
    last, _ = run(result.params, TOKENS[:, 15:], cache, 15)
    np.testing.assert_allclose(last[:, 0], whole[:, 15], rtol=2e-2, atol=2e-2 * float(jnp.abs(whole).max()))


def test_refusals():
    fn = lambda p, x: x @ x.T  # noqa: E731
    sites = qjax.quantize(fn, {}, qjax.Policy([qjax.Rule("*:*", activation=qjax.dynamic(INT8))]), calibration=[normal(3, 8)]).sites
    with pytest.raises(TypeError, match=r"`sites` must be the `sites` of a result, got list"):
        qjax.quantized(fn, sites=[sites])
    other = lambda p, x: jnp.tanh(x)  # noqa: E731
    with pytest.raises(ValueError, match=r"`sites` names ':dot_general.0', no product of two activations of the program; it has none"):
        qjax.quantized(other, sites=sites)({}, normal(3, 8))
    assert dataclasses.replace(sites[":dot_general.0"]) == sites[":dot_general.0"]
