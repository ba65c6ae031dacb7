"""Generation: greedy against transformers and against full recomputation, sampling against its distribution."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.models import Llama, LlamaConfig, books_llama, generate, init_cache, stack_layers
from qjax.models.generate import sample

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "llama_logits.npz")


@pytest.fixture(scope="module")
def books():
    checkpoint = books_llama()
    return checkpoint.config, {"params": checkpoint.params}, Llama(checkpoint.config).apply


@pytest.fixture(scope="module")
def small():
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
    )
    model, rng = Llama(config), np.random.default_rng(4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    return config, jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape), s.dtype), shapes), model.apply


def settings(config, **rest):
    return {"init_cache": partial(init_cache, config), "context_length": config.max_position_embeddings} | rest


def test_greedy_is_transformers_greedy(books):
    config, variables, apply = books
    prompt, expected = GOLDEN["books/tokens"], GOLDEN["books/greedy"]
    found = generate(apply, variables, prompt, 40, **settings(config))
    np.testing.assert_array_equal(found.tokens, expected)
    assert found.tokens_per_second > 0
    assert found.first_token_seconds > 0
    assert found.second_token_seconds > 0


@pytest.mark.parametrize("scan_layers", [False, True])
def test_greedy_is_the_argmax_of_a_full_recomputation(books, scan_layers):
    config, variables, apply = books
    model = Llama(config, scan_layers=scan_layers)
    tree = {"params": stack_layers(variables["params"])} if scan_layers else variables
    prompt = np.random.default_rng(3).integers(3, 4096, (3, 9)).astype(np.int32)
    cache = partial(init_cache, config, scan_layers=scan_layers)
    found = generate(model.apply, tree, prompt, 20, **settings(config, init_cache=cache)).tokens
    logits = apply(variables, jnp.asarray(found[:, :-1]))
    np.testing.assert_array_equal(found[:, 9:], np.argmax(logits, axis=-1)[:, 8:])


def test_up_to_the_whole_context_and_not_beyond(small):
    config, variables, apply = small
    prompt = np.full((1, 122), 5, np.int32)
    assert generate(apply, variables, prompt, 6, **settings(config)).tokens.shape == (1, 128)
    with pytest.raises(
        ValueError, match=r"length 122 and `max_new_tokens` 7 exceed the context of 128.*at most 6 tokens"
    ):
        generate(apply, variables, prompt, 7, **settings(config))


def test_one_trace_each_for_prefill_and_decode_and_the_cache_is_donated(small):
    config, variables, apply = small
    traced, caches = [], []

    def counted(params, tokens, cache, position):
        traced.append(tokens.shape)
        return apply(params, tokens, cache, position)

    def remembered(batch, length):
        caches.append(init_cache(config, batch, length))
        return caches[-1]

    for _ in range(2):
        generate(counted, variables, np.full((2, 5), 7), 12, **settings(config, init_cache=remembered))
    assert traced == [(2, 5), (2, 1)]
    assert all(leaf.is_deleted() for cache in caches for leaf in jax.tree.leaves(cache))
    assert jax.tree.leaves(caches[0])[0].shape[2] == 64


def test_sampling_needs_a_key_and_repeats_with_it(small):
    config, variables, apply = small
    prompt = np.full((2, 4), 9)
    with pytest.raises(ValueError, match=r"`key` is needed for `temperature` 0\.7"):
        generate(apply, variables, prompt, 3, temperature=0.7, **settings(config))
    draw = partial(generate, apply, variables, prompt, 16, temperature=1.0, **settings(config))
    first, again, other = (draw(key=jax.random.key(seed)).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])
    greedy = generate(apply, variables, prompt, 16, **settings(config)).tokens
    np.testing.assert_array_equal(draw(key=jax.random.key(0), top_k=1).tokens, greedy)


def test_sample_follows_the_distribution():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    rows = jnp.broadcast_to(logits, (20_000, 4))
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3)):
        drawn = np.asarray(sample(rows, jax.random.key(5), jnp.float32(temperature), False, top_k))
        weights = np.array([0.1, 0.2, 0.3, 0.4]) ** (1 / temperature)
        if top_k == 3:
            weights[0] = 0.0
        expected = weights / weights.sum()
        found = np.bincount(drawn, minlength=4) / len(drawn)
        np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(len(drawn)))
        if top_k == 3:
            assert found[0] == 0.0
    assert sample(jnp.zeros((2, 4)), jax.random.key(0), jnp.float32(1), True, None).tolist() == [0, 0]


def test_ends_at_the_end_token(small):
    config, variables, apply = small
    prompt = np.arange(1, 17, dtype=np.int32)[None]
    plain = generate(apply, variables, prompt, 20, **settings(config)).tokens[0, 16:]
    place = 4
    streamed = []
    ended = generate(
        apply, variables, prompt, 20, eos_ids=(int(plain[place]),), on_token=streamed.append, **settings(config)
    )
    first = int(np.flatnonzero(plain == plain[place])[0])
    np.testing.assert_array_equal(ended.tokens[0, 16:], plain[: first + 1])
    np.testing.assert_array_equal(np.concatenate(streamed), plain[: first + 1])
    both = np.concatenate([prompt, np.full_like(prompt, 7)])
    rows = generate(apply, variables, both, 20, eos_ids=(int(plain[place]),), **settings(config)).tokens[:, 16:]
    assert set(rows[0, first:].tolist()) == {int(plain[place])}


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_steps_for_a_rate(small, count):
    config, variables, apply = small
    streamed = []
    found = generate(apply, variables, np.full((1, 3), 5), count, on_token=streamed.append, **settings(config))
    assert found.tokens.shape == (1, 3 + count)
    assert found.tokens_per_second is None
    assert len(streamed) == count


def test_wrong_arguments_are_named(small):
    config, variables, apply = small
    run = partial(generate, apply, variables, **settings(config))
    with pytest.raises(ValueError, match="`tokens` must be integers"):
        run(np.zeros((1, 0), int), max_new_tokens=2)
    with pytest.raises(ValueError, match="`tokens` must be integers"):
        run(np.zeros(4, int), max_new_tokens=2)
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, not 0"):
        run(np.zeros((1, 4), int), max_new_tokens=0)
    with pytest.raises(ValueError, match="`temperature` must be 0"):
        run(np.zeros((1, 4), int), max_new_tokens=1, temperature=-1.0)
    with pytest.raises(ValueError, match="`top_k` must be a whole number of at least 1"):
        run(np.zeros((1, 4), int), max_new_tokens=1, top_k=0)
    with pytest.raises(ValueError, match="`tokens` must not be negative, got -1"):
        run(np.full((1, 4), -1), max_new_tokens=1)
    for name, value, error in [
        ("temperature", "1", ValueError),
        ("top_p", "1", ValueError),
        ("top_k", 2.0, ValueError),
        ("eos_ids", 3, TypeError),
        ("key", 0, TypeError),
        ("max_new_tokens", 2.5, TypeError),
        ("context_length", "16", TypeError),
    ]:
        with pytest.raises(error, match=f"`{name}` must be"):
            run(np.zeros((1, 4), int), **{"max_new_tokens": 1, name: value})
    with pytest.raises(ValueError, match="`top_k` 5000 exceeds the vocabulary of 31"):
        run(np.zeros((1, 4), int), max_new_tokens=1, top_k=5000, temperature=1.0, key=jax.random.key(0))


def test_prompts_of_different_lengths_are_continued_as_each_alone(small):
    config, variables, apply = small
    prompts = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]
    together = generate(apply, variables, prompts, 6, **settings(config))
    for prompt, new in zip(prompts, together.new, strict=True):
        alone = generate(apply, variables, np.asarray([prompt]), 6, **settings(config))
        np.testing.assert_array_equal(new, alone.tokens[0, len(prompt) :])
        np.testing.assert_array_equal(new, alone.new[0])


def test_an_end_inside_a_prompt_ends_nothing_and_what_is_new_stops_at_the_end(small):
    config, variables, apply = small
    prompts = [[3, 4, 5, 6, 7], [8, 9]]
    free = generate(apply, variables, prompts, 6, **settings(config))
    end = int(free.new[1][1])
    found = generate(apply, variables, [[3, end, 5, end, 7], [8, 9]], 6, **settings(config, eos_ids=(end,)))
    np.testing.assert_array_equal(found.new[1], free.new[1][: list(free.new[1]).index(end) + 1])
    alone = generate(apply, variables, [[3, end, 5, end, 7]], 6, **settings(config, eos_ids=(end,)))
    np.testing.assert_array_equal(found.new[0], alone.new[0])


def test_true_from_the_callback_ends_the_generation(small):
    config, variables, apply = small
    seen = []
    found = generate(apply, variables, [[3, 4]], 9, **settings(config, on_token=lambda t: seen.append(int(t[0])) or len(seen) == 3))
    assert found.tokens.shape == (1, 5) and list(found.new[0]) == seen and len(seen) == 3


def test_top_p_draws_from_the_nucleus():
    chances = jnp.asarray([0.05, 0.5, 0.15, 0.3])
    logits = jnp.broadcast_to(jnp.log(chances), (4000, 4))

    def drawn(top_p, top_k=None, temperature=1.0):
        found = sample(logits, jax.random.key(1), jnp.float32(temperature), False, top_k, jnp.float32(top_p))
        return np.bincount(np.asarray(found), minlength=4) / 4000

    np.testing.assert_allclose(drawn(0.75), [0, 0.625, 0, 0.375], atol=0.03)  # .5, then .3 for what is missing to .75
    np.testing.assert_allclose(drawn(1.0), chances, atol=0.03)
    assert drawn(0.4)[1] == 1 and drawn(1e-6)[1] == 1
    np.testing.assert_allclose(drawn(0.75, top_k=2), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(drawn(0.6, top_k=2), [0, 1, 0, 0], atol=0)  # .5 / .8 of the two


@pytest.mark.parametrize("top_p", [0.0, 1.5, -1.0, float("nan")])
def test_top_p_is_a_probability(small, top_p):
    config, variables, apply = small
    with pytest.raises(ValueError, match="`top_p` must be above 0 and at most 1"):
        generate(apply, variables, [[3, 4]], 2, **settings(config, top_p=top_p))


def test_one_call_generates_from_a_model_and_its_packed_parameters(small):
    config, variables, _ = small
    model = Llama(config)
    policy = qjax.Policy([qjax.Rule("*embed*", weight=None), qjax.Rule("*", weight=qjax.int8())])
    tokens = jnp.ones((1, 4), jnp.int32)
    params = qjax.quantize(model.apply, variables, policy, calibration=[tokens]).params
    found = qjax.generate(model, params, [[3, 4], [5, 6, 7]], 5, eos_ids=())
    apply = qjax.quantized(model.apply)
    for prompt, new in zip([[3, 4], [5, 6, 7]], found.new, strict=True):
        alone = generate(apply, params, [prompt], 5, **settings(config))
        np.testing.assert_array_equal(new, alone.new[0])
    cache = qjax.Policy([qjax.Rule("2/*", cache=qjax.kv_cache(qjax.int8(), window=4))])
    assert qjax.generate(model, params, [[3, 4]], 5, kv_cache=cache, temperature=1.0, seed=3).tokens.shape == (1, 7)
    with pytest.raises(ValueError, match="`tokens` hold 31, and the model has a vocabulary of 31: they are of another tokenizer"):
        qjax.generate(model, params, [[3, 31]], 2)
    with pytest.raises(ValueError, match="`context_length` 129 exceeds the 128 positions that the model was made for"):
        qjax.generate(model, params, [[3, 4]], 2, context_length=129)
    with pytest.raises(TypeError, match="`model` must have an `apply"):
        qjax.generate(model.apply, params, [[3, 4]])
    with pytest.raises(ValueError, match="`init_cache` is needed"):
        qjax.generate(type("Other", (), {"apply": staticmethod(model.apply)})(), params, [[3, 4]])
