"""The families in Flax Linen; their decoder is the one that the package ships."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.families.shared import (
    CHANNELS,
    CLASSES,
    EXPERTS,
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    TIME,
    VOCAB,
    WIDER,
    WIDTH,
    attend,
    causal,
    dispatched_experts,
    heads,
    rotate,
    sorted_experts,
)  # fmt: skip


class EncoderLayer(nn.Module):
    """Norms behind the residual, heads as axes of the kernels."""

    dtype: Any

    @nn.compact
    def __call__(self, x, visible):
        make = partial(nn.DenseGeneral, dtype=self.dtype)
        q, k, v = (make((HEADS, HEAD), name=name)(x) for name in ("query", "key", "value"))
        mixed = make(WIDTH, axis=(-2, -1), name="output")(attend(q, k, v, visible))
        x = nn.LayerNorm(dtype=self.dtype, name="norm1")(x + mixed)
        h = nn.gelu(nn.Dense(HIDDEN, dtype=self.dtype, name="wide")(x), approximate=False)
        return nn.LayerNorm(dtype=self.dtype, name="norm2")(x + nn.Dense(WIDTH, dtype=self.dtype, name="narrow")(h))


class Encoder(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, mask):
        embed = partial(nn.Embed, features=WIDTH, dtype=self.dtype)
        x = embed(VOCAB, name="tokens")(tokens) + embed(2 * TIME, name="positions")(jnp.arange(tokens.shape[1]))[None]
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        for i in range(2):
            x = EncoderLayer(self.dtype, name=f"layer{i}")(x, mask[:, None, None, :])
        return nn.Dense(CLASSES, dtype=self.dtype, name="head")(jnp.tanh(nn.Dense(WIDTH, dtype=self.dtype, name="pool")(x[:, 0])))


class ResidualBlock(nn.Module):
    features: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        conv = partial(nn.Conv, self.features, use_bias=False)
        y = nn.relu(norm(name="norm1")(conv((3, 3), strides=self.stride, name="conv1")(x)))
        y = norm(name="norm2")(conv((3, 3), feature_group_count=self.groups, name="conv2")(y))
        if self.stride > 1:
            x = norm(name="norm")(conv((1, 1), strides=self.stride, name="shortcut")(x))
        return nn.relu(x + y)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(nn.Conv(CHANNELS, (3, 3), name="stem")(images)))
        x = ResidualBlock(CHANNELS, 1, CHANNELS, name="block0")(x)
        x = ResidualBlock(WIDER, 2, 3, name="block1")(x)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Experts(nn.Module):
    """A router and its experts behind a norm."""

    sorted: bool
    count: int = EXPERTS

    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm(name="norm")(x)
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        gate, up = (self.param(name, init, (self.count, WIDTH, HIDDEN)) for name in ("gate", "up"))
        down = self.param("down", init, (self.count, HIDDEN, WIDTH))
        rows = h.reshape(-1, WIDTH)
        logits = nn.Dense(self.count, use_bias=False, name="router")(rows)
        run = sorted_experts if self.sorted else dispatched_experts
        return x + run(rows, logits, gate, up, down).reshape(x.shape)


class ExpertModel(nn.Module):
    sorted: bool
    count: int = EXPERTS

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
        x = Experts(self.sorted, self.count, name="layer")(x)
        return nn.Dense(VOCAB, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


class Layer(nn.Module):
    """One layer of the scanned decoder."""

    dtype: Any

    @nn.compact
    def __call__(self, x, _):
        linear = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        h = nn.RMSNorm(dtype=self.dtype, name="norm1")(x)
        q, k, v = (heads(linear(n * HEAD, name=name)(h), n) for name, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
        x = x + linear(WIDTH, name="o")(attend(rotate(q), rotate(k), v, causal(x.shape[1])).reshape(x.shape))
        h = nn.RMSNorm(dtype=self.dtype, name="norm2")(x)
        return x + linear(WIDTH, name="down")(nn.silu(linear(HIDDEN, name="gate")(h)) * linear(HIDDEN, name="up")(h)), None


class Scanned(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, dtype=self.dtype, name="embed")
        layers = nn.scan(nn.remat(Layer, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = layers(self.dtype, name="layers")(embed(tokens), None)
        return embed.attend(nn.RMSNorm(dtype=self.dtype, name="norm")(x))


def made(model, *inputs):
    """(function, parameters) of a module."""
    return model.apply, jax.jit(model.init)(jax.random.key(0), *inputs)
