"""Every family in Linen and in NNX as a function, its parameters and its data: one list for all tests."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.models import Llama
from qjax.models.llama import LlamaConfig
from tests.families import linen_models, nnx_models
from tests.families.shared import BATCH, HEAD, HEADS, HIDDEN, IMAGE, KV_HEADS, TIME, VOCAB, WIDTH

# The last part of the paths of everything that multiplies or looks up data; all else is a norm, a bias or a statistic.
WEIGHTS = ("kernel", "embedding", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A model: `fn(params, *inputs)`, and two batches of inputs."""

    name: str
    fn: Callable[..., Any]
    params: Any
    data: list[tuple[Any, ...]]


def tokens(seed):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (BATCH, TIME)), jnp.int32)


def padded(seed):
    """Tokens and which of them count."""
    lengths = np.random.default_rng(seed).integers(3, TIME + 1, BATCH)
    return tokens(seed), jnp.asarray(np.arange(TIME) < lengths[:, None])


def images(seed):
    return jnp.asarray(np.random.default_rng(seed).random((BATCH, IMAGE, IMAGE, 1)), jnp.float32)


def _shipped(dtype=jnp.float32):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD, max_position_embeddings=2 * TIME, tie_word_embeddings=True,
    )  # fmt: skip
    return Llama(config, dtype=dtype)


BF16 = jnp.bfloat16
# name -> (Linen module, NNX class with its settings, what makes a batch)
DEFINITIONS: dict[str, tuple[Any, Callable[..., Any], Callable[[int], Any]]] = {
    "decoder": (_shipped(), nnx_models.Decoder, tokens),
    "encoder": (linen_models.Encoder(), nnx_models.Encoder, padded),
    "encoder bf16": (linen_models.Encoder(BF16), functools.partial(nnx_models.Encoder, dtype=BF16), padded),
    "residual": (linen_models.ConvNet(), nnx_models.ConvNet, images),
    "experts sorted": (linen_models.ExpertModel(True), functools.partial(nnx_models.ExpertModel, sorted=True), tokens),
    "experts dispatched": (linen_models.ExpertModel(False), functools.partial(nnx_models.ExpertModel, sorted=False), tokens),
    "scanned": (linen_models.Scanned(), nnx_models.Scanned, tokens),
    "scanned bf16": (linen_models.Scanned(BF16), functools.partial(nnx_models.SlicedByHand, dtype=BF16), tokens),
}
NAMES = [f"{name}, {kind}" for name in DEFINITIONS for kind in ("linen", "nnx")]


@functools.cache
def family(name: str) -> Family:
    """Builds the family of a name such as "encoder bf16, nnx"."""
    which, _, kind = name.partition(", ")
    module, make, batch = DEFINITIONS[which]
    data = [inputs if isinstance(inputs, tuple) else (inputs,) for inputs in map(batch, range(2))]
    fn, params = linen_models.made(module, *data[0]) if kind == "linen" else nnx_models.made(make(rngs=nnx.Rngs(0)))
    return Family(name, fn, jax.tree.map(_alive, params), data)


def _alive(w):
    """Norms, biases and statistics that are neither zeros nor ones; weights as they are."""
    if w.ndim < 3 and w.size < 200 and jnp.issubdtype(w.dtype, jnp.floating):
        noise = np.random.default_rng(w.size).random(w.shape, np.float32)
        return jnp.asarray(0.9 * np.asarray(w, np.float32) + 0.2 * noise, w.dtype)
    return w
