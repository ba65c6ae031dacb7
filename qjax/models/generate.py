"""Generation of text by any model that takes and returns a cache: one jitted prefill, one jitted decode step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import check_key

Apply = Callable[..., tuple[jax.Array, Any]]

CACHE_STEP = 64  # cache lengths are rounded up to this, so that prompts of near lengths share one decode program


@dataclass(frozen=True)
class Generation:
    """Tokens and the time they took.

    Attributes:
      tokens: (B, T + n) int32, prompts and what follows; n is below `max_new_tokens` if every row ended.
      first_token_seconds: prefill and the first sampled token; holds the compilation when a shape is new.
      second_token_seconds: the first decode step, likewise; 0 if there is none.
      tokens_per_second: tokens of all rows per second over the decode steps after the first; None below two steps.
      new: of each row what follows its own prompt, up to the first of `eos_ids` and with it. Prompts of different lengths are in
        `tokens` as they come, so a short one's row goes on behind these.
      drafted: tokens that a draft proposed, in rows that still ran; None without a draft, see `qjax.models.speculate`.
      accepted: how many of them the model took.
    """

    tokens: np.ndarray
    first_token_seconds: float
    second_token_seconds: float
    tokens_per_second: float | None
    new: tuple[np.ndarray, ...] = ()
    drafted: int | None = None
    accepted: int | None = None

    @property
    def acceptance(self) -> float | None:
        """The share of a draft's tokens that the model took; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted and self.accepted is not None else None


def generate(
    apply: Apply,
    params: Any,
    tokens: Any,
    max_new_tokens: int,
    *,
    init_cache: Callable[[int, int], Any],
    context_length: int,
    vocab_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_ids: tuple[int, ...] = (),
    on_token: Callable[[np.ndarray], Any] | None = None,
) -> Generation:
    """Continues prompts token by token: greedy, or sampled from softmax(logits / temperature) over the top k and the top p of them.

    Prompts of different lengths run side by side: what all have is read at once, and the rest of a longer one a token a step, while
    the shorter ones are continued. Nothing is padded.

    Args:
      apply: `apply(params, tokens (B, T), cache, position) -> (logits (B, T, V), cache)`, for example
        `Llama(config).apply` or the quantized form of it. Compiled programs are kept for the same `apply` object.
      params: its first argument, passed through.
      tokens: (B, T) prompts of one length, integers; or a sequence of B prompts of any lengths, T the longest.
      max_new_tokens: n, at least 1.
      init_cache: `init_cache(batch, length)` gives an empty cache, for example `functools.partial(init_cache, config)`.
      context_length: the positions the model was made for; T + n must not exceed it.
      vocab_size: of the model, so that prompts of another tokenizer are refused and not read as its last token; None asks nothing.
      temperature: 0 is greedy.
      top_k: sample among the k likeliest only; None is all.
      top_p: and among the fewest likeliest that together have this probability; None is all.
      key: random key, needed when `temperature` is above 0.
      eos_ids: a row that gave one of these is continued with it; generation stops when every row has.
      on_token: called with each new (B,) tokens as they come, for streaming; it costs a wait a step. True from it ends the generation.

    Returns:
      Tokens and timings.

    Raises:
      TypeError: an argument of another type.
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
    prompt, lengths = checked_prompt(tokens, max_new_tokens, context_length)
    if vocab_size is not None:
        check_vocabulary(prompt, vocab_size)
    how, chance = checked_sampling(temperature, top_k, top_p, key, eos_ids)
    (batch, longest), shortest = prompt.shape, int(lengths.min())
    cache = init_cache(batch, min(context_length, -(-(longest + max_new_tokens) // CACHE_STEP) * CACHE_STEP))
    ended = jnp.zeros((batch,), bool)
    marks = [time.perf_counter()]
    ragged = None if shortest == longest else (jnp.asarray(prompt), jnp.asarray(lengths))
    start = jnp.asarray(prompt[:, :shortest])
    token, ended, cache = _prefill(params, cache, start, ended, chance, ragged, apply=apply, how=how)
    new = [token]
    marks.append(mark(token))
    for position in range(shortest, longest + max_new_tokens - 1):
        if on_token is not None and on_token(np.asarray(token)):
            break
        if eos_ids and bool(ended.all()):
            break
        token, ended, cache = _decode(params, cache, token, ended, jnp.int32(position), chance, ragged, apply=apply, how=how)
        new.append(token)
        if len(new) == 2:  # this step holds the compilation of all that follow
            marks.append(mark(token))
    else:
        if on_token is not None:
            on_token(np.asarray(token))
    marks.append(mark(token))
    return _generation(prompt[:, :shortest], new, marks, lengths, max_new_tokens, how.eos_ids)


def sample(
    logits: jax.Array, key: jax.Array, temperature: jax.Array, greedy: bool, top_k: int | None, top_p: jax.Array | None = None
) -> jax.Array:
    """Draws a token from softmax(logits / temperature), restricted to the k largest and to the top p of them; greedy takes the largest.

    Args:
      logits: (B, V) float32.
      key: random key.
      temperature: positive scalar, unused when greedy.
      greedy: take the argmax (the first of equals).
      top_k: number of candidates, None for all. Equals at the k-th place are decided by index.
      top_p: float32 in (0, 1]: candidates are the fewest likeliest whose probabilities, among the top k, add up to it; None for all.

    Returns:
      (B,) int32.

    Raises:
      ValueError: `top_k` above the size of the vocabulary.

    Source: Holtzman et al. 2019 (arXiv 1904.09751) for the top p, which follows the top k and the temperature, as in transformers.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)
    values, candidates = _candidates(logits, temperature, top_k, top_p)
    choice = jax.random.categorical(key, values, axis=-1)
    return jnp.take_along_axis(candidates, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def log_chances(logits: jax.Array, temperature: jax.Array, top_k: int | None, top_p: jax.Array | None) -> jax.Array:
    """The logarithms of the probabilities that `sample` draws from, over the whole vocabulary.

    Args:
      logits: (..., V) float32.
      temperature: as for `sample`.
      top_k: as for `sample`.
      top_p: as for `sample`.

    Returns:
      (..., V) float32, minus infinity for what is never drawn.

    Raises:
      ValueError: as `sample`.

    Example:
      >>> found = log_chances(jnp.log(jnp.float32([0.2, 0.5, 0.3])), jnp.float32(1), 2, None)
      >>> [round(float(p), 3) for p in jnp.exp(found)]
      [0.0, 0.625, 0.375]
    """
    if top_k is None and top_p is None:
        return jax.nn.log_softmax(logits / temperature, axis=-1)
    values, candidates = _candidates(logits, temperature, top_k, top_p)
    kept = jnp.full(logits.shape, -jnp.inf, values.dtype)
    return jnp.put_along_axis(kept, candidates, jax.nn.log_softmax(values, axis=-1), axis=-1, inplace=False)


def _candidates(
    logits: jax.Array, temperature: jax.Array, top_k: int | None, top_p: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Logits over the temperature of the top k, minus infinity beyond the top p of them, and which tokens they are."""
    if top_k is not None and top_k > logits.shape[-1]:
        raise ValueError(f"`top_k` {top_k} exceeds the vocabulary of {logits.shape[-1]}: give less, or None")
    values, candidates = jax.lax.top_k(logits, logits.shape[-1] if top_k is None else top_k)
    values = values / temperature
    if top_p is not None:
        chances = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(chances, axis=-1) - chances  # the likeliest one has nothing before it
        values = jnp.where(before < top_p, values, -jnp.inf)
    return values, candidates


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, as far as programs are compiled for it: greedily, among how many, whether among a top p, what ends a row."""

    greedy: bool
    top_k: int | None
    top_p: bool
    eos_ids: tuple[int, ...]


Chance = tuple[jax.Array, jax.Array, jax.Array | None]  # key, temperature, top p


def checked_sampling(
    temperature: float, top_k: int | None, top_p: float | None, key: jax.Array | None, eos_ids: tuple[int, ...]
) -> tuple[Sampling, Chance]:
    """Checks the arguments of `generate` that say how tokens are chosen; what programs are compiled for, and what they are given."""
    if isinstance(eos_ids, str) or not isinstance(eos_ids, Sequence) or not all(map(_is_int, eos_ids)):
        raise TypeError(f"`eos_ids` must be a tuple of token numbers, such as (2,), not {eos_ids!r}")
    if key is not None:
        check_key("key", key)
    how = Sampling(_checked_temperature(temperature, key) == 0.0, _checked_top_k(top_k), _checked_top_p(top_p), tuple(eos_ids))
    return how, (jax.random.key(0) if key is None else key, jnp.float32(temperature), None if top_p is None else jnp.float32(top_p))


@partial(jax.jit, static_argnames=("apply", "how"), donate_argnames=("cache",))
def _prefill(params, cache, prompt, ended, chance, ragged, *, apply, how):
    logits, cache = apply(params, prompt, cache, jnp.int32(0))
    return *_choose(logits, prompt[:, -1], ended, prompt.shape[1] - 1, chance, ragged, how), cache


@partial(jax.jit, static_argnames=("apply", "how"), donate_argnames=("cache",))
def _decode(params, cache, token, ended, position, chance, ragged, *, apply, how):
    logits, cache = apply(params, token[:, None], cache, position)
    return *_choose(logits, token, ended, position, chance, ragged, how), cache


def _choose(logits, previous, ended, position, chance, ragged, how):
    key, temperature, top_p = chance
    token = sample(logits[:, -1], jax.random.fold_in(key, position), temperature, how.greedy, how.top_k, top_p)
    token = jnp.where(ended, previous, token) if how.eos_ids else token
    if ragged is None:
        return token, ended | jnp.isin(token, jnp.asarray(how.eos_ids, jnp.int32)) if how.eos_ids else ended
    prompts, lengths = ragged  # a row that is still in its prompt takes the next token from there
    inside = position + 1 < lengths
    given = jnp.take(prompts, jnp.minimum(position + 1, prompts.shape[1] - 1), axis=1)
    token = jnp.where(inside, given, token)
    return token, ended | (~inside & jnp.isin(token, jnp.asarray(how.eos_ids, jnp.int32))) if how.eos_ids else ended


def check_count(argument: str, value: Any) -> None:
    """Refuses what is no whole number above 0."""
    if not _is_int(value):
        raise TypeError(f"`{argument}` must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"`{argument}` must be at least 1, not {value}")


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.ndarray, jax.Array)) and not isinstance(value, bool)


def checked_prompt(tokens: Any, max_new_tokens: int, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts (B, T) int32, behind the end of short ones their last token, and their lengths (B,)."""
    rows = _rows(tokens)
    check_count("max_new_tokens", max_new_tokens)
    if not _is_int(context_length):
        raise TypeError(f"`context_length` must be a whole number, not {context_length!r}")
    least = min(row.min() for row in rows)
    if least < 0:
        raise ValueError(f"`tokens` must not be negative, got {least}: give prompts of different lengths as a list, without padding")
    longest = max(len(row) for row in rows)
    if longest + max_new_tokens > context_length:
        raise ValueError(
            f"`tokens` of length {longest} and `max_new_tokens` {max_new_tokens} exceed the context of "
            f"{context_length}: shorten the prompt or ask for at most {max(context_length - longest, 0)} tokens"
        )
    whole = np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in rows])
    return whole.astype(np.int32), np.asarray([len(row) for row in rows], np.int32)


def check_vocabulary(prompt: np.ndarray, size: int) -> None:
    """Refuses tokens that a model of `size` tokens does not have."""
    if prompt.max() >= size:
        raise ValueError(f"`tokens` hold {prompt.max()}, and the model has a vocabulary of {size}: they are of another tokenizer")


def _rows(tokens: Any) -> list[np.ndarray]:
    lengths = {np.shape(row) for row in tokens} if isinstance(tokens, Sequence) else set()
    if len(lengths) > 1:
        rows = [np.asarray(row) for row in tokens]
        for i, row in enumerate(rows):
            if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
                raise ValueError(f"`tokens`[{i}] must hold integers, at least one, not {row.dtype}{row.shape}")
        return rows
    prompt = np.asarray(tokens)
    if prompt.ndim != 2 or 0 in prompt.shape or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(f"`tokens` must be integers of shape (batch, time), not {prompt.dtype}{prompt.shape}")
    return list(prompt)


def _checked_top_p(top_p: float | None) -> bool:
    if top_p is not None and not (_is_number(top_p) and 0.0 < top_p <= 1.0):
        raise ValueError(f"`top_p` must be above 0 and at most 1, not {top_p!r}: give None for all tokens")
    return top_p is not None


def _checked_temperature(temperature: float, key: jax.Array | None) -> float:
    if not _is_number(temperature) or not 0.0 <= temperature < np.inf:
        raise ValueError(f"`temperature` must be 0 (greedy) or a positive number, not {temperature!r}")
    if temperature > 0.0 and key is None:
        raise ValueError(
            f"`key` is needed for `temperature` {temperature}: pass jax.random.key(seed), or temperature=0"
        )
    return temperature


def _checked_top_k(top_k: int | None) -> int | None:
    if top_k is not None and not (_is_int(top_k) and top_k >= 1):
        raise ValueError(f"`top_k` must be a whole number of at least 1, not {top_k!r}: give None for all tokens")
    return top_k


def mark(token: jax.Array) -> float:
    """The time at which tokens are there."""
    jax.block_until_ready(token)
    return time.perf_counter()


def _generation(
    start: np.ndarray, new: list[jax.Array], marks: list[float], lengths: np.ndarray, most: int, eos_ids: tuple[int, ...]
) -> Generation:
    tokens = np.concatenate([start, np.stack([np.asarray(token) for token in new], axis=1)], axis=1)
    steady = len(new) - 2
    rate = start.shape[0] * steady / (marks[-1] - marks[-2]) if steady > 0 else None
    rows = tuple(until_end(row[length : length + most], eos_ids) for row, length in zip(tokens, lengths, strict=True))
    return Generation(tokens, marks[1] - marks[0], marks[2] - marks[1], rate, rows)


def until_end(row: np.ndarray, eos_ids: tuple[int, ...]) -> np.ndarray:
    """New tokens up to the first that ends a row, and with it."""
    ends = np.flatnonzero(np.isin(row, eos_ids))
    return row[: ends[0] + 1] if len(ends) else row
