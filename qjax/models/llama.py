"""Llama in Flax Linen: RMSNorm, rotary positions, grouped heads, SwiGLU, with the cache as explicit data.

The parameter tree keeps Hugging Face's names; linear kernels are (in, out):

  embed_tokens/embedding (V, D)
  layers_0/self_attn/{q,k,v,o}_proj/kernel       layers_0/mlp/{gate,up,down}_proj/kernel
  layers_0/{input,post_attention}_layernorm/scale    norm/scale    lm_head/kernel (untied only)

With `scan_layers` the blocks are one, `layers/...`, with a leading axis of L on every leaf, and so is the cache.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from qjax.formats.llama_config import LlamaConfig as LlamaConfig
from qjax.formats.llama_config import RopeScaling as RopeScaling
from qjax.runtime.attention import attend as attend
from qjax.runtime.attention import cached_attention

Cache = dict[str, dict[str, jax.Array]]

_KERNEL_INIT = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """Root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * scale, computed in float32.

    Attributes:
      epsilon: added to the mean square.
      dtype: of the result.
      param_dtype: of `scale` when initialised.

    Source: Zhang and Sennrich 2019. transformers rounds the normalised x to `dtype` before the product with scale; here
    the product is in float32 and there is one rounding, which in bfloat16 is closer to the exact value.
    """

    epsilon: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x (..., D) over its last axis."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        normalised = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
        return (normalised * scale).astype(self.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped heads: query head i reads key/value head i // (heads / kv_heads).

    Attributes:
      config: sizes.
      dtype: of the products; the softmax is in float32.
      param_dtype: of the parameters when initialised.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rotary: jax.Array, position: jax.Array, cache: dict[str, jax.Array] | None) -> Any:
        """Maps x (B, T, D) to ((B, T, D), updated cache or None); `rotary` is (2, T, head_dim / 2)."""
        config, (batch, length, _) = self.config, x.shape
        kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        linear = partial(_linear, use_bias=config.attention_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        q = linear(config.num_attention_heads * config.head_dim, name="q_proj")(x)
        k = linear(kv_heads * config.head_dim, name="k_proj")(x)
        v = linear(kv_heads * config.head_dim, name="v_proj")(x)
        q = rotate(q.reshape(batch, length, kv_heads, group, config.head_dim).transpose(0, 2, 3, 1, 4), rotary)
        k = rotate(k.reshape(batch, length, kv_heads, config.head_dim).transpose(0, 2, 1, 3), rotary)
        v = v.reshape(batch, length, kv_heads, config.head_dim).transpose(0, 2, 1, 3)
        if cache is not None:
            cache = {"key": _write(cache["key"], k, position), "value": _write(cache["value"], v, position)}
            mixed = cached_attention(q, cache["key"], cache["value"], position)
        else:
            mixed = attend(q, k, v, position)
        mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)
        return linear(config.hidden_size, name="o_proj")(mixed), cache


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)).

    Attributes:
      config: sizes.
      dtype: of the products.
      param_dtype: of the parameters when initialised.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (B, T, D) to (B, T, D)."""
        config = self.config
        linear = partial(_linear, use_bias=config.mlp_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        gate = linear(config.intermediate_size, name="gate_proj")(x)
        up = linear(config.intermediate_size, name="up_proj")(x)
        return linear(config.hidden_size, name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      config: sizes.
      dtype: of the products and of the residual stream.
      param_dtype: of the parameters when initialised.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, cache: dict[str, jax.Array] | None, rotary: jax.Array, position: jax.Array) -> Any:
        """Maps x (B, T, D) to ((B, T, D), updated cache or None)."""
        settings: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(RMSNorm, self.config.rms_norm_eps, **settings)
        attention = Attention(self.config, name="self_attn", **settings)
        mixed, cache = attention(norm(name="input_layernorm")(x), rotary, position, cache)
        x = x + mixed
        x = x + MLP(self.config, name="mlp", **settings)(norm(name="post_attention_layernorm")(x))
        return x, cache


class Llama(nn.Module):
    """Llama language model; a plain function of parameters, tokens and cache.

    Attributes:
      config: sizes and constants.
      dtype: in which is computed (float32 or bfloat16). Norms, softmax, rotations and logits are float32 in any case.
      param_dtype: of the parameters when initialised; parameters handed to `apply` keep their own.
      scan_layers: one compiled block for all layers, parameters and cache stacked (see `stack_layers`).
      remat: recompute each block in the backward pass instead of keeping its activations.

    Example:
      >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
      ...                      num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=16)
      >>> model = Llama(config)
      >>> tokens = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> model.apply(variables, tokens).shape
      (2, 3, 64)

    Source: Touvron et al. 2023, in the layout of transformers' `LlamaForCausalLM`.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, cache: Cache | None = None, position: int | jax.Array = 0) -> Any:
        """Gives the logits of the next token at every position.

        Args:
          tokens: (B, T) int32.
          cache: keys and values of earlier positions, from `init_cache`; None for a whole text at once.
          position: index of the first of the T tokens in the text, an integer or a scalar array. With a cache,
            position + T must not exceed its length (checked unless `position` is traced).

        Returns:
          Logits (B, T, V) float32; with a cache (logits, updated cache).

        Raises:
          ValueError: tokens of another rank or dtype, a cache that is too short or of the other layout.
        """
        _check_inputs(tokens, cache, position, self.scan_layers)
        config, settings = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        start = jnp.asarray(position, jnp.int32)
        rotary = rotary_table(config, start + jnp.arange(tokens.shape[1], dtype=jnp.int32))
        embed = nn.Embed(
            config.vocab_size, config.hidden_size, embedding_init=_KERNEL_INIT, name="embed_tokens", **settings
        )
        x, cache = self._blocks(embed(tokens), cache, rotary, start)
        x = RMSNorm(config.rms_norm_eps, name="norm", **settings)(x)
        wide = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        if config.tie_word_embeddings:
            logits = wide(x, embed.embedding.astype(self.dtype), (((2,), (1,)), ((), ())))
        else:
            logits = _linear(config.vocab_size, use_bias=False, dot_general=wide, name="lm_head", **settings)(x)
        return logits if cache is None else (logits, cache)

    def _blocks(self, x: jax.Array, cache: Cache | None, rotary: jax.Array, position: jax.Array) -> Any:
        block = nn.remat(Block, prevent_cse=not self.scan_layers) if self.remat else Block
        arguments = (self.config, self.dtype, self.param_dtype)
        if self.scan_layers:
            axes: Any = (0, nn.broadcast, nn.broadcast)  # of cache, rotary and position
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=axes,
                length=self.config.num_hidden_layers,
            )(*arguments, name="layers")
            x, layers = scanned(x, None if cache is None else cache["layers"], rotary, position)
            return x, None if cache is None else {"layers": layers}
        updated: Cache = {}
        for i in range(self.config.num_hidden_layers):
            name = f"layers_{i}"
            x, layer = block(*arguments, name=name)(x, None if cache is None else cache[name], rotary, position)
            updated[name] = layer
        return x, None if cache is None else updated


def init_cache(
    config: LlamaConfig, batch: int, length: int, dtype: Any = jnp.float32, scan_layers: bool = False
) -> Cache:
    """Makes an empty key/value cache, to be passed to `Llama.apply` and taken back updated.

    Args:
      config: sizes.
      batch: B.
      length: S, the positions it can hold.
      dtype: in which keys and values are kept.
      scan_layers: the layout of a model with `scan_layers`.

    Returns:
      {"layers_0": {"key": (B, kv_heads, S, head_dim), "value": the same}, ...}, all zeros; with `scan_layers`
      {"layers": {"key": (L, B, kv_heads, S, head_dim), ...}}.

    Raises:
      ValueError: `batch` or `length` below 1.
    """
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, not {value}: give the size of the cache")
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    if scan_layers:
        shape = (config.num_hidden_layers, *shape)
        return {"layers": {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}}
    layers = [f"layers_{i}" for i in range(config.num_hidden_layers)]
    return {name: {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)} for name in layers}


def stack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Turns layers_0, layers_1, ... of parameters or of a cache into one `layers` with a leading axis of L.

    Args:
      tree: parameters or cache of a model without `scan_layers`.

    Returns:
      The same numbers for a model with `scan_layers`.

    Raises:
      ValueError: there is no `layers_0`.
    """
    names = _layer_names(tree)
    if not names:
        raise ValueError(
            f"`tree` has no layers_0 but {sorted(tree)}: pass the parameters of a model without scan_layers"
        )
    rest = {name: value for name, value in tree.items() if name not in names}
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[name] for name in names))}


def unstack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Turns one `layers` with a leading axis of L into layers_0, layers_1, ...; the inverse of `stack_layers`.

    Args:
      tree: parameters or cache of a model with `scan_layers`.

    Returns:
      The same numbers for a model without.

    Raises:
      ValueError: there is no `layers`.
    """
    if "layers" not in tree:
        raise ValueError(f"`tree` has no `layers` but {sorted(tree)}: pass the parameters of a model with scan_layers")
    count = jax.tree.leaves(tree["layers"])[0].shape[0]
    rest = {name: value for name, value in tree.items() if name != "layers"}
    return rest | {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(count)}


def rotary_table(config: LlamaConfig, positions: jax.Array) -> jax.Array:
    """Cosines and sines of the rotary angles: angle[t, j] = positions[t] * theta^(-2 j / head_dim).

    Args:
      config: head width, base and scaling.
      positions: (T,) int32.

    Returns:
      (2, T, head_dim / 2) float32: cosines, sines.

    Source: Su et al. 2021; the scaling of Llama 3.1 as in transformers' `_compute_llama3_parameters`.
    """
    frequencies = jnp.asarray(_frequencies(config))
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: jax.Array, rotary: jax.Array) -> jax.Array:
    """Rotates the pairs (x[j], x[j + head_dim / 2]) by the angle of their position, in float32.

    Args:
      x: (..., T, head_dim).
      rotary: (2, T, head_dim / 2), from `rotary_table`.

    Returns:
      The shape and dtype of x.

    Source: transformers' `rotate_half` layout, for which the stored q and k weights are permuted.
    """
    cosine, sine = rotary.reshape(2, *(1,) * (x.ndim - 2), *rotary.shape[1:])
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _linear(features: int, **settings: Any) -> nn.Dense:
    return nn.Dense(features, kernel_init=_KERNEL_INIT, **settings)


def _write(cached: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), position, axis=2)


def _frequencies(config: LlamaConfig) -> np.ndarray:
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies, scaling = config.rope_theta**-exponents, config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    # turns over the original context: few turns (slow) are divided by `factor`, many are kept, between them a ramp
    turns = frequencies * scaling.original_max_position_embeddings / (2 * np.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    return (frequencies * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def _layer_names(tree: Mapping[str, Any]) -> list[str]:
    names = []
    while f"layers_{len(names)}" in tree:
        names.append(f"layers_{len(names)}")
    return names


def _check_inputs(tokens: jax.Array, cache: Cache | None, position: int | jax.Array, scan_layers: bool) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"`tokens` must be integers of shape (batch, time), not {tokens.dtype}{tokens.shape}: reshape it"
        )
    if cache is None:
        return
    if ("layers" in cache) != scan_layers:
        raise ValueError(f"`cache` has keys {sorted(cache)}: make it with init_cache(..., scan_layers={scan_layers})")
    held = jax.tree.leaves(cache)[0].shape[-2]
    first = 0 if isinstance(position, Tracer) else int(position)
    if not 0 <= first <= held - tokens.shape[1]:
        raise ValueError(f"`position` {first} + {tokens.shape[1]} tokens exceed the `cache` of {held}: make it longer")
