"""Whole models with a residual stream: what is embedded, added to by every layer, normed, and read by a head of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.graph.programs import BLOCK, attention, layer_norm, moe, pre_norm_block, rms_norm, stack
from tests.program.cases import normal

TOKENS = jnp.arange(10).reshape(2, 5) % 7


@dataclasses.dataclass(frozen=True)
class Stream:
    """`rotated`: path -> axes of what must be rotated; `scales`: the norms that move first; `ones`: whether a mean is taken."""

    name: str
    fn: Callable[..., Any]
    params: Any
    rotated: dict[str, tuple[int, ...]]
    scales: tuple[str, ...]
    ones: bool = False

    def __str__(self) -> str:
        return self.name


def decoder(p, tokens):
    x = p["embed"][tokens]
    for layer in p["layers"]:
        x = pre_norm_block(layer, x)
    return rms_norm(x, p["norm"]) @ p["head"]


def scanned_decoder(p, tokens):
    x = jnp.take(p["embed"], tokens, axis=0) * 12**0.5
    x = lax.scan(jax.checkpoint(lambda x, w: (pre_norm_block(w, x), None)), x, p["layers"])[0]
    return rms_norm(x, p["norm"]) @ p["head"]


def layer_norm_decoder(p, tokens):
    """With biases everywhere, learned positions, and the fast variance E[x^2] - E[x]^2 in the last norm."""
    x = p["embed"][tokens] + p["positions"][: tokens.shape[1]]
    for w in p["layers"]:
        x = x + attention(w, layer_norm(x, w["g1"], w["b1"]), 1) + w["o_bias"]
        x = x + jax.nn.gelu(layer_norm(x, w["g2"], w["b2"]) @ w["in"] + w["in_bias"]) @ w["out"] + w["out_bias"]
    mean, square = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
    x = (x - mean) * (lax.rsqrt(jnp.maximum(square - mean**2, 0) + 1e-6) * p["norm"])
    return x @ p["head"]


def expert_decoder(p, tokens):
    x = p["embed"][tokens].reshape(-1, 8)
    for w in p["layers"]:
        x = moe(w, x)
    return rms_norm(x, p["norm"]) @ p["head"]


def mixed_precision_decoder(p, tokens):
    """Norms in float32, products in bfloat16, as models are run."""
    x = p["embed"].astype(jnp.bfloat16)[tokens]
    for w in p["layers"]:
        h = rms_norm(x.astype(jnp.float32), w["norm"]).astype(jnp.bfloat16)
        x = x + jax.nn.silu(h @ w["in"].astype(jnp.bfloat16)) @ w["out"].astype(jnp.bfloat16)
    return lax.dot_general(x, p["head"].astype(jnp.bfloat16), (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def relu_decoder(p, tokens):
    x = p["embed"][tokens]
    for w in p["layers"]:
        x = x + jax.nn.relu(rms_norm(x, w["norm"]) @ w["in"]) @ w["out"]
    return rms_norm(x, p["norm"]) @ p["head"]


def tied_decoder(p, tokens):
    x = pre_norm_block(p["layer"], p["embed"][tokens])
    return rms_norm(x, p["norm"]) @ p["embed"].T


def layer_norm_layer(seed):
    return {
        **{name: 0.3 * normal(12, 4, 3, seed=seed + i) for i, name in enumerate("qkv")},
        "o": 0.3 * normal(12, 12, seed=seed + 3),
        "in": 0.3 * normal(12, 10, seed=seed + 4),
        "out": 0.3 * normal(10, 12, seed=seed + 5),
        "in_bias": 0.1 * normal(10, seed=seed + 6),
        **{name: 0.1 * normal(12, seed=seed + 7 + i) for i, name in enumerate(("b1", "b2", "o_bias", "out_bias"))},
        **{name: 1 + 0.2 * normal(12, seed=seed + 11 + i) for i, name in enumerate(("g1", "g2"))},
    }


def expert_layer(seed):
    return {
        "norm": -1 + 0.1 * normal(8, seed=seed),
        "router": normal(8, 3, seed=seed + 1),
        "gate": 0.4 * normal(3, 8, 6, seed=seed + 2),
        "up": 0.4 * normal(3, 8, 6, seed=seed + 3),
        "down": 0.4 * normal(3, 6, 8, seed=seed + 4),
    }


ENDS = {"embed": normal(7, 12, seed=20), "norm": 1 + 0.1 * normal(12, seed=21), "head": 0.3 * normal(12, 9, seed=22)}
BLOCK_AXES = {"q": (0,), "k": (0,), "v": (0,), "o": (1,), "gate": (0,), "up": (0,), "down": (1,)}
LAYER_NORM_AXES = {"o": (1,), "out": (1,)} | dict.fromkeys(("q", "k", "v", "in", "b1", "b2", "o_bias", "out_bias"), (0,))
EXPERT_AXES = {"router": (0,), "gate": (1,), "up": (1,), "down": (2,)}


def in_layers(axes, count):
    return {f"layers/{i}/{name}": where for i in range(count) for name, where in axes.items()}


STREAMS = [
    Stream("decoder", decoder, ENDS | {"layers": [BLOCK, jax.tree.map(lambda w: 0.9 * w, BLOCK)]},
           {"embed": (1,), "head": (0,)} | in_layers(BLOCK_AXES, 2),
           ("layers/0/norm1", "layers/0/norm2", "layers/1/norm1", "layers/1/norm2", "norm")),
    Stream("scanned_decoder", scanned_decoder, ENDS | {"layers": stack(BLOCK, 3)},
           {"embed": (1,), "head": (0,)} | {f"layers/{name}": tuple(a + 1 for a in axes) for name, axes in BLOCK_AXES.items()},
           ("layers/norm1", "layers/norm2", "norm")),
    Stream("layer_norm_decoder", layer_norm_decoder,
           ENDS | {"positions": 0.3 * normal(8, 12, seed=23), "layers": [layer_norm_layer(30), layer_norm_layer(50)]},
           {"embed": (1,), "head": (0,), "positions": (1,)} | in_layers(LAYER_NORM_AXES, 2),
           ("layers/0/g1", "layers/0/g2", "layers/1/g1", "layers/1/g2", "norm"), ones=True),
    Stream("expert_decoder", expert_decoder,
           {"embed": normal(7, 8, seed=24), "norm": 1 + 0.1 * normal(8, seed=25), "head": 0.3 * normal(8, 9, seed=26),
            "layers": [expert_layer(70), expert_layer(80)]},
           {"embed": (1,), "head": (0,)} | in_layers(EXPERT_AXES, 2),
           ("layers/0/norm", "layers/1/norm", "norm")),
]  # fmt: skip
