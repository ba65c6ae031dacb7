"""Perplexity: how surprised a model is by a text it did not see."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.evaluation.text import checked_windows, padded_batches

Apply = Callable[[Any, jax.Array], jax.Array]


def perplexity(apply: Apply, params: Any, tokens: Any, batch_size: int = 8) -> float:
    """Perplexity over windows of tokens: exp(mean over all predicted tokens of -log p(token | those before it)).

    Args:
      apply: `apply(params, tokens (B, T) int32) -> logits (B, T, V)`.
      params: its first argument, passed through.
      tokens: (N, T) windows, see `qjax.evaluation.windows`; the first token of each is not predicted.
      batch_size: windows at a time; logits are never held for more.

    Returns:
      The perplexity; NaN if the model gives NaN.

    Raises:
      ValueError: windows of another form, or logits of another shape than (B, T, V) with V above every token.

    Example:
      >>> even = lambda params, tokens: jnp.zeros((*tokens.shape, 8))
      >>> print(round(perplexity(even, None, np.arange(6).reshape(2, 3)), 4))
      8.0

    Source: the protocol of transformers' "Perplexity of fixed-length models", with windows that do not overlap.
    """
    return perplexity_of(token_losses(apply, params, tokens, batch_size))


def perplexity_of(losses: Any) -> float:
    """Perplexity from the losses of tokens: exp(mean(losses)), the mean in float64.

    Args:
      losses: nats a token, any shape, see `token_losses`.

    Returns:
      The perplexity.
    """
    return float(np.exp(np.mean(np.asarray(losses, np.float64))))


def token_losses(apply: Apply, params: Any, tokens: Any, batch_size: int = 8) -> np.ndarray:
    """Loss of every predicted token: logsumexp(logits[t]) - logits[t][token[t + 1]], in float32.

    The program is compiled once for the same `apply` object; pass the same one again to use it again.

    Args:
      apply: see `perplexity`.
      params: see `perplexity`.
      tokens: (N, T) windows.
      batch_size: windows at a time.

    Returns:
      (N, T - 1) float32, in nats.

    Raises:
      ValueError: see `perplexity`.
    """
    rows = checked_windows(tokens)
    losses = []
    for batch, count in padded_batches(rows, batch_size):
        values, vocabulary = _losses(params, jnp.asarray(batch), apply=apply)
        check_vocabulary(int(vocabulary), rows)
        losses.append(np.asarray(values)[:count])
    return np.concatenate(losses)


def check_logits(logits: jax.Array, tokens: jax.Array) -> None:
    """Refuses logits that do not belong to the tokens.

    Args:
      logits: what a model gave.
      tokens: (B, T), what it was given.

    Raises:
      ValueError: the logits are not (B, T, V).
    """
    if not isinstance(logits, jax.Array) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        shape = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(
            f"`apply` must give logits of shape {(*tokens.shape, 'V')}, not {shape}: wrap it so that it does"
        )


def check_vocabulary(size: int, tokens: np.ndarray) -> None:
    """Refuses token ids that the logits have no place for (a gather would clamp them in silence).

    Args:
      size: V.
      tokens: ids.

    Raises:
      ValueError: an id of V or more.
    """
    largest = int(tokens.max())
    if largest >= size:
        raise ValueError(
            f"`tokens` hold the id {largest} but the logits have {size} entries: use the model's own tokenizer"
        )


@partial(jax.jit, static_argnames=("apply",))
def _losses(params, tokens, *, apply):
    logits = apply(params, tokens)
    check_logits(logits, tokens)
    predicted = logits[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(predicted, tokens[:, 1:, None], axis=-1)[..., 0]
    # By hand: jax.nn.logsumexp keeps a sign and an infinity mask, which costs three times the time on a CPU.
    largest = jnp.max(predicted, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(predicted - largest), axis=-1)
    return jnp.log(total) + largest[..., 0] - chosen, jnp.int32(logits.shape[-1])
