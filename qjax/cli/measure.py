"""The measurements that `eval` and `demo` print."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from qjax.cli.shared import Model
from qjax.core import QTensor
from qjax.evaluation import divergence, perplexity_of, token_losses, tree_bytes
from qjax.evaluation.text import padded_batches
from qjax.models import Decoder, Llama, generate, init_cache, prepacked, speculate
from qjax.policy import Policy
from qjax.runtime import quantized, quantized_cache

PROMPT_TOKENS, NEW_TOKENS = 16, 64
SPEED_NOTE = f"decode speed: one prompt of up to {PROMPT_TOKENS} tokens, up to {NEW_TOKENS} new ones, greedy"


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    Attributes:
      losses: (N, T - 1) nats a token.
      kl: (N, T - 1) nats against the reference; None of the reference itself.
      agrees: (N, T - 1) whether the likeliest token is that of the reference; None of the reference itself.
    """

    losses: np.ndarray
    kl: np.ndarray | None
    agrees: np.ndarray | None

    @property
    def numbers(self) -> dict[str, float | None]:
        """The means, for a table or JSON."""
        return {
            "perplexity": perplexity_of(self.losses),
            "kl": None if self.kl is None else float(np.mean(self.kl, dtype=np.float64)),
            "top1_agreement": None if self.agrees is None else float(np.mean(self.agrees)),
        }


def score(
    models: Sequence[Model], rows: np.ndarray, batch_size: int, reference: bool, advance: Callable[[int, int], Any]
) -> list[Score]:
    """Scores models on the same windows; each batch goes through every model once.

    Args:
      models: the models.
      rows: (N, T) windows of tokens.
      batch_size: windows at a time.
      reference: the first model is what the others are compared with.
      advance: called with the number of windows that are done, of all, over all models.

    Returns:
      One score a model.
    """
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in models]
    done, total = 0, len(rows) * len(models)
    for batch, count in padded_batches(rows, batch_size):
        first = None
        for model, mine in zip(models, parts, strict=True):
            logits = model.forward(model.params, batch)
            values = [token_losses(_given, logits, batch, len(batch))]
            if first is not None:
                moved = divergence(_given, first, _given, logits, batch, len(batch))
                values += [moved.kl, moved.agrees]
            first = logits if first is None and reference else first
            mine.append(tuple(value[:count] for value in values))
            done += count
            advance(done, total)
    whole = [[np.concatenate(part) for part in zip(*mine, strict=True)] for mine in parts]
    return [Score(*values) if len(values) == 3 else Score(values[0], None, None) for values in whole]


def _given(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """A model for the functions of `qjax.evaluation` whose parameters are the logits."""
    return logits


def decode_speed(model: Model, ids: np.ndarray) -> float | None:
    """Tokens a second of greedy decoding from the first of `ids`; None if the context is too short to tell."""
    context = model.config.max_position_embeddings
    prompt = ids[: max(1, min(PROMPT_TOKENS, context // 4))]
    new = min(NEW_TOKENS, context - len(prompt))
    return run(laid_out(model), prompt, new).tokens_per_second


def laid_out(model: Model, kernel: str | None = None, donate: bool = False) -> Model:
    """A packed model with its weights as the kernels that decode read them; a float one as it is."""
    if model.document is None:
        return model
    plain = Llama(model.config)
    params = prepacked(plain, model.params, donate=donate, kernel=kernel)
    apply = model.apply if kernel is None else quantized(plain.apply, kernel=kernel)
    return dataclasses.replace(model, params=params, apply=apply)


def run(model: Model, ids: Any, new_tokens: int, *, kv_cache: Policy | None = None, **options: Any) -> Any:
    """Generates from one prompt, or a list of them; the programs are compiled once for each length. `kv_cache` packs keys and values."""
    context, apply = model.config.max_position_embeddings, model.apply
    if kv_cache is not None and model.document is None:  # that of a packed model takes a packed cache as it is
        apply = quantized(apply)
    rows = ids if np.ndim(ids[0]) else [ids]
    cache = partial(cache_of, model, cache_length(model, max(map(len, rows)) + new_tokens), kv_cache)
    return generate(apply, model.params, [np.asarray(row) for row in rows], new_tokens, init_cache=cache, context_length=context, **options)


def run_drafted(model: Model, draft: Model, ids: Sequence[Sequence[int]], new_tokens: int, draft_tokens: int, **options: Any) -> Any:
    """Generates as `run` does, with `draft` to propose what `model` checks."""
    context = min(one.config.max_position_embeddings for one in (model, draft))
    whole, fast = (Decoder(one.apply, one.params, partial(init_cache, one.config)) for one in (model, draft))
    rows = [np.asarray(row) for row in ids]
    return speculate(whole, fast, rows, new_tokens, context_length=context, draft_tokens=draft_tokens, **options)


def cache_length(model: Model, tokens: int) -> int:
    """Tokens that the cache of so many has room for: lengths are rounded up, so that near ones share a program."""
    return min(model.config.max_position_embeddings, -(-tokens // 256) * 256)


def cache_of(model: Model, length: int, kv_cache: Policy | None, batch: int = 1, _: int = 0) -> Any:
    """An empty cache of keys and values, packed if there is a policy for it."""
    empty = init_cache(model.config, batch, length)
    if kv_cache is None:
        return empty
    pack = quantized_cache(model.apply, kv_cache)
    return pack(model.params, np.zeros((batch, 1), np.int32), empty, np.int32(0))


def packed_leaves(params: Any) -> Iterator[QTensor]:
    """The packed leaves of a tree."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))
    return (leaf for leaf in leaves if isinstance(leaf, QTensor))


def sizes(model: Model) -> dict[str, Any]:
    """Bits a weight of what is packed (of everything, in a float model), bytes on disk, bytes in memory."""
    packed = list(packed_leaves(model.params))
    leaves = packed or jax.tree.leaves(model.params)
    bits = sum(leaf.nbytes for leaf in leaves) * 8 / sum(leaf.size for leaf in leaves)
    return {"bits_per_weight": bits, "disk_bytes": model.disk_bytes, "memory_bytes": tree_bytes(model.params)}
