"""The Llama against transformers' numbers, and its variants against each other."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.formats.huggingface import load_checkpoint
from qjax.formats.safetensors import write_tensors
from qjax.models import Llama, LlamaConfig, books_llama, init_cache, stack_layers, unstack_layers

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "llama_logits.npz")
ODD = LlamaConfig(
    vocab_size=37,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    max_position_embeddings=24,
    attention_bias=True,
    mlp_bias=True,
)


@partial(jax.jit, static_argnames="model")
def logits_of(model, params, tokens, *rest):
    return model.apply({"params": params}, jnp.asarray(tokens), *rest)


@pytest.fixture(scope="module")
def books():
    return books_llama()


@pytest.fixture(scope="module")
def odd():
    tokens = np.random.default_rng(0).integers(0, ODD.vocab_size, (2, 11)).astype(np.int32)
    shapes = jax.eval_shape(Llama(ODD).init, jax.random.key(1), tokens)["params"]
    # Initial values (zero biases, norms of one, small kernels) would hide errors: large ones for every leaf instead.
    rng = np.random.default_rng(1)
    leaves, tree = jax.tree.flatten(shapes)
    filled = [jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(tree, filled), tokens


@pytest.mark.parametrize("name", ["biased", "mistral"])
def test_logits_are_those_of_transformers(name, tmp_path):
    prefix = f"{name}/tensor/"
    tensors = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(str(GOLDEN[f"{name}/config"]))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.tokenizer is None
    assert checkpoint.model_kind == json.loads(str(GOLDEN[f"{name}/config"]))["model_type"]
    found = logits_of(Llama(checkpoint.config), checkpoint.params, GOLDEN[f"{name}/tokens"])
    expected = GOLDEN[f"{name}/logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_the_golden_case_has_rope_scaling():
    config = LlamaConfig.from_hf(json.loads(str(GOLDEN["biased/config"])))
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 4.0
    assert config.rope_theta == 16.0


def test_shipped_model_logits_are_those_of_transformers(books):
    found = np.asarray(logits_of(Llama(books.config), books.params, GOLDEN["books/tokens"]))
    np.testing.assert_allclose(found[:, -1:], GOLDEN["books/last"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(found[:, :, ::37], GOLDEN["books/every37"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_tree(tied):
    config = LlamaConfig(**{**vars(ODD), "tie_word_embeddings": tied, "attention_bias": False})
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert set(shapes) == {"embed_tokens", "layers_0", "layers_1", "norm"} | (set() if tied else {"lm_head"})
    assert shapes["embed_tokens"]["embedding"].shape == (37, 20)
    attention, mlp = shapes["layers_0"]["self_attn"], shapes["layers_0"]["mlp"]
    assert {name: leaf["kernel"].shape for name, leaf in attention.items()} == {
        "q_proj": (20, 60),
        "k_proj": (20, 30),
        "v_proj": (20, 30),
        "o_proj": (60, 20),
    }
    assert mlp["down_proj"]["kernel"].shape == (28, 20)
    assert set(attention["q_proj"]) == {"kernel"}
    assert set(mlp["gate_proj"]) == {"kernel", "bias"}
    assert shapes["layers_1"]["input_layernorm"]["scale"].shape == (20,)


@pytest.mark.slow
@pytest.mark.parametrize(("scan_layers", "remat"), [(False, True), (True, False), (True, True)])
def test_scan_and_remat_give_the_same_numbers_and_gradients(odd, scan_layers, remat):
    params, tokens = odd

    def loss(model, tree):
        return jnp.mean(jax.nn.log_softmax(logits_of(model, tree, tokens))[..., 0])

    expected, slopes = jax.jit(jax.value_and_grad(partial(loss, Llama(ODD))))(params)
    variant = Llama(ODD, scan_layers=scan_layers, remat=remat)
    tree = stack_layers(params) if scan_layers else params
    found, found_slopes = jax.jit(jax.value_and_grad(partial(loss, variant)))(tree)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found_slopes = unstack_layers(found_slopes) if scan_layers else found_slopes
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), found_slopes, slopes)


def test_scanned_init_has_the_tree_of_stacked_layers(odd):
    params, tokens = odd
    scanned = jax.jit(Llama(ODD, scan_layers=True).init)(jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, stack_layers(params))
    kernels = scanned["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_stack_and_unstack_are_inverse(odd):
    params, _ = odd
    back = unstack_layers(stack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(ValueError, match="no `layers`"):
        unstack_layers(params)
    with pytest.raises(ValueError, match="no layers_0"):
        stack_layers(stack_layers(params))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cache_gives_what_the_full_forward_gives(odd, scan_layers):
    params, tokens = odd
    expected = logits_of(Llama(ODD), params, tokens)
    model = Llama(ODD, scan_layers=scan_layers)
    tree = stack_layers(params) if scan_layers else params
    cache, parts, position = init_cache(ODD, 2, 13, scan_layers=scan_layers), [], 0
    for length in (4, 3, 1, 1, 2):  # a prefill in two pieces, then decoding; slots 11 and 12 stay unused
        logits, cache = logits_of(model, tree, tokens[:, position : position + length], cache, jnp.int32(position))
        parts.append(logits)
        position += length
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=2e-5, rtol=0)
    leaf = jax.tree.leaves(cache)[0]
    assert leaf.shape == ((2,) if scan_layers else ()) + (2, 3, 13, 10)
    assert not np.any(np.asarray(leaf)[..., 11:, :])


def test_stale_slots_behind_the_position_do_not_matter(odd):
    params, tokens = odd
    model = Llama(ODD)
    dirty = jax.tree.map(lambda leaf: leaf + 1e3, init_cache(ODD, 2, 16))
    clean, _ = logits_of(model, params, tokens, init_cache(ODD, 2, 16), 0)
    found, _ = logits_of(model, params, tokens, dirty, 0)
    np.testing.assert_array_equal(found, clean)


def test_a_later_token_does_not_change_earlier_logits(odd):
    params, tokens = odd
    other = tokens.copy()
    other[:, 7] = (other[:, 7] + 1) % ODD.vocab_size
    before, after = (np.asarray(logits_of(Llama(ODD), params, t)) for t in (tokens, other))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=-1).min() > 1e-4


def test_bfloat16_compute(books):
    tokens = GOLDEN["books/tokens"]
    exact = np.asarray(logits_of(Llama(books.config), books.params, tokens))
    for params in (books.params, books_llama(jnp.bfloat16).params):
        rounded = logits_of(Llama(books.config, dtype=jnp.bfloat16), params, tokens)
        assert rounded.dtype == jnp.float32
        error = np.sqrt(np.mean((np.asarray(rounded) - exact) ** 2) / np.var(exact))
        assert 1e-4 < error < 0.02
    _, cache = logits_of(
        Llama(books.config, dtype=jnp.bfloat16), books.params, tokens, init_cache(books.config, 1, 16, jnp.bfloat16), 0
    )
    assert cache["layers_3"]["value"].dtype == jnp.bfloat16


def test_bfloat16_parameters_in_float32_are_the_stored_numbers(books):
    narrow = books_llama(jnp.bfloat16)
    tokens = GOLDEN["books/tokens"]
    np.testing.assert_array_equal(
        logits_of(Llama(books.config), narrow.params, tokens), logits_of(Llama(books.config), books.params, tokens)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strict_promotion(odd, dtype):
    params, tokens = odd
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        model = Llama(ODD, dtype=dtype)
        logits, _ = logits_of(model, params, tokens, init_cache(ODD, 2, 11, dtype), 0)
    assert logits.dtype == jnp.float32


def test_wrong_inputs_are_named(odd):
    params, tokens = odd
    model = Llama(ODD)
    with pytest.raises(ValueError, match=r"`tokens` must be integers"):
        logits_of(model, params, tokens[0])
    with pytest.raises(ValueError, match=r"`tokens` must be integers"):
        logits_of(model, params, tokens.astype(np.float32))
    with pytest.raises(ValueError, match=r"exceed the `cache` of 8"):
        logits_of(model, params, tokens, init_cache(ODD, 2, 8), 0)
    with pytest.raises(ValueError, match=r"`position` 6 \+ 11 tokens exceed the `cache` of 16"):
        model.apply({"params": params}, tokens, init_cache(ODD, 2, 16), 6)
    with pytest.raises(ValueError, match=r"scan_layers=False"):
        logits_of(model, params, tokens, init_cache(ODD, 2, 16, scan_layers=True), 0)
    with pytest.raises(ValueError, match="`length` must be at least 1"):
        init_cache(ODD, 1, 0)
