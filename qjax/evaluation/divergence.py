"""How far a model's predictions moved from another's: Kullback-Leibler divergence and agreement of the first choice."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.evaluation.perplexity import check_logits
from qjax.evaluation.text import checked_windows, padded_batches

Apply = Callable[[Any, jax.Array], jax.Array]


@dataclass(frozen=True)
class Divergence:
    """Divergence of every scored token.

    Attributes:
      kl: (N, T - 1) float32, nats.
      agrees: (N, T - 1) bool, whether both models put the same token first.
    """

    kl: np.ndarray
    agrees: np.ndarray

    @property
    def mean_kl(self) -> float:
        """Mean over all tokens, nats a token."""
        return float(np.mean(self.kl, dtype=np.float64))

    @property
    def top1_agreement(self) -> float:
        """Share of the tokens where the first choices agree, 0 to 1."""
        return float(np.mean(self.agrees, dtype=np.float64))


def divergence(
    reference: Apply, reference_params: Any, apply: Apply, params: Any, tokens: Any, batch_size: int = 8
) -> Divergence:
    """Compares two models on windows of tokens, at the positions that perplexity scores.

    Args:
      reference: `reference(reference_params, tokens (B, T)) -> logits (B, T, V)`, the float model.
      reference_params: its first argument.
      apply: the other model, of the same form.
      params: its first argument.
      tokens: (N, T) windows; the last position of each predicts nothing in the window and is not scored.
      batch_size: windows at a time; logits are never held for more.

    Returns:
      Divergence of every token, with its means.

    Raises:
      ValueError: windows of another form, or logits of different or wrong shapes.

    Example:
      >>> model = lambda scale, tokens: scale * jax.nn.one_hot(tokens, 4)
      >>> divergence(model, 1.0, model, 1.0, np.zeros((1, 3), int)).mean_kl
      0.0
    """
    rows = checked_windows(tokens)
    parts = []
    for batch, count in padded_batches(rows, batch_size):
        kl, agrees = _compare(reference_params, params, jnp.asarray(batch), reference=reference, apply=apply)
        parts.append((np.asarray(kl)[:count], np.asarray(agrees)[:count]))
    return Divergence(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def token_divergence(reference_logits: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(p || q) = sum over the vocabulary of p log(p / q), and whether argmax p = argmax q; in float32.

    The sum is taken as p (expm1(d) - d) with d = log q - log p (as q - p - p d where |d| > 1): the same number, because
    p and q both sum to 1, but every term is non-negative and second order in d, so small divergences are not drowned by
    the rounding of the normalisation, as they are in sum p d.

    Args:
      reference_logits: (..., V) of p.
      logits: (..., V) of q.

    Returns:
      (...) float32 nats, and (...) bool.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> kl, agrees = token_divergence(jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.25, 0.75])))
      >>> print(round(float(kl), 5), bool(agrees))  # log(2) - log(3) / 2, and equals go to the first
      0.14384 False
    """
    if reference_logits.shape != logits.shape:
        raise ValueError(
            f"`logits` of shape {logits.shape} cannot be compared with {reference_logits.shape}: give equal ones"
        )
    log_p = jax.nn.log_softmax(reference_logits.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_q - log_p
    near = jnp.clip(d, -1.0, 1.0)  # the branch not taken must not overflow: its gradient would be NaN
    far = jnp.where(p > 0, d, 0.0)
    terms = jnp.where(jnp.abs(d) <= 1, p * (jnp.expm1(near) - near), q - p - p * far)
    agrees = jnp.argmax(reference_logits, axis=-1) == jnp.argmax(logits, axis=-1)
    return jnp.sum(terms, axis=-1), agrees


@partial(jax.jit, static_argnames=("reference", "apply"))
def _compare(reference_params, params, tokens, *, reference, apply):
    both = reference(reference_params, tokens), apply(params, tokens)
    for logits in both:
        check_logits(logits, tokens)
    return token_divergence(both[0][:, :-1], both[1][:, :-1])
