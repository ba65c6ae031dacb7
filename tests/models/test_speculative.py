"""Speculative decoding: greedy tokens are the model's, sampled ones have its distribution, whatever the draft is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import qjax
from qjax.models import Decoder, Llama, LlamaConfig, generate, init_cache, speculate
from qjax.models.generate import Sampling, log_chances
from qjax.models.speculative import _step, accept

CONTEXT = 64
LEVEL = 1e-3  # of the chi-square tests: so often they fail where nothing is wrong; the seeds are fixed


def tiny(vocab_size, seed, layers=1, spread=0.5):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
    )
    model, rng = Llama(config), np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, spread, s.shape), s.dtype), shapes)
    return model, params, Decoder(model.apply, params, partial(init_cache, config))


@pytest.fixture(scope="module")
def pair():
    """A model, and a draft that is often right: its int3 weights."""
    model, params, whole = tiny(31, 4)
    policy = qjax.Policy([qjax.Rule("*embed*", weight=None), qjax.Rule("*", weight=qjax.int3())])
    packed = qjax.quantize(model.apply, params, policy, calibration=[jnp.ones((1, 4), jnp.int32)]).params
    return model, whole, whole._replace(apply=qjax.quantized(model.apply), params=packed)


def alone(whole, prompts, count, **rest):
    return generate(whole.apply, whole.params, prompts, count, init_cache=whole.init_cache, context_length=CONTEXT, **rest)


def chi_square(counts, chances):
    """p-value; what is expected fewer than 5 times is one cell; what is impossible must not be there."""
    assert not counts[chances == 0].any()
    expected = chances * counts.sum()
    rare = expected < 5
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    return stats.chisquare(observed[expected > 0], expected[expected > 0] * observed.sum() / expected.sum()).pvalue


def test_greedy_tokens_are_those_of_the_model_alone_in_a_batch_of_different_lengths(pair):
    _, whole, draft = pair
    prompts = [[3, 4, 5, 6, 7, 8, 9], [8], [10, 11, 12], [1, 2]]
    wanted = alone(whole, prompts, 12)
    shown = []
    found = speculate(whole, draft, prompts, 12, context_length=CONTEXT, draft_tokens=3, on_token=shown.append)
    for mine, its in zip(found.new, wanted.new, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert found.drafted is not None and 0.1 < found.acceptance < 0.95  # some were right and some were not
    np.testing.assert_array_equal(np.stack(shown, 1), found.tokens[:, 1:])
    assert found.tokens.shape == (4, 19) and found.tokens_per_second > 0


def test_ends_where_the_model_alone_ends(pair):
    _, whole, draft = pair
    prompts = [[3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3], [1] * 7, [2] * 7]
    free = alone(whole, prompts, 12)
    end = int(free.new[0][5])
    wanted = alone(whole, prompts, 12, eos_ids=(end,))
    run = partial(speculate, whole, draft, prompts, 12, context_length=CONTEXT, draft_tokens=3)
    for mine, its in zip(run(eos_ids=(end,)).new, wanted.new, strict=True):
        np.testing.assert_array_equal(mine, its)
    seen = []
    stopped = run(on_token=lambda tokens: seen.append(tokens) or len(seen) == 4)
    np.testing.assert_array_equal(stopped.tokens, free.tokens[:, :11])
    np.testing.assert_array_equal(np.stack(seen, 1), free.tokens[:, 7:11])


def test_a_step_is_one_program_whose_caches_stay_in_place(pair):
    _, whole, draft = pair
    prompt = np.full((1, 3), 5, np.int32)
    before = _step._cache_size()
    found = speculate(whole, draft, prompt, 20, context_length=CONTEXT, draft_tokens=2)
    np.testing.assert_array_equal(found.tokens, alone(whole, prompt, 20).tokens)
    assert _step._cache_size() == before + 1
    wide = (whole, draft)  # no cache is copied
    how: dict = {"applies": tuple(d.apply for d in wide), "axes": ((), ()), "count": 2, "how": Sampling(True, None, False, ())}
    caches = tuple(d.init_cache(1, 64) for d in wide)
    arguments = (tuple(d.params for d in wide), caches, np.zeros((1, 2), np.int32), np.ones(1, np.int32))
    compiled = _step.lower(*arguments, (jax.random.key(0), jnp.float32(0), None), jnp.int32(1), **how).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(a.nbytes for a in jax.tree.leaves(caches))


def test_accepted_and_redrawn_tokens_are_distributed_as_the_model_alone():
    """The joint distribution of what counts of a step, against its enumeration, with a draft that is badly wrong."""
    rng, rows, count, size = np.random.default_rng(0), 60_000, 2, 4
    p, q = rng.dirichlet(np.ones(size), (2, count + 1)).astype(np.float64)
    p[1, 2], q[0, 1] = 0.0, 0.0
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    logs = [jnp.broadcast_to(jnp.log(jnp.float32(x)), (rows, *x.shape)) for x in (q[:count], p)]
    keys = jax.random.split(jax.random.key(7))
    drafted = jax.random.categorical(keys[0], logs[0], axis=-1).astype(jnp.int32)
    tokens, taken = (np.asarray(x) for x in jax.jit(accept)(drafted, *logs, keys[1]))
    # Leviathan et al., appendix A.1: token i, where there is one, has distribution p_i, and is there if all before it were accepted.
    beta = np.minimum(p, q).sum(-1)
    for i in range(count + 1):
        there = taken >= i
        assert stats.binomtest(int(there.sum()), rows, float(np.prod(beta[:i]))).pvalue > LEVEL
        assert chi_square(np.bincount(tokens[there, i], minlength=size), p[i]) > LEVEL


def test_log_chances_are_what_sample_draws_from():
    logits = jnp.log(jnp.float32([[0.1, 0.2, 0.3, 0.4]]))
    found = np.exp(np.asarray(log_chances(logits, jnp.float32(0.5), 3, jnp.float32(0.9))))[0]
    squares = np.array([0, 0, 0.09, 0.16])  # of the top 3 the first two have .25 / .29 = .86 < .9 of it, so the third is in
    squares[1] = 0.04
    np.testing.assert_allclose(found, squares / squares.sum(), rtol=1e-5)
    cut = np.exp(np.asarray(log_chances(logits, jnp.float32(0.5), 3, jnp.float32(0.8))))[0]
    np.testing.assert_allclose(cut, [0, 0, 0.36, 0.64], rtol=1e-5)


@pytest.mark.slow
def test_sampled_texts_have_the_distribution_of_the_model():
    """Whole texts of three tokens over a vocabulary of 5, against their enumeration; temperature, top k and top p on both."""
    _, _, whole = tiny(5, 1, spread=0.7)
    _, _, draft = tiny(5, 2, spread=0.7)
    prompt, rows, options = [1, 3], 6000, {"temperature": 1.3, "top_k": 4, "top_p": 0.9}
    found = speculate(
        whole, draft, np.tile(prompt, (rows, 1)), 3, context_length=CONTEXT, draft_tokens=2, key=jax.random.key(11), **options
    )
    assert found.acceptance is not None and 0.2 < found.acceptance < 0.9
    texts = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    logits = whole.apply(whole.params, jnp.asarray(np.concatenate([np.tile(prompt, (125, 1)), texts], 1)))[:, 1:4]
    each = np.exp(np.asarray(log_chances(logits, jnp.float32(1.3), 4, jnp.float32(0.9)), np.float64))
    chances = np.prod(np.take_along_axis(each, texts[..., None], -1)[..., 0], -1)
    counts = np.bincount(np.stack(found.new) @ [25, 5, 1], minlength=125)
    assert chi_square(counts, chances / chances.sum()) > LEVEL
    # The test would see the draft's own distribution.
    own = draft.apply(draft.params, jnp.asarray(np.concatenate([np.tile(prompt, (125, 1)), texts], 1)))[:, 1:4]
    each = np.exp(np.asarray(log_chances(own, jnp.float32(1.3), None, None), np.float64))
    wrong = np.prod(np.take_along_axis(each, texts[..., None], -1)[..., 0], -1)
    assert chi_square(counts, wrong / wrong.sum()) < 1e-9


def test_one_call_takes_packed_parameters_as_a_draft(pair):
    model, whole, draft = pair
    run = partial(qjax.generate, model, whole.params, [[3, 4], [5, 6, 7]], 5, eos_ids=())
    found, wanted = run(draft=draft.params, draft_tokens=2), run()
    for mine, its in zip(found.new, wanted.new, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert wanted.acceptance is None and found.acceptance is not None
    with pytest.raises(ValueError, match="`kv_cache` with `draft`"):
        run(draft=draft.params, kv_cache=qjax.Policy([qjax.Rule("2/*", cache=qjax.kv_cache(qjax.int8(), window=4))]))
    other, params, _ = tiny(5, 0)
    with pytest.raises(ValueError, match="`draft` has a vocabulary of 5 and the model one of 31"):
        run(draft=(other, params))
    with pytest.raises(ValueError, match="`draft_tokens` must be at least 1, not 0"):
        run(draft=draft.params, draft_tokens=0)
    with pytest.raises(TypeError, match="`eos_ids` must be a tuple of token numbers"):
        qjax.generate(model, whole.params, [[3, 4]], 5, eos_ids=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`draft_tokens` must be a whole number, not 1\.5"):
        run(draft=draft.params, draft_tokens=1.5)
    with pytest.raises(ValueError, match="`tokens` hold 31, and the model has a vocabulary of 31"):
        speculate(whole, draft, [[31]], 2, context_length=CONTEXT)
    with pytest.raises(TypeError, match=r"`draft` must be a qjax.models.Decoder\(apply, params, init_cache\), got tuple"):
        speculate(whole, (draft.apply, draft.params), [[3]], 2, context_length=CONTEXT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache is not known"):
        run(draft=(type("Other", (), {"apply": staticmethod(model.apply)})(), params))
    with pytest.raises(ValueError, match="without one axis for the batch"):
        flat = Decoder(whole.apply, whole.params, lambda batch, length: {"state": jnp.zeros(length)})
        speculate(flat, flat, [[3, 4], [5, 6]], 2, context_length=CONTEXT)
