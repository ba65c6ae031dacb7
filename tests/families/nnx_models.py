"""The families in Flax NNX."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import qjax
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


class Layer(nnx.Module):
    """One layer of a decoder: grouped heads, rotary positions, a gated product."""

    def __init__(self, dtype, rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2 = (nnx.RMSNorm(WIDTH, dtype=dtype, rngs=rngs) for _ in range(2))
        self.q, self.o = linear(WIDTH, HEADS * HEAD), linear(HEADS * HEAD, WIDTH)
        self.k, self.v = linear(WIDTH, KV_HEADS * HEAD), linear(WIDTH, KV_HEADS * HEAD)
        self.gate, self.up, self.down = linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH)

    def __call__(self, x):
        h = self.norm1(x)
        q, k, v = heads(self.q(h), HEADS), heads(self.k(h), KV_HEADS), heads(self.v(h), KV_HEADS)
        x = x + self.o(attend(rotate(q), rotate(k), v, causal(x.shape[1])).reshape(x.shape))
        h = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Decoder(nnx.Module):
    """A list of layers and a tied embedding."""

    def __init__(self, rngs, dtype=jnp.float32):
        self.embed = nnx.Embed(VOCAB, WIDTH, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(dtype, rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))


class Scanned(nnx.Module):
    """The same layers as one, scanned and rematerialised."""

    def __init__(self, rngs, dtype=jnp.float32):
        self.embed = nnx.Embed(VOCAB, WIDTH, dtype=dtype, rngs=rngs)
        self.layers = nnx.vmap(lambda rngs: Layer(dtype, rngs))(rngs.split(LAYERS))
        self.norm = nnx.RMSNorm(WIDTH, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        step = nnx.scan(nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.embed.attend(self.norm(step(self.embed(tokens), self.layers)))


class SlicedByHand(Scanned):
    """The same with `jax.lax.scan` over the stacked state."""

    def __call__(self, tokens):
        graph, state = nnx.split(self.layers)
        step = jax.checkpoint(lambda x, layer: (nnx.merge(graph, layer)(x), None))
        x, _ = jax.lax.scan(step, self.embed(tokens), state)
        return self.embed.attend(self.norm(x))


class EncoderLayer(nnx.Module):
    """Norms behind the residual, heads as axes of the kernels."""

    def __init__(self, dtype, rngs):
        make = partial(nnx.LinearGeneral, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value = (make(WIDTH, (HEADS, HEAD)) for _ in range(3))
        self.output = make((HEADS, HEAD), WIDTH, axis=(-2, -1))
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs) for _ in range(2))
        self.wide, self.narrow = make(WIDTH, HIDDEN), make(HIDDEN, WIDTH)

    def __call__(self, x, visible):
        x = self.norm1(x + self.output(attend(self.query(x), self.key(x), self.value(x), visible)))
        return self.norm2(x + self.narrow(nnx.gelu(self.wide(x), approximate=False)))


class Encoder(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.tokens, self.positions = (nnx.Embed(n, WIDTH, dtype=dtype, rngs=rngs) for n in (VOCAB, 2 * TIME))
        self.norm = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(dtype, rngs) for _ in range(2)])
        self.pool, self.head = (nnx.Linear(WIDTH, n, dtype=dtype, rngs=rngs) for n in (WIDTH, CLASSES))

    def __call__(self, tokens, mask):
        x = self.norm(self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None])
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return self.head(jnp.tanh(self.pool(x[:, 0])))


class ResidualBlock(nnx.Module):
    def __init__(self, wide, features, stride, groups, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1, self.norm1 = conv(wide, features, (3, 3), strides=stride), nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = conv(features, features, (3, 3), feature_group_count=groups)
        self.norm2 = nnx.BatchNorm(features, rngs=rngs)
        shortcut = stride > 1
        self.shortcut = conv(wide, features, (1, 1), strides=stride) if shortcut else None
        self.norm = nnx.BatchNorm(features, rngs=rngs) if shortcut else None

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + (x if self.shortcut is None or self.norm is None else self.norm(self.shortcut(x))))


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.stem, self.norm = nnx.Conv(1, CHANNELS, (3, 3), rngs=rngs), nnx.BatchNorm(CHANNELS, rngs=rngs)
        self.block0 = ResidualBlock(CHANNELS, CHANNELS, 1, CHANNELS, rngs)
        self.block1 = ResidualBlock(CHANNELS, WIDER, 2, 3, rngs)
        self.head = nnx.Linear(WIDER, CLASSES, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.stem(images)))
        return self.head(self.block1(self.block0(x)).mean((1, 2)))


class ExpertModel(nnx.Module):
    def __init__(self, rngs, sorted, count=EXPERTS):
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.sorted = sorted
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.norm1, self.norm = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.router = nnx.Linear(WIDTH, count, use_bias=False, rngs=rngs)
        self.gate, self.up = (nnx.Param(init(rngs.params(), (count, WIDTH, HIDDEN))) for _ in range(2))
        self.down = nnx.Param(init(rngs.params(), (count, HIDDEN, WIDTH)))
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        rows = self.norm1(x).reshape(-1, WIDTH)
        run = sorted_experts if self.sorted else dispatched_experts
        return self.head(self.norm(x + run(rows, self.router(rows), self.gate[...], self.up[...], self.down[...]).reshape(x.shape)))


def made(model):
    """(function, parameters) of a module in evaluation mode."""
    model.eval()
    return qjax.nnx.function(model), nnx.state(model)
