"""Generation of text by any model that takes and returns a cache: one jitted prefill, one jitted decode step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Apply = Callable[..., tuple[jax.Array, Any]]

_CACHE_STEP = 64  # cache lengths are rounded up to this, so that prompts of near lengths share one decode program


@dataclass(frozen=True)
class Generation:
    """Tokens and the time they took.

    Attributes:
      tokens: (B, T + n) int32, prompts and what follows; n is below `max_new_tokens` if every row ended.
      first_token_seconds: prefill and the first sampled token; holds the compilation when a shape is new.
      second_token_seconds: the first decode step, likewise; 0 if there is none.
      tokens_per_second: tokens of all rows per second over the decode steps after the first; None below two steps.
    """

    tokens: np.ndarray
    first_token_seconds: float
    second_token_seconds: float
    tokens_per_second: float | None


def generate(
    apply: Apply,
    params: Any,
    tokens: Any,
    max_new_tokens: int,
    *,
    init_cache: Callable[[int, int], Any],
    context_length: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
    eos_ids: tuple[int, ...] = (),
    on_token: Callable[[np.ndarray], None] | None = None,
) -> Generation:
    """Continues prompts token by token: greedy, or sampled from softmax(logits / temperature) over the top k.

    Args:
      apply: `apply(params, tokens (B, T), cache, position) -> (logits (B, T, V), cache)`, for example
        `Llama(config).apply` or the quantized form of it. Compiled programs are kept for the same `apply` object.
      params: its first argument, passed through.
      tokens: (B, T) prompts of one length, integers.
      max_new_tokens: n, at least 1.
      init_cache: `init_cache(batch, length)` gives an empty cache, for example `functools.partial(init_cache, config)`.
      context_length: the positions the model was made for; T + n must not exceed it.
      temperature: 0 is greedy.
      top_k: sample among the k likeliest only; None is all.
      key: random key, needed when `temperature` is above 0.
      eos_ids: a row that gave one of these is continued with it; generation stops when every row has.
      on_token: called with each new (B,) tokens as they come, for streaming; it costs a wait a step.

    Returns:
      Tokens and timings.

    Raises:
      ValueError: an argument out of range, or a prompt and new tokens that exceed the context.

    Example:
      >>> from functools import partial
      >>> from qjax.models.llama import Llama, LlamaConfig, init_cache
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
      ...                      num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=16)
      >>> model, prompt = Llama(config), jnp.ones((1, 3), jnp.int32)
      >>> variables = model.init(jax.random.key(0), prompt)
      >>> generate(model.apply, variables, prompt, 5, init_cache=partial(init_cache, config),
      ...          context_length=16).tokens.shape
      (1, 8)
    """
    prompt = _checked_prompt(tokens, max_new_tokens, context_length)
    how = _Sampling(_checked_temperature(temperature, key) == 0.0, _checked_top_k(top_k), tuple(eos_ids))
    batch, length = prompt.shape
    chance = (jax.random.key(0) if key is None else key, jnp.float32(temperature))
    cache = init_cache(batch, min(context_length, -(-(length + max_new_tokens) // _CACHE_STEP) * _CACHE_STEP))
    ended = jnp.zeros((batch,), bool)
    marks = [time.perf_counter()]
    token, ended, cache = _prefill(params, cache, prompt, ended, chance, apply=apply, how=how)
    new = [token]
    marks.append(_mark(token))
    for position in range(length, length + max_new_tokens - 1):
        if on_token is not None:
            on_token(np.asarray(token))
        if eos_ids and bool(ended.all()):
            break
        token, ended, cache = _decode(params, cache, token, ended, jnp.int32(position), chance, apply=apply, how=how)
        new.append(token)
        if len(new) == 2:  # this step holds the compilation of all that follow
            marks.append(_mark(token))
    else:
        if on_token is not None:
            on_token(np.asarray(token))
    marks.append(_mark(token))
    return _generation(prompt, new, marks)


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array, greedy: bool, top_k: int | None) -> jax.Array:
    """Draws a token from softmax(logits / temperature), restricted to the k largest; greedy takes the largest.

    Args:
      logits: (B, V) float32.
      key: random key.
      temperature: positive scalar, unused when greedy.
      greedy: take the argmax (the first of equals).
      top_k: number of candidates, None for all. Equals at the k-th place are decided by index.

    Returns:
      (B,) int32.

    Raises:
      ValueError: `top_k` above the size of the vocabulary.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k is None:
        return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)
    if top_k > logits.shape[-1]:
        raise ValueError(f"`top_k` {top_k} exceeds the vocabulary of {logits.shape[-1]}: give less, or None")
    values, candidates = jax.lax.top_k(logits, top_k)
    choice = jax.random.categorical(key, values / temperature, axis=-1)
    return jnp.take_along_axis(candidates, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


@dataclass(frozen=True)
class _Sampling:
    greedy: bool
    top_k: int | None
    eos_ids: tuple[int, ...]


@partial(jax.jit, static_argnames=("apply", "how"), donate_argnames=("cache",))
def _prefill(params, cache, prompt, ended, chance, *, apply, how):
    logits, cache = apply(params, prompt, cache, jnp.int32(0))
    return *_choose(logits, prompt[:, -1], ended, prompt.shape[1] - 1, chance, how), cache


@partial(jax.jit, static_argnames=("apply", "how"), donate_argnames=("cache",))
def _decode(params, cache, token, ended, position, chance, *, apply, how):
    logits, cache = apply(params, token[:, None], cache, position)
    return *_choose(logits, token, ended, position, chance, how), cache


def _choose(logits, previous, ended, position, chance, how):
    key, temperature = chance
    token = sample(logits[:, -1], jax.random.fold_in(key, position), temperature, how.greedy, how.top_k)
    if not how.eos_ids:
        return token, ended
    token = jnp.where(ended, previous, token)
    return token, ended | jnp.isin(token, jnp.asarray(how.eos_ids, jnp.int32))


def _checked_prompt(tokens: Any, max_new_tokens: int, context_length: int) -> jax.Array:
    prompt = np.asarray(tokens)
    if prompt.ndim != 2 or 0 in prompt.shape or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(f"`tokens` must be integers of shape (batch, time), not {prompt.dtype}{prompt.shape}")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, not {max_new_tokens}")
    if prompt.shape[1] + max_new_tokens > context_length:
        raise ValueError(
            f"`tokens` of length {prompt.shape[1]} and `max_new_tokens` {max_new_tokens} exceed the context of "
            f"{context_length}: shorten the prompt or ask for at most {max(context_length - prompt.shape[1], 0)} tokens"
        )
    return jnp.asarray(prompt, jnp.int32)


def _checked_temperature(temperature: float, key: jax.Array | None) -> float:
    if not 0.0 <= temperature < np.inf:
        raise ValueError(f"`temperature` must be 0 (greedy) or a positive number, not {temperature}")
    if temperature > 0.0 and key is None:
        raise ValueError(
            f"`key` is needed for `temperature` {temperature}: pass jax.random.key(seed), or temperature=0"
        )
    return temperature


def _checked_top_k(top_k: int | None) -> int | None:
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, not {top_k}: give None for all tokens")
    return top_k


def _mark(token: jax.Array) -> float:
    jax.block_until_ready(token)
    return time.perf_counter()


def _generation(prompt: jax.Array, new: list[jax.Array], marks: list[float]) -> Generation:
    tokens = np.concatenate([np.asarray(prompt), np.stack([np.asarray(token) for token in new], axis=1)], axis=1)
    steady = len(new) - 2
    rate = prompt.shape[0] * steady / (marks[-1] - marks[-2]) if steady > 0 else None
    return Generation(tokens, marks[1] - marks[0], marks[2] - marks[1], rate)
