"""Speculative decoding: a fast draft proposes tokens, the model checks them in one pass, and what comes out is the model's own."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.generate import (
    CACHE_STEP,
    Apply,
    Generation,
    check_count,
    check_vocabulary,
    checked_prompt,
    checked_sampling,
    log_chances,
    mark,
    sample,
    until_end,
)


class Decoder(NamedTuple):
    """A model as `speculate` takes it.

    Attributes:
      apply: `apply(params, tokens (B, T), cache, position) -> (logits (B, T, V), cache)`, causal, into whose cache a token is written
        at its position and read from there on: so a position that goes back takes tokens back. A recurrent state cannot be such a cache.
      params: its first argument.
      init_cache: `init_cache(batch, length)` gives an empty cache.
    """

    apply: Apply
    params: Any
    init_cache: Callable[[int, int], Any]


def speculate(
    model: Decoder,
    draft: Decoder,
    tokens: Any,
    max_new_tokens: int,
    *,
    context_length: int,
    draft_tokens: int = 4,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_ids: tuple[int, ...] = (),
    on_token: Callable[[np.ndarray], Any] | None = None,
) -> Generation:
    """Continues prompts as `generate` does with `model` alone, in fewer passes of it: `draft` proposes what it checks.

    A step is one program: the draft decodes g tokens, one after another, from its distributions q; the model reads them in one pass, which
    gives its distributions p; token i is accepted with probability min(1, p_i / q_i), see `accept`. What is kept is distributed as if drawn
    from p, and greedily it is the argmax of p, whatever the draft is: a bad one only costs time. Each row goes on from as many
    tokens as it accepted; the caches are rolled back by writing at its own position. Prompts of different lengths are read side by side,
    short ones padded behind their end, where nothing looks before it is written anew.

    Args:
      model: whose tokens are wanted.
      draft: the same model in fewer bits, or a smaller one with the same vocabulary.
      tokens: as for `generate`.
      max_new_tokens: as for `generate`.
      context_length: of both; caches hold `draft_tokens` more, for what is proposed beyond the end.
      draft_tokens: g, at least 1. More pay where the draft is much faster and mostly right.
      temperature: as for `generate`, of both.
      top_k: as for `generate`, of both.
      top_p: as for `generate`, of both.
      key: as for `generate`.
      eos_ids: as for `generate`.
      on_token: as for `generate`: called with each new (B,) tokens once all rows have theirs, so several times after a step. Rows that
        ended repeat their last token.

    Returns:
      Tokens and timings, with `drafted` and `accepted`. Rows that end sooner than others are continued with their last token.

    Raises:
      TypeError: as `generate`; `model` or `draft` is no `Decoder`.
      ValueError: as `generate`; two vocabularies; tokens outside of them; a cache without an axis for the batch, for several prompts.

    Example:
      >>> from qjax.models.llama import Llama, LlamaConfig, init_cache
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
      ...                      num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=16)
      >>> model, prompt = Llama(config), jnp.ones((1, 3), jnp.int32)
      >>> whole = Decoder(model.apply, model.init(jax.random.key(0), prompt), partial(init_cache, config))
      >>> found = speculate(whole, whole, prompt, 5, context_length=16, draft_tokens=2)
      >>> found.tokens.shape, found.acceptance
      ((1, 8), 1.0)

    Source: Leviathan, Kalman, Matias 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318). Passes of different lengths
    may round differently: greedy tokens differ from those of `generate` where two logits are that close.
    """
    for name, one in (("model", model), ("draft", draft)):
        if not isinstance(one, Decoder):
            raise TypeError(f"`{name}` must be a qjax.models.Decoder(apply, params, init_cache), got {type(one).__name__}")
    check_count("draft_tokens", draft_tokens)
    prompt, lengths = checked_prompt(tokens, max_new_tokens, context_length)
    how, chance = checked_sampling(temperature, top_k, top_p, key, eos_ids)
    how, ends = replace(how, eos_ids=()), how.eos_ids  # rows end on the host, which no program need be compiled for
    both, batch = (model, draft), len(prompt)
    length = -(-(prompt.shape[1] + max_new_tokens + draft_tokens) // CACHE_STEP) * CACHE_STEP
    axes = tuple(_batch_axes(one.init_cache, length) if batch > 1 else () for one in both)
    caches, params = tuple(one.init_cache(batch, length) for one in both), tuple(one.params for one in both)
    _check_vocabularies(both, prompt)
    applies = tuple(one.apply for one in both)
    rows = _Rows(prompt, lengths, max_new_tokens, ends, on_token)
    marks, counts = [time.perf_counter()], []
    token, caches = _prefill(params, caches, jnp.asarray(prompt), jnp.asarray(lengths), chance, applies=applies, how=how)
    stop = rows.take(np.asarray(token)[:, None], np.ones(batch, np.int32))
    marks.append(time.perf_counter())
    drafted = accepted = 0
    while not stop and rows.live.any():
        last, position, live = rows.last, rows.position, rows.live
        turn = jnp.int32(len(counts) + 1)
        new, taken, caches = _step(params, caches, last, position, chance, turn, applies=applies, how=how, axes=axes, count=draft_tokens)
        found = np.asarray(taken)
        drafted, accepted = drafted + draft_tokens * int(live.sum()), accepted + int(found[live].sum())
        before = rows.kept
        stop = rows.take(np.asarray(new), np.where(live, found + 1, 0))
        counts.append(rows.kept - before)
        if len(counts) == 1:  # this step holds the compilation of all that follow
            marks.append(time.perf_counter())
    marks.append(mark(token))
    rate = sum(counts[1:]) / (marks[-1] - marks[-2]) if len(counts) > 1 else None
    return Generation(rows.array(), marks[1] - marks[0], marks[2] - marks[1], rate, rows.new(), drafted, accepted)


def accept(drafted: jax.Array, q: jax.Array, p: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decides which drafted tokens are kept, and draws the one that follows them.

    Token i is kept with probability min(1, p_i(token) / q_i(token)) if all before it were. The first that is not is drawn anew from
    max(0, p_i - q_i), normalized; where all are kept, one more is drawn from p_g.

    Args:
      drafted: (B, g) int32, token i drawn from q_i.
      q: (B, g, V) float32, logarithms of the draft's probabilities.
      p: (B, g + 1, V) float32, logarithms of the model's.
      key: random key.

    Returns:
      Tokens (B, g + 1) int32, of which the first a + 1 count, and a (B,) int32, how many drafted ones were kept.

    Example:
      >>> certain = jnp.log(jnp.eye(3))  # a draft that is always right
      >>> tokens, kept = accept(jnp.array([[0, 1]]), certain[None, :2], certain[None], jax.random.key(0))
      >>> tokens.tolist(), kept.tolist()
      ([[0, 1, 2]], [2])

    Source: Leviathan et al. 2023, algorithm 1 and appendix A.1, which proves that each token that counts is distributed as p.
    """
    count = drafted.shape[1]
    first, second = jax.random.split(key)
    ratio = _of_tokens(p[:, :-1], drafted) - _of_tokens(q, drafted)
    keep = jnp.log(jax.random.uniform(first, drafted.shape)) < ratio  # u < 1, so what both hold equally likely is always kept
    taken = jnp.sum(jnp.cumprod(keep.astype(jnp.int32), axis=1), axis=1)
    none = jnp.full((len(q), 1, q.shape[-1]), -jnp.inf, q.dtype)  # nobody drafts behind the last: all of p is left
    here = taken[:, None, None]
    mine, its = (jnp.take_along_axis(x, here, axis=1)[:, 0] for x in (p, jnp.concatenate([q, none], axis=1)))
    rest = jnp.maximum(jnp.exp(mine) - jnp.exp(its), 0.0)
    # Nothing is left only where p and q are the same but for their rounding.
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, jnp.log(rest), mine)
    after = jax.random.categorical(second, rest, axis=-1).astype(jnp.int32)
    places = jnp.arange(count + 1, dtype=jnp.int32)[None, :]
    padded = jnp.pad(drafted, ((0, 0), (0, 1)))
    return jnp.where(places == taken[:, None], after[:, None], padded), taken


def _of_tokens(logs: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]


def accept_greedy(drafted: jax.Array, best: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `accept`, where the model takes the likeliest token: (B, g) drafted and (B, g + 1) that the model wants."""
    same = (drafted == best[:, :-1]).astype(jnp.int32)
    return best, jnp.sum(jnp.cumprod(same, axis=1), axis=1)  # what counts is the model's in any case


@partial(jax.jit, static_argnames=("applies", "how"), donate_argnames=("caches",))
def _prefill(params, caches, prompts, lengths, chance, *, applies, how):
    """Reads the prompts with both; the model's first token (B,)."""
    key, temperature, top_p = chance
    logits, cache = applies[0](params[0], prompts, caches[0], jnp.int32(0))
    _, other = applies[1](params[1], prompts, caches[1], jnp.int32(0))
    last = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return sample(last, jax.random.fold_in(key, 0), temperature, how.greedy, how.top_k, top_p), (cache, other)


@partial(jax.jit, static_argnames=("applies", "how", "axes", "count"), donate_argnames=("caches",))
def _step(params, caches, last, position, chance, turn, *, applies, how, axes, count):
    """Drafts and checks. `last` (B, 2) are the tokens at `position` (B,) - 1 and there; the latter is in no cache yet."""
    key, temperature, top_p = chance
    keys = jax.random.split(jax.random.fold_in(key, turn), count + 1)
    model, draft = (_each_row(apply, axis) for apply, axis in zip(applies, axes, strict=True))

    def choose(logits: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if how.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
        q = log_chances(logits, temperature, how.top_k, top_p)
        return jax.random.categorical(key, q, axis=-1).astype(jnp.int32), q

    def one(carry, key):
        token, cache, at = carry
        logits, cache = draft(params[1], token[:, None], cache, at)
        token, q = choose(logits[:, -1], key)
        return (token, cache, at + 1), (token, q)

    # The draft reads two tokens: where all of its last ones were accepted, the last of those is not in its cache.
    logits, cache = draft(params[1], last, caches[1], position - 1)
    first = choose(logits[:, -1], keys[1])
    (_, other, _), rest = jax.lax.scan(one, (first[0], cache, position + 1), keys[2:])
    drafted, q = jax.tree.map(lambda a, b: jnp.moveaxis(jnp.concatenate([a[None], b]), 0, 1), first, rest)
    logits, cache = model(params[0], jnp.concatenate([last[:, 1:], drafted], axis=1), caches[0], position)
    if how.greedy:
        new, taken = accept_greedy(drafted, jnp.argmax(logits, axis=-1).astype(jnp.int32))
    else:
        new, taken = accept(drafted, q, log_chances(logits, temperature, how.top_k, top_p), keys[0])
    return new, taken, (cache, other)


def _each_row(apply: Apply, axes: tuple[int, ...]) -> Apply:
    """`apply` with a position (B,) of each row's own; `axes`: that of the batch, of each leaf of a cache, for more than one row."""

    def call(params: Any, tokens: jax.Array, cache: Any, position: jax.Array) -> Any:
        if len(tokens) == 1:
            return apply(params, tokens, cache, position[0])
        leaves, tree = jax.tree.flatten(cache)

        def row(tokens: jax.Array, leaves: list[jax.Array], position: jax.Array) -> Any:
            wide = [jnp.expand_dims(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)]
            logits, cache = apply(params, tokens[None], jax.tree.unflatten(tree, wide), position)
            return logits[0], [jnp.squeeze(leaf, axis) for leaf, axis in zip(jax.tree.leaves(cache), axes, strict=True)]

        logits, leaves = jax.vmap(row, (0, list(axes), 0), (0, list(axes)))(tokens, leaves, position)
        return logits, jax.tree.unflatten(tree, leaves)

    return call


def _batch_axes(init_cache: Callable[[int, int], Any], length: int) -> tuple[int, ...]:
    """Of each leaf of a cache the axis that the batch changes."""
    two, three = (jax.tree.leaves(jax.eval_shape(lambda n=n: init_cache(n, length))) for n in (2, 3))
    axes = []
    for a, b in zip(two, three, strict=True):
        moved = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        if len(moved) != 1:
            raise ValueError(f"`init_cache` gives an array of shape {a.shape} without one axis for the batch: "
                             "several rows cannot be rolled back each for itself; give one prompt at a time")  # fmt: skip
        axes.append(moved[0])
    return tuple(axes)


def _check_vocabularies(both: tuple[Decoder, Decoder], prompt: np.ndarray) -> None:
    token, place = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    sizes = []
    for one in both:
        cache = jax.eval_shape(partial(one.init_cache, 1, CACHE_STEP))
        sizes.append(jax.eval_shape(one.apply, one.params, token, cache, place)[0].shape[-1])
    if sizes[0] != sizes[1]:
        raise ValueError(f"`draft` has a vocabulary of {sizes[1]} and the model one of {sizes[0]}: "
                         "a draft must have the model's tokens")  # fmt: skip
    check_vocabulary(prompt, sizes[0])


@dataclass
class _Rows:
    """The tokens of all rows as they come, on the host: what is done with them depends on what they are."""

    prompt: np.ndarray
    lengths: np.ndarray
    most: int
    eos_ids: tuple[int, ...]
    on_token: Callable[[np.ndarray], Any] | None

    def __post_init__(self) -> None:
        self.rows = [row[:length].tolist() for row, length in zip(self.prompt, self.lengths, strict=True)]
        self.live = np.ones(len(self.rows), bool)
        self.shown = int(self.lengths.min())

    @property
    def kept(self) -> int:
        """How many new tokens there are."""
        return sum(map(len, self.rows)) - int(self.lengths.sum())

    @property
    def last(self) -> np.ndarray:
        """The last two tokens of each row (B, 2)."""
        return np.asarray([row[-2:] for row in self.rows], np.int32)

    @property
    def position(self) -> np.ndarray:
        """Of the last token of each row (B,)."""
        return np.asarray([len(row) - 1 for row in self.rows], np.int32)

    def take(self, new: np.ndarray, counts: np.ndarray) -> bool:
        """Adds the first `counts` of each row's new tokens, up to its end; whether `on_token` wants no more."""
        for i, (row, tokens, count) in enumerate(zip(self.rows, new, counts, strict=True)):
            room = int(self.lengths[i]) + self.most - len(row)
            kept = until_end(tokens[: min(int(count), room)], self.eos_ids)
            row += kept.tolist()
            ended = len(kept) > 0 and int(kept[-1]) in self.eos_ids
            self.live[i] &= not ended and len(kept) < room
        return self._show()

    def _show(self) -> bool:
        """Shows what is complete; after a stop nothing else was ever there."""
        running = [len(row) for row, live in zip(self.rows, self.live, strict=True) if live]
        whole = min(running) if running else max(map(len, self.rows))
        while self.on_token is not None and self.shown < whole:
            self.shown += 1
            if self.on_token(np.asarray([row[min(self.shown, len(row)) - 1] for row in self.rows], np.int32)):
                self.rows = [row[: self.shown] for row in self.rows]
                return True
        return False

    def array(self) -> np.ndarray:
        """All rows (B, T), short ones continued with their last token."""
        width = max(map(len, self.rows))
        return np.stack([np.pad(np.asarray(row, np.int32), (0, width - len(row)), mode="edge") for row in self.rows])

    def new(self) -> tuple[np.ndarray, ...]:
        """What follows each prompt."""
        return tuple(np.asarray(row[length:], np.int32) for row, length in zip(self.rows, self.lengths, strict=True))
