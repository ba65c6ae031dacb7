"""`qjax.generate`: a model, packed or float parameters, prompts; everything else follows from the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.models.generate import Generation
from qjax.models.generate import generate as decode
from qjax.models.llama import Llama
from qjax.models.llama import init_cache as llama_cache
from qjax.models.speculative import Decoder, speculate
from qjax.policy import Policy
from qjax.runtime import prepack, quantized, quantized_cache


def generate(
    model: Any,
    params: Any,
    prompts: Any,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_ids: tuple[int, ...] | None = None,
    on_token: Callable[[Any], Any] | None = None,
    kv_cache: Policy | None = None,
    init_cache: Callable[[int, int], Any] | None = None,
    context_length: int | None = None,
    draft: Any = None,
    draft_tokens: int = 4,
    kernel: str | None = None,
    device: Any = None,
) -> Generation:
    """Continues prompts, with one compiled program for what all prompts share and one for each step after it.

    With a draft, a step proposes several tokens by it and checks them in one pass of the model: the tokens are the model's own, or
    distributed as its own, see `qjax.models.speculate`; `.acceptance` of the result says how often the draft was right.

    Args:
      model: a `qjax.models.Llama`, or anything with an `apply(params, tokens (B, T), cache, position) -> (logits (B, T, V), cache)`.
      params: its parameters, `QTensor` leaves where they are packed. Lay them out once with `qjax.models.prepacked(model, params)`.
      prompts: (B, T) integers, or a sequence of prompts of any lengths.
      max_new_tokens: at most so many for each.
      temperature: 0 takes the likeliest token.
      top_k: among the k likeliest; None is all.
      top_p: and among the fewest of them that together have this probability; None is all.
      seed: of the random numbers; the same seed and batch give the same tokens.
      eos_ids: tokens that end a row; None for those of `model.config`, () for none.
      on_token: called with each new (B,) tokens; True from it ends the generation.
      kv_cache: a policy with rules for caches, as in `qjax.quantized_cache`; None keeps keys and values float.
      init_cache: `init_cache(batch, length)` gives an empty cache; None for that of a `Llama`.
      context_length: of the model; None for that of `model.config`.
      draft: parameters of the same model that run faster, such as its packed ones, laid out, or (model, params) of a `Llama` with its
        vocabulary.
      draft_tokens: how many tokens a step proposes.
      kernel: as for `qjax.quantized`.
      device: as for `qjax.quantized`.

    Returns:
      A `Generation`; `.new` holds a row of new tokens for each prompt.

    Raises:
      TypeError: `model` has no `apply`; an argument of another type.
      ValueError: an argument out of range; prompts and new tokens that exceed the context; a model that does not say how its cache
        begins; a draft with another vocabulary, or beside a packed cache, which keeps what it takes back only rounded.

    Example:
      >>> import qjax
      >>> from qjax.models import Llama, LlamaConfig
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
      ...                      num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=16)
      >>> model, prompts = Llama(config), [[5, 9, 2], [7, 1]]
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 3), jnp.int32))
      >>> [row.shape for row in generate(model, params, prompts, 4).new]
      [(4,), (4,)]
      >>> policy = qjax.Policy([qjax.Rule("*embed*", weight=None), qjax.Rule("*", weight=qjax.int8())])
      >>> packed = qjax.quantize(model.apply, params, policy, calibration=[jnp.ones((1, 3), jnp.int32)]).params
      >>> generate(model, params, prompts, 4, draft=packed, draft_tokens=2).tokens.shape
      (2, 7)
    """
    if not callable(getattr(model, "apply", None)):
        raise TypeError(f"`model` must have an `apply(params, tokens, cache, position)`, got {type(model).__name__}")
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None) if context_length is None else context_length
    cache = _llama_cache(model) if init_cache is None else init_cache
    if cache is None or context is None:
        name = "init_cache" if cache is None else "context_length"
        raise ValueError(f"`{name}` is needed: {type(model).__name__} has no configuration that says it")
    positions = getattr(config, "max_position_embeddings", context)
    if context_length is not None and context_length > positions:
        raise ValueError(f"`context_length` {context_length} exceeds the {positions} positions that the model was made for: leave it out, "
                         "or give a model whose config.max_position_embeddings says more")  # fmt: skip
    apply = _applied(model, kernel, device)
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "key": jax.random.key(seed),
        "eos_ids": tuple(getattr(config, "eos_token_ids", ())) if eos_ids is None else eos_ids,
        "on_token": on_token,
    }
    if draft is not None:
        if kv_cache is not None:
            raise ValueError("`kv_cache` with `draft`: a packed cache keeps what it takes back only rounded, so the tokens would not be "
                             "those of the model alone; leave one of them out")  # fmt: skip
        whole = Decoder(apply, params, cache)
        other, context = _draft(draft, whole, context, kernel, device)
        return speculate(whole, other, prompts, max_new_tokens, context_length=context, draft_tokens=draft_tokens, **options)
    init = cache if kv_cache is None else _packed_cache(model, params, cache, kv_cache)
    size = getattr(config, "vocab_size", None)
    return decode(apply, params, prompts, max_new_tokens, init_cache=init, context_length=context, vocab_size=size, **options)


def prepacked(
    model: Any, params: Any, *, donate: bool = False, fuse: bool = False, kernel: str | None = None, device: Any = None
) -> Any:
    """Lays packed parameters out for the kernels that decode one token, see `qjax.prepack`.

    Args:
      model: a `Llama`.
      params: its parameters.
      donate: free the old codes.
      fuse: one product for q, k and v, and one for gate and up, see `qjax.prepack`.
      kernel: as for `qjax.quantized`.
      device: as for `qjax.quantized`.

    Returns:
      The parameters.
    """
    cache = jax.eval_shape(lambda: _llama_cache(model)(1, 64))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    return prepack(model.apply, kernel=kernel, device=device, donate=donate, fuse=fuse)(params, token, cache, position)


def _draft(draft: Any, whole: Decoder, context: int, kernel: str | None, device: Any) -> tuple[Decoder, int]:
    """The draft, and the context that both have."""
    if not (isinstance(draft, tuple) and len(draft) == 2 and callable(getattr(draft[0], "apply", None))):
        return whole._replace(params=draft), context
    model, params = draft
    cache = _llama_cache(model)
    if cache is None:
        raise ValueError(f"`draft` must be parameters of the model, or a `Llama` and its parameters, got a {type(model).__name__}, whose "
                         "cache is not known: call qjax.models.speculate")  # fmt: skip
    return Decoder(_applied(model, kernel, device), params, cache), min(context, model.config.max_position_embeddings)


@functools.lru_cache(maxsize=16)
def _applied(model: Any, kernel: str | None, device: Any) -> Callable[..., Any]:
    """One function for equal models, so that programs are compiled once."""
    return quantized(model.apply, kernel=kernel, device=device)


def _llama_cache(model: Any) -> Any:
    if not isinstance(model, Llama):
        return None
    return functools.partial(llama_cache, model.config, dtype=model.dtype, scan_layers=model.scan_layers)


def _packed_cache(model: Any, params: Any, cache: Callable[[int, int], Any], policy: Policy) -> Callable[[int, int], Any]:
    def empty(batch: int, length: int) -> Any:
        tokens = jnp.zeros((batch, 1), jnp.int32)
        return quantized_cache(model.apply, policy)(params, tokens, cache(batch, length), jnp.int32(0))

    return empty
