"""One step of decoding of a model of seven billion weights, one row, through the Hopper kernels: part `decode` of h200.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from qjax_kernels.gpu.attention import Attention, Past, fresh, kept, rotated, rotation
from qjax_kernels.gpu.chain import chain, counters, interleaved
from qjax_kernels.gpu.chain_shape import Link
from qjax_kernels.gpu.tiles import Direct, Tiles
from qjax_kernels.gpu.weight_only import weight_only_matmul

GROUP = 128
EPSILON = 1e-5  # of the norms


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

    @property
    def attention(self) -> Attention:
        """Its heads."""
        return Attention(self.heads, self.shared, self.head)

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


def product(tiles: Callable[[int, int], Tiles | Direct | None]) -> Callable:
    """x times a weight in whichever form it has, and a row that is added to it; `tiles` of N and K."""

    def times(x, w, added=None, norm=None):
        if len(w) == 1:
            y = jnp.einsum("mk,nk->mn", x, w[0])
            return y if added is None else y + added
        if added is not None and added.shape[0] != 1:
            raise ValueError(f"`added` must be a single row, which is then a bias; it has {added.shape[0]}")
        bias = None if added is None else added[0]
        chosen = tiles(*w[0].shape) if w[0].dtype == jnp.int4 else None
        return weight_only_matmul(x, *w, group_size=GROUP, bias=bias, norm=norm, tiles=chosen)

    return times


def inverse(x):
    """One over the root mean square of a row: the products take the row as it is, and it scales what they give."""
    wide = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(wide * wide) + EPSILON)


def attended(shape: Shape, qkv, scale, cache, place, turned):
    """A row of attention as jax writes it, and keys and values with this token's: the same for products of every kind.

    Products are sums of elementwise products, so that what goes before them, rotations too, is computed in them.
    """
    per = shape.heads // shape.shared
    q, k, v = jnp.split(qkv, [shape.width, shape.width + shape.shared * shape.head], axis=1)
    k = rotated(k.reshape(1, shape.shared, shape.head), turned) * scale
    row = jnp.stack([k, v.astype(jnp.float32).reshape(k.shape) * scale]).astype(qkv.dtype)
    cache = jax.lax.dynamic_update_slice(cache, row, (0, place, 0, 0))
    keys, values = (part.swapaxes(0, 1)[:, None].astype(jnp.float32) for part in cache)
    q = rotated(q.reshape(1, shape.heads, shape.head), turned).reshape(shape.shared, per, 1, shape.head)
    scores = jnp.sum(q * keys, axis=-1) * (scale * shape.head**-0.5)
    scores = jnp.where(jnp.arange(shape.context) <= place, scores, -jnp.inf)
    mixed = jnp.sum(jax.nn.softmax(scores)[..., None] * values, axis=2)
    return mixed.reshape(1, -1).astype(qkv.dtype), cache


def step(shape: Shape, times: Callable) -> Callable:
    """The program of a step: of weights, keys and values, a token and its place: the next token, keys and values.

    Written for few launches, with the same functions around products of every kind: norms scale the small side, keys and values are
    written together.
    """

    def normed(x, w):
        """A product of the row, and what is still to be multiplied for its norm: the kernel of few rows divides by it itself."""
        if len(w) > 1:
            return times(x, w, norm=EPSILON), 1.0
        return times(x, w), inverse(x)

    def run(weights, caches, token, place):
        x, turned, held = weights["embedding"][token][None], rotation(place[None], shape.head), []
        for layer, cache in zip(weights["layers"], caches, strict=True):
            qkv, scale = normed(x, layer["qkv"])
            mixed, cache = attended(shape, qkv, scale, cache, place, turned)
            held.append(cache)
            x = times(mixed, layer["out"], x)
            both, scale = normed(x, layer["up"])
            gate, up = jnp.split(both.astype(jnp.float32) * scale, 2, axis=1)
            x = times((jax.nn.silu(gate) * up).astype(x.dtype), layer["down"], x)
        return greedy(x, weights["head"]), held

    return run


def greedy(x, head):
    """The next token: the largest is the largest whatever the norm."""
    return jnp.argmax(jnp.einsum("mk,nk->mn", x, head)[0]).astype(jnp.int32)


TAIL = (Link(0, added=1), Link(2, norm=EPSILON, gated=True), Link(3, added=2), Link(4, norm=EPSILON))


def chained(weights: dict[str, Any]) -> dict[str, Any]:
    """Parameters as `chained_step` takes them: rows of gate and up in turn, and what the blocks of a launch meet by."""

    def turned(parts):
        return tuple(interleaved(*jnp.split(part, 2)) for part in parts)

    layers = [layer | {"up": jax.jit(turned, donate_argnums=0)(layer["up"])} for layer in weights["layers"]]
    return weights | {"layers": layers, "counters": counters(len(TAIL) + 1)}


def chained_step(shape: Shape) -> Callable:
    """As `step`, a launch a layer: attention, out, gate and up, down, and q, k, v of the next layer."""

    def run(weights, cache, token, place):
        layers, x, places = weights["layers"], weights["embedding"][token][None], place[None]
        turned, written = rotation(places, shape.head), []
        qkv = weight_only_matmul(x, *layers[0]["qkv"], group_size=GROUP, norm=EPSILON)
        for i, layer in enumerate(layers):
            written.append(fresh(qkv, shape.attention, turned))
            behind = [layer["out"], layer["up"], layer["down"], *(after["qkv"] for after in layers[i + 1 : i + 2])]
            _, _, x, *rest = chain((qkv, x), behind, weights["counters"], links=TAIL[: len(behind)], group_size=GROUP,
                                   attention=shape.attention, past=Past(cache, jnp.int32(i), places, turned))  # fmt: skip
            qkv = rest[0] if rest else qkv
        return greedy(x, weights["head"]), kept(cache, jnp.stack(written), places)

    return run


def empty_caches(shape: Shape, chained: bool) -> Any:
    """Keys and values: of every layer, one behind the other; where a layer is one launch, in one array, which a step writes once."""
    if chained:
        return jnp.zeros((shape.layers, 2, 1, shape.context, shape.shared, shape.head), jnp.bfloat16)
    return [jnp.zeros((2, shape.context, shape.shared, shape.head), jnp.bfloat16) for _ in range(shape.layers)]
