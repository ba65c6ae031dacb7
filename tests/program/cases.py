"""Programs as people write them: one list for the tests of discovery, of packed execution, of fake quantization and of GPTQ."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

KEY = jax.random.key(7)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, its parameters, its inputs, and for each site what must be found: (path, op, contracted, stacked)."""

    name: str
    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    sites: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]

    def __str__(self) -> str:
        return self.name


def normal(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    size = math.prod(shape)
    return jax.device_put(numbers(seed, jnp.dtype(dtype), max(1 << 14, 1 << (size - 1).bit_length()))[:size].reshape(shape))


@functools.cache
def numbers(seed: int, dtype: Any, count: int) -> np.ndarray:
    """What jax.random.normal begins with in any shape: one program for all shapes, where each would compile its own."""
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.random.normal(jax.random.fold_in(KEY, seed), (count,), dtype))


@jax.jit
def jitted_helper(w, x):
    return x @ w


@jax.custom_vjp
def doubled_backward(w, x):
    return x @ w


doubled_backward.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda r, t: (2 * r[1].reshape(-1, r[1].shape[-1]).T @ t.reshape(-1, t.shape[-1]), t @ r[0].T)
)


@jax.custom_jvp
def clipped_matmul(w, x):
    return jnp.clip(x @ w, -3, 3)


clipped_matmul.defjvp(lambda p, t: (clipped_matmul(*p), t[1] @ p[0] + p[1] @ t[0]))


def scan_layers(p, x):
    def layer(x, w):
        return jnp.tanh(x @ w["kernel"] + w["bias"]), x.sum()

    return lax.scan(jax.checkpoint(layer), x, p["layers"])


def grouped_attention(p, x):
    """bf16 compute on f32 parameters, grouped key/value heads, an output projection contracted over two axes."""
    x = x.astype(jnp.bfloat16)
    q = jnp.einsum("btm,mhd->bthd", x, p["q"].astype(jnp.bfloat16))
    k = jnp.einsum("btm,mhd->bthd", x, p["k"].astype(jnp.bfloat16))
    v = jnp.einsum("btm,mhd->bthd", x, p["v"].astype(jnp.bfloat16))
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32), axis=-1).astype(jnp.bfloat16)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
    return jnp.einsum("bqhd,hdm->bqm", mixed, p["o"].astype(jnp.bfloat16)).astype(jnp.float32)


def tied(p, tokens):
    h = p["embed"][tokens] * p["scale"]
    return h @ p["embed"].T


def experts(p, x):
    sizes = jnp.array([3, 0, 2], jnp.int32)
    return lax.ragged_dot(jax.nn.gelu(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)


def conv(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, p["conv"], (2, 1), "SAME", dimension_numbers=dims)
    y = lax.conv_general_dilated(jax.nn.relu(y), p["depthwise"], (1, 1), "VALID", dimension_numbers=dims, feature_group_count=6)
    return y.mean((1, 2)) @ p["head"]


def loop_index(p, x):
    return lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i]), x)


def static_index(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return x


def branch(p, x):
    return lax.cond(x.sum() > 0, lambda x: x @ p["a"], lambda x: x @ p["b"] * 2, x)


def time_loop(p, x):
    def step(h, x_t):
        h = jnp.tanh(x_t @ p["in"] + h @ p["rec"])
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[1], 5)), x)


def fused_qkv(p, x):
    """One kernel, reshaped and split, as checkpoints with fused projections do."""
    w = p["qkv"].reshape(8, 3, 2, 4)
    q, k, v = (jnp.einsum("bm,mhd->bhd", x, w[:, i]) for i in range(3))
    return q * k + v


def split_qkv(p, x):
    """A fused kernel with heads of different counts, split behind a barrier."""
    p, x = lax.optimization_barrier((p, x))
    q, k, v = jnp.split(p["qkv"], (6, 9), axis=1)
    return (x @ q)[:, :3] * (x @ k) + x @ v


def vmapped(p, x):
    return jax.vmap(lambda w, x: jitted_helper(w, x))(p["w"], jnp.stack([x] * 3))


def sharded(p, x):
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    columns = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(None, "d"), P()), out_specs=P(None, "d"))
    rows = jax.shard_map(
        lambda w, x: lax.psum(x @ w, "d"), mesh=mesh, in_specs=(P("d", None), P(None, "d")), out_specs=P()
    )
    return rows(p["rows"], jax.nn.relu(columns(p["columns"], x)))


def while_loops(p, x):
    """A trip that the data decides, a parameter in the condition, in the body and in the carry."""

    def cond(carry):
        _, x, i = carry
        return (jnp.abs(x @ p["stop"]).max() < 40.0) & (i < 5)

    def body(carry):
        w, x, i = carry
        return w, jnp.tanh(x @ w) @ p["body"] + x, i + 1

    return lax.while_loop(cond, body, (p["carried"], x, 0))[1]


def interleaved(p, x):
    """Gate and up in alternate columns, and one column of a matrix."""
    gate, up = p["w"].reshape(8, 5, 2)[..., 0], p["w"].reshape(8, 5, 2)[..., 1]
    return jax.nn.silu(x @ gate) * (x @ up) + (x @ p["column"][:, :1]) + (x @ p["column"][:, 1])[:, None]


def layers_apart(p, x):
    """Layers of one stack: the first by hand, the others under scan; and a stack of which only the last two are used."""
    x = jnp.tanh(x @ p["w"][0])
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"][1:])[0]
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["late"][2:4])[0] @ p["late"][2] @ p["late"][3]


def frozen(p, x):
    return x @ lax.stop_gradient(p["base"]) + x @ p["a"] @ p["b"]


def params_in_carry(p, x):
    def body(i, carry):
        params, x = carry
        return params, jnp.tanh(x @ params["w"])

    return lax.fori_loop(0, 2, body, (p, x))[1]


DOT, CONV, GATHER, RAGGED = "dot_general", "conv_general_dilated", "gather", "ragged_dot_general"
X = normal(5, 8, seed=100)

CASES = [
    Case(
        "scan_remat",
        scan_layers,
        {"layers": {"kernel": 0.2 * normal(3, 8, 8), "bias": normal(3, 8, seed=1)}},
        (X,),
        [("layers/kernel", DOT, (1,), (0,))],
    ),
    Case(
        "grouped_attention_bf16",
        grouped_attention,
        {"q": normal(12, 4, 6), "k": normal(12, 2, 6, seed=1), "v": normal(12, 2, 6, seed=2), "o": normal(4, 6, 12, seed=3)},
        (normal(2, 7, 12, seed=4),),
        [("q", DOT, (0,), ()), ("k", DOT, (0,), ()), ("v", DOT, (0,), ()), ("o", DOT, (0, 1), ())],
    ),
    Case(
        "tied_embedding",
        tied,
        {"embed": normal(19, 8), "scale": jnp.ones(8)},
        (jnp.arange(6).reshape(2, 3),),
        [("embed", GATHER, (1,), ()), ("embed", DOT, (1,), ())],
    ),
    Case(
        "experts",
        experts,
        {"up": normal(3, 8, 10), "down": normal(3, 10, 8, seed=1)},
        (normal(5, 8, seed=2),),
        [("up", RAGGED, (1,), (0,)), ("down", RAGGED, (1,), (0,))],
    ),
    Case(
        "conv",
        conv,
        {"conv": normal(3, 3, 2, 6), "depthwise": normal(2, 2, 1, 6, seed=1), "head": normal(6, 3, seed=2)},
        (normal(2, 9, 7, 2, seed=3),),
        [("conv", CONV, (0, 1, 2), ()), ("depthwise", CONV, (0, 1, 2), ()), ("head", DOT, (0,), ())],
    ),
    Case("jitted_helper", lambda p, x: jitted_helper(p["w"], x), {"w": normal(8, 5)}, (X,), [("w", DOT, (0,), ())]),
    Case("loop_index", loop_index, {"w": 0.2 * normal(3, 8, 8)}, (X,), [("w", DOT, (1,), (0,))]),
    Case("static_index", static_index, {"w": 0.2 * normal(3, 8, 8)}, (X,), [("w", DOT, (1,), (0,))] * 3),
    Case(
        "branch", branch, {"a": normal(8, 5), "b": normal(8, 5, seed=1)}, (X,), [("b", DOT, (0,), ()), ("a", DOT, (0,), ())]
    ),
    Case(
        "time_loop",
        time_loop,
        {"in": normal(8, 5), "rec": normal(5, 5, seed=1)},
        (normal(6, 2, 8, seed=2),),
        [("in", DOT, (0,), ()), ("rec", DOT, (0,), ())],
    ),
    Case("fused_qkv", fused_qkv, {"qkv": normal(8, 24)}, (X,), [("qkv", DOT, (0,), ())] * 3),
    Case("split_qkv", split_qkv, {"qkv": normal(8, 12)}, (X,), [("qkv", DOT, (0,), ())] * 3),
    Case("vmapped", vmapped, {"w": normal(3, 8, 5)}, (X,), [("w", DOT, (1,), (0,))]),
    Case("custom_vjp", lambda p, x: doubled_backward(p["w"], x), {"w": normal(8, 5)}, (X,), [("w", DOT, (0,), ())]),
    Case("custom_jvp", lambda p, x: clipped_matmul(p["w"], x), {"w": normal(8, 5)}, (X,), [("w", DOT, (0,), ())]),
    Case(
        "shard_map",
        sharded,
        {"columns": normal(8, 16), "rows": normal(16, 6, seed=1)},
        (X,),
        [("columns", DOT, (0,), ()), ("rows", DOT, (0,), ())],
    ),
    Case(
        "while_loops",
        while_loops,
        {"stop": normal(8, 3), "body": 0.3 * normal(6, 8, seed=1), "carried": normal(8, 6, seed=2)},
        (X,),
        [("stop", DOT, (0,), ()), ("carried", DOT, (0,), ()), ("body", DOT, (0,), ())],
    ),
    Case(
        "interleaved",
        interleaved,
        {"w": normal(8, 10), "column": normal(8, 2, seed=1)},
        (X,),
        [("w", DOT, (0,), ())] * 2 + [("column", DOT, (0,), ())] * 2,
    ),
    Case(
        "layers_apart",
        layers_apart,
        {"w": 0.3 * normal(4, 8, 8), "late": 0.3 * normal(5, 8, 8, seed=1)},
        (X,),
        [("w", DOT, (1,), (0,))] * 2 + [("late", DOT, (1,), (0,))] * 3,
    ),
    Case(
        "frozen",
        frozen,
        {"base": normal(8, 6), "a": normal(8, 2, seed=1), "b": normal(2, 6, seed=2)},
        (X,),
        [("base", DOT, (0,), ()), ("a", DOT, (0,), ()), ("b", DOT, (0,), ())],
    ),
    Case("params_in_carry", params_in_carry, {"w": normal(8, 8)}, (X,), [("w", DOT, (0,), ())]),
    Case(
        "mixed_bf16_f32",
        lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32),
        {"w": normal(9, 5, dtype=jnp.bfloat16)},
        (normal(3, 9),),
        [("w", DOT, (0,), ())],
    ),
    Case("odd_transposed", lambda p, x: x @ p["w"].T, {"w": normal(11, 13)}, (normal(1, 13),), [("w", DOT, (1,), ())]),
]
