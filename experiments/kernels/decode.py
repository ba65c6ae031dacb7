"""One step of decoding of a model of seven billion weights, one row, through the Hopper kernels: part `decode` of h200.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from qjax_kernels.gpu.tiles import Tiles
from qjax_kernels.gpu.weight_only import weight_only_matmul

GROUP = 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder of today's kind: 32 layers of 4096, hidden 14336, 32 heads that share 8 of keys and values."""

    layers: int = 32
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    shared: int = 8
    words: int = 32000
    context: int = 512

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    def products(self) -> dict[str, tuple[int, int]]:
        """N and K of the four products of a layer."""
        both = (self.heads + 2 * self.shared) * self.head
        return {
            "qkv": (both, self.width),
            "out": (self.width, self.width),
            "up": (2 * self.hidden, self.width),
            "down": (self.width, self.hidden),
        }


def parameters(shape: Shape, kind: str) -> dict[str, Any]:
    """Random weights: bf16, int8 or int4 with a scale for 128; embedding and head stay bfloat16.

    Args:
      shape: of the model.
      kind: "bf16", "int8" or "int4".

    Returns:
      A dictionary of layers, embedding and head.
    """

    def weight(key, n, k):
        if kind == "bf16":
            return (jax.random.normal(key, (n, k), jnp.bfloat16) * k**-0.5,)
        top, unit = (8, 4.6) if kind == "int4" else (128, 74.0)
        codes = jax.random.randint(key, (n, k), -top, top, jnp.int8).astype(jnp.int4 if kind == "int4" else jnp.int8)
        return codes, jnp.full((n, k // GROUP), k**-0.5 / unit, jnp.bfloat16)

    make = jax.jit(weight, static_argnums=(1, 2))
    keys = iter(jax.random.split(jax.random.key(0), 4 * shape.layers + 2))
    layers = [{name: make(next(keys), n, k) for name, (n, k) in shape.products().items()} for _ in range(shape.layers)]
    flat = jax.jit(lambda key: jax.random.normal(key, (shape.words, shape.width), jnp.bfloat16) * shape.width**-0.5)
    return {"layers": layers, "embedding": flat(next(keys)), "head": flat(next(keys))}


def product(tiles: Callable[[int, int], Tiles | None]) -> Callable:
    """x times a weight in whichever form it has; `tiles` of N and K."""

    def times(x, w):
        if len(w) == 1:
            return jnp.einsum("mk,nk->mn", x, w[0])
        return weight_only_matmul(x, *w, group_size=GROUP, tiles=tiles(*w[0].shape) if w[0].dtype == jnp.int4 else None)

    return times


def normed(x):
    """x over its root mean square."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype)


def step(shape: Shape, times: Callable) -> Callable:
    """The program of a step: of weights, keys and values, a token and its place: the next token, keys and values."""
    per = shape.heads // shape.shared

    def attended(qkv, cache, place):
        q, k, v = jnp.split(qkv.reshape(-1, shape.head), (shape.heads, shape.heads + shape.shared))
        keys = jax.lax.dynamic_update_slice(cache[0], k[None], (place, 0, 0))
        values = jax.lax.dynamic_update_slice(cache[1], v[None], (place, 0, 0))
        scores = jnp.einsum("gqd,tgd->gqt", q.reshape(shape.shared, per, -1), keys, preferred_element_type=jnp.float32) * shape.head**-0.5
        scores = jnp.where(jnp.arange(shape.context) <= place, scores, -jnp.inf)
        mixed = jnp.einsum("gqt,tgd->gqd", jax.nn.softmax(scores).astype(qkv.dtype), values)
        return mixed.reshape(1, -1), (keys, values)

    def run(weights, caches, token, place):
        x = weights["embedding"][token][None]
        kept = []
        for layer, cache in zip(weights["layers"], caches, strict=True):
            mixed, cache = attended(times(normed(x), layer["qkv"])[0], cache, place)
            kept.append(cache)
            x = x + times(mixed, layer["out"])
            gate, up = jnp.split(times(normed(x), layer["up"]), 2, axis=1)
            x = x + times(jax.nn.silu(gate) * up, layer["down"])
        scores = jnp.einsum("mk,nk->mn", normed(x), weights["head"])
        return jnp.argmax(scores[0]).astype(jnp.int32), kept

    return run


def empty_caches(shape: Shape) -> list:
    """Keys and values of every layer."""
    size = (shape.context, shape.shared, shape.head)
    return [(jnp.zeros(size, jnp.bfloat16), jnp.zeros(size, jnp.bfloat16)) for _ in range(shape.layers)]
