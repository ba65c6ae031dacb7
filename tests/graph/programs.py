"""Small programs and, for each group of sites, what must be found: the exponent of every parameter that changes, or why none can."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.program.cases import normal

NHWC = ("NHWC", "HWIO", "NHWC")
INPUT, OUTPUT, CARRY, INDICES = "an input of the program", "an output of the program", "a loop carries", "looked up by indices"


@dataclasses.dataclass(frozen=True)
class Example:
    """`expected` names a group by the paths of its sites, joined by a space: {path: exponents} and the free scales, or a reason."""

    name: str
    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    expected: dict[str, tuple[dict[str, tuple[float, ...]], tuple[int, ...]] | str]

    def __str__(self) -> str:
        return self.name


def rms_norm(x, g):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * g


def rms_norm_scale_first(x, g):
    return x * (lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * g)


def layer_norm(x, g, b):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6) * g + b


def attention(p, x, repeats):
    heads, width = p["q"].shape[1:]
    q, k, v = (jnp.einsum("btm,mhd->bthd", x, p[name]) for name in "qkv")
    k, v = (jnp.repeat(a, repeats, axis=2) for a in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(*x.shape[:2], heads * width) @ p["o"]


def pre_norm_block(p, x):
    x = x + attention(p, rms_norm(x, p["norm1"]), 2)
    h = rms_norm_scale_first(x, p["norm2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def fused_block(p, x):
    """Fused query/key/value and fused gate/up kernels, with biases, split after the product."""
    h = rms_norm(x, p["norm1"])
    q, k, v = jnp.split(h @ p["qkv"] + p["bias"], 3, axis=-1)
    x = x + (jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v) @ p["o"]
    gate, up = jnp.split(rms_norm(x, p["norm2"]) @ p["gate_up"], 2, axis=-1)
    return x + (up * jax.nn.silu(gate)) @ p["down"]


def post_norm_block(p, x):
    """The norm's result goes to the next layer and past it: only what no residual reads can be scaled."""
    x = layer_norm(x + attention(p, x, 1), p["g1"], p["b1"])
    h = jax.nn.gelu(x @ p["in"] + p["in_bias"])
    return layer_norm(x + h @ p["out"] + p["out_bias"], p["g2"], p["b2"])


def norm_mlp(p, x):
    h = layer_norm(x, p["g"], p["b"])
    h = jax.nn.relu(h @ p["w1"] + p["b1"])
    h = jnp.where(h > 0.5 * h, h, 0.1 * h)
    return x + h @ p["w2"] + p["b2"]


def batch_norm(p, z):
    return (z - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["gamma"] + p["beta"]


def conv(x, w, stride=1, groups=1):
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=NHWC, feature_group_count=groups)


def conv_net(p, x):
    """Convolutions, batch norm, max-pool, and pixels flattened in front of the head: one scale for all pixels of a feature."""
    h = jax.nn.relu(batch_norm(p["bn"], conv(x, p["c1"]) + p["b1"]))
    h = jax.nn.relu(conv(h, p["c2"]))
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = jax.nn.relu(conv(h, p["c3"], stride=2) + p["b3"])
    return h.reshape(h.shape[0], -1) @ p["head"]


def depthwise_net(p, x):
    h = jax.nn.relu(conv(x, p["in"]))
    return conv(jax.nn.relu(conv(h, p["depth"], groups=4)), p["out"])


def depthwise_skip(p, x):
    """What enters the depthwise convolution also goes past it: the scale must go all the way back and both ways."""
    h = jax.nn.relu(conv(x, p["in"]))
    return conv(h + conv(h, p["depth"], groups=4), p["out"])


def grouped_conv(p, x):
    h = jax.nn.relu(conv(x, p["in"]))
    return conv(jax.nn.relu(conv(h, p["mid"], groups=2)), p["out"])


def moe(p, x):
    h = rms_norm(x, p["norm"])
    gates = jax.nn.softmax(h @ p["router"])
    top = jnp.argmax(gates, -1)
    order = jnp.argsort(top)
    sizes = jnp.bincount(top, length=3).astype(jnp.int32)
    rows = h[order]
    mid = jax.nn.silu(lax.ragged_dot(rows, p["gate"], sizes)) * lax.ragged_dot(rows, p["up"], sizes)
    out = jnp.zeros_like(x).at[order].add(lax.ragged_dot(mid, p["down"], sizes))
    return x + out * gates.max(-1, keepdims=True)


def dense_moe(p, x):
    """Every expert sees every token: each may have its own scales between its two layers."""
    h = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["up"]))
    return jnp.einsum("etf,efd->td", h, p["down"])


def scanned(p, x):
    def layer(x, w):
        return pre_norm_block(w, x), None

    return lax.scan(jax.checkpoint(layer), x, p)[0]


def scanned_shared_norm(p, x):
    """A norm outside the loop is one for all layers, so their scales are one, too."""

    def layer(x, w):
        return x + jax.nn.relu(rms_norm(x, p["norm"]) @ w["in"]) @ w["out"], None

    return lax.scan(layer, x, p["layers"])[0]


def enters_a_loop(p, x):
    """What one layer makes is read by the next and is also what a loop begins with."""
    h = jax.nn.relu(x @ p["a"])
    looped = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), h, p["loop"])[0]
    return h @ p["b"] + looped


def enters_a_while(p, x):
    h = jax.nn.relu(x @ p["a"])
    looped = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["loop"])), (0, h))[1]
    return h @ p["b"] + looped


def tied_model(p, tokens):
    x = p["embed"][tokens]
    x = x + jax.nn.relu(rms_norm(x, p["norm1"]) @ p["in"]) @ p["out"]
    return rms_norm(x, p["norm"]) @ p["embed"].T


def bare_residual(p, x):
    h = x @ p["a"]
    return h + jax.nn.relu(h) @ p["b"]


def both_sides(p, x):
    """A sum of two linear layers: both carry the scale."""
    return jax.nn.relu(x @ p["a"] + (x @ p["b"] + p["bias"])) @ p["c"]


def quiet_head(p, x):
    """Another reader that no scale passes."""
    h = jax.nn.relu(x @ p["a"])
    return h @ p["b"], jnp.tanh(h).sum()


def also_normalized(p, x):
    h = jax.nn.relu(x @ p["a"])
    return h @ p["b"] + rms_norm(h, p["g"])[:, :3]


def squared_relu(p, x):
    return jnp.square(jax.nn.relu(x @ p["a"] + p["bias"])) @ p["b"]


def concatenated(p, x):
    return jnp.concatenate([x @ p["a"], jax.nn.relu(x @ p["b"])], -1) @ p["c"]


def concatenated_input(p, x):
    return jnp.concatenate([x @ p["a"], x], -1) @ p["c"]


def stacked_layers(p, x):
    """One leaf holds all layers, indexed statically: it makes the channels and reads them."""
    for i in range(3):
        x = jax.nn.relu(x @ p["w"][i])
    return x


def one_channel_mix(p, x):
    """A sum over the channels beside the layer allows one scale only."""
    h = jax.nn.relu(x @ p["a"])
    return h @ p["b"] + h.sum(-1, keepdims=True)


def add_constant(p, x):
    return (jax.nn.relu(x @ p["a"]) + 1.0) @ p["b"]


def relu6(p, x):
    return jax.nn.relu6(x @ p["a"]) @ p["b"]


BLOCK = {
    "norm1": 1 + 0.1 * normal(12),
    "norm2": 1 + 0.1 * normal(12, seed=1),
    "q": 0.3 * normal(12, 4, 3, seed=2),
    "k": 0.3 * normal(12, 2, 3, seed=3),
    "v": 0.3 * normal(12, 2, 3, seed=4),
    "o": 0.3 * normal(12, 12, seed=5),
    "gate": 0.3 * normal(12, 10, seed=6),
    "up": 0.3 * normal(12, 10, seed=7),
    "down": 0.3 * normal(10, 12, seed=8),
}
TOKENS = normal(2, 5, 12, seed=9)
IMAGE = normal(2, 8, 8, 3, seed=10)
ROWS = normal(5, 8, seed=11)
UP, DOWN = (-1.0,), (1.0,)  # exponents of what makes a channel and of what reads it


def stack(tree, count):
    return jax.tree.map(lambda w: jnp.stack([w * (1 + 0.1 * i) for i in range(count)]), tree)


def block_expected(prefix=(), names=lambda name: name):
    return {
        "q k v": ({"norm1": UP, "q": DOWN, "k": DOWN, "v": DOWN}, (*prefix, 12)),
        "o": ({"v": UP, "o": DOWN}, (*prefix, 6)),
        "gate up": ({"norm2": UP, "gate": DOWN, "up": DOWN}, (*prefix, 12)),
        "down": ({"up": UP, "down": DOWN}, (*prefix, 10)),
    }


EXAMPLES = [
    Example("pre_norm_block", pre_norm_block, BLOCK, (TOKENS,), block_expected()),
    Example("scanned", scanned, stack(BLOCK, 3), (TOKENS,), block_expected((3,))),
    Example(
        "scanned_shared_norm",
        scanned_shared_norm,
        {"norm": jnp.ones(12), "layers": {"in": 0.3 * normal(3, 12, 7), "out": 0.3 * normal(3, 7, 12, seed=1)}},
        (TOKENS,),
        {
            "layers/in": ({"norm": UP, "layers/in": DOWN}, (12,)),
            "layers/out": ({"layers/in": UP, "layers/out": DOWN}, (3, 7)),
        },
    ),
    Example(
        "fused_block",
        fused_block,
        {
            "norm1": BLOCK["norm1"],
            "norm2": BLOCK["norm2"],
            "qkv": 0.3 * normal(12, 27),
            "bias": normal(27, seed=1),
            "o": 0.3 * normal(9, 12, seed=2),
            "gate_up": 0.3 * normal(12, 14, seed=3),
            "down": 0.3 * normal(7, 12, seed=4),
        },
        (TOKENS,),
        {
            "qkv": ({"norm1": UP, "qkv": DOWN}, (12,)),
            "o": ({"qkv": UP, "bias": UP, "o": DOWN}, (9,)),
            "gate_up": ({"norm2": UP, "gate_up": DOWN}, (12,)),
            "down": ({"gate_up": UP, "down": DOWN}, (7,)),
        },
    ),
    Example(
        "post_norm_block",
        post_norm_block,
        {
            **{name: BLOCK[name] for name in "qo"},
            "k": 0.3 * normal(12, 4, 3, seed=3),
            "v": 0.3 * normal(12, 4, 3, seed=4),
            "in": 0.3 * normal(12, 10, seed=6),
            "in_bias": normal(10),
            "out": 0.3 * normal(10, 12, seed=8),
            "out_bias": normal(12),
            **{name: 1 + 0.1 * normal(12, seed=i) for i, name in enumerate(("g1", "b1", "g2", "b2"))},
        },
        (TOKENS,),
        {
            "q k v": INPUT,
            "o": ({"v": UP, "o": DOWN}, (12,)),
            "in": "with the constant 1e-06",
            "out": "`tanh`",
        },
    ),
    Example(
        "norm_mlp",
        norm_mlp,
        {"g": 1 + 0.1 * normal(8), "b": normal(8), "w1": normal(8, 6), "b1": normal(6), "w2": normal(6, 8), "b2": normal(8)},
        (ROWS,),
        {"w1": ({"g": UP, "b": UP, "w1": DOWN}, (8,)), "w2": ({"w1": UP, "b1": UP, "w2": DOWN}, (6,))},
    ),
    Example(
        "conv_net",
        conv_net,
        {
            "bn": {"mean": normal(4), "var": 1 + normal(4, seed=1) ** 2, "gamma": 1 + 0.1 * normal(4, seed=2), "beta": normal(4, seed=3)},
            "c1": normal(3, 3, 3, 4),
            "b1": normal(4, seed=4),
            "c2": normal(3, 3, 4, 5),
            "c3": normal(3, 3, 5, 6),
            "b3": normal(6),
            "head": normal(24, 3),
        },
        (IMAGE,),
        {
            "c1": INPUT,
            "c2": ({"bn/gamma": UP, "bn/beta": UP, "c2": DOWN}, (4,)),
            "c3": ({"c2": UP, "c3": DOWN}, (5,)),
            "head": ({"c3": UP, "b3": UP, "head": DOWN}, (6,)),
        },
    ),
    Example(
        "depthwise_net",
        depthwise_net,
        {"in": normal(1, 1, 3, 4), "depth": normal(3, 3, 1, 4), "out": normal(1, 1, 4, 5)},
        (IMAGE,),
        {"in": INPUT, "depth": ({"in": UP, "depth": DOWN}, (4,)), "out": ({"depth": UP, "out": DOWN}, (4,))},
    ),
    Example(
        "depthwise_skip",
        depthwise_skip,
        {"in": normal(1, 1, 3, 4), "depth": normal(3, 3, 1, 4), "out": normal(1, 1, 4, 5)},
        (IMAGE,),
        {"in": INPUT, "depth": "scaled differently", "out": ({"in": UP, "out": DOWN}, (4,))},
    ),
    Example(
        "grouped_conv",
        grouped_conv,
        {"in": normal(1, 1, 3, 4), "mid": normal(3, 3, 2, 6), "out": normal(1, 1, 6, 5)},
        (IMAGE,),
        {"in": INPUT, "mid": ({"in": UP, "mid": DOWN}, (4,)), "out": ({"mid": UP, "out": DOWN}, (6,))},
    ),
    Example(
        "moe",
        moe,
        {
            "norm": 1 + 0.1 * normal(8),
            "router": normal(8, 3),
            "gate": normal(3, 8, 6),
            "up": normal(3, 8, 6, seed=1),
            "down": normal(3, 6, 8, seed=2),
        },
        (normal(7, 8, seed=3),),
        {
            "router": ({"norm": UP, "router": DOWN, "gate": DOWN, "up": DOWN}, (8,)),
            "gate up": ({"norm": UP, "router": DOWN, "gate": DOWN, "up": DOWN}, (8,)),
            "down": ({"up": UP, "down": DOWN}, (6,)),
        },
    ),
    Example(
        "dense_moe",
        dense_moe,
        {"up": normal(3, 8, 6), "down": normal(3, 6, 8, seed=2)},
        (ROWS,),
        {"up": INPUT, "down": ({"up": UP, "down": DOWN}, (18,))},
    ),
    Example(
        "tied_model",
        tied_model,
        {"embed": normal(11, 8), "norm1": jnp.ones(8), "norm": jnp.ones(8), "in": normal(8, 6), "out": normal(6, 8)},
        (jnp.arange(6).reshape(2, 3),),
        {
            "embed": INDICES,
            "in": ({"norm1": UP, "in": DOWN}, (8,)),
            "out": ({"in": UP, "out": DOWN}, (6,)),
            "embed ": "with the constant 1e-06",
        },
    ),
    Example("enters_a_loop", enters_a_loop, {"a": normal(8, 6), "b": normal(6, 6), "loop": normal(2, 6, 6)}, (ROWS,),
            {"a": INPUT, "loop": CARRY, "b": CARRY}),
    Example("enters_a_while", enters_a_while, {"a": normal(8, 6), "b": normal(6, 6), "loop": normal(6, 6)}, (ROWS,),
            {"a": INPUT, "loop": CARRY, "b": CARRY}),
    Example("bare_residual", bare_residual, {"a": normal(8, 6), "b": normal(6, 6)}, (ROWS,), {"a": INPUT, "b": OUTPUT}),
    Example(
        "both_sides",
        both_sides,
        {"a": normal(8, 6), "b": normal(8, 6, seed=1), "bias": normal(6), "c": normal(6, 3)},
        (ROWS,),
        {"a b": INPUT, "c": ({"a": UP, "b": UP, "bias": UP, "c": DOWN}, (6,))},
    ),
    Example("silu_between", lambda p, x: jax.nn.silu(x @ p["a"]) @ p["b"], {"a": normal(8, 6), "b": normal(6, 3)}, (ROWS,),
            {"a": INPUT, "b": "`logistic`"}),
    Example("quiet_head", quiet_head, {"a": normal(8, 6), "b": normal(6, 3)}, (ROWS,), {"a": INPUT, "b": "`tanh`"}),
    Example("also_normalized", also_normalized, {"a": normal(8, 6), "b": normal(6, 3), "g": normal(6)}, (ROWS,),
            {"a": INPUT, "b": "with the constant 1e-06"}),
    Example("squared_relu", squared_relu, {"a": normal(8, 6), "bias": normal(6), "b": normal(6, 3)}, (ROWS,),
            {"a": INPUT, "b": ({"a": (-0.5,), "bias": (-0.5,), "b": DOWN}, (6,))}),
    Example("concatenated", concatenated, {"a": normal(8, 2), "b": normal(8, 4), "c": normal(6, 3)}, (ROWS,),
            {"a b": INPUT, "c": ({"a": UP, "b": UP, "c": DOWN}, (6,))}),
    Example("concatenated_input", concatenated_input, {"a": normal(8, 2), "c": normal(10, 3)}, (ROWS,), {"a": INPUT, "c": INPUT}),
    Example("stacked_layers", stacked_layers, {"w": normal(3, 8, 8)}, (ROWS,),
            {"w": INPUT, "w ": ({"w": (-1.0, 1.0)}, (8,)), "w  ": ({"w": (-1.0, 1.0)}, (8,))}),
    Example("one_channel_mix", one_channel_mix, {"a": normal(8, 6), "b": normal(6, 3)}, (ROWS,), {"a": INPUT, "b": OUTPUT}),
    Example("add_constant", add_constant, {"a": normal(8, 6), "b": normal(6, 3)}, (ROWS,), {"a": INPUT, "b": "`add` with the constant 1"}),
    Example("relu6", relu6, {"a": normal(8, 6), "b": normal(6, 3)}, (ROWS,), {"a": INPUT, "b": "constant 6"}),
]
