"""A 32-layer unrolled Llama, and the same program with int8 weights written by hand."""

import jax
import jax.numpy as jnp

LAYERS, WIDTH, HEADS, KV_HEADS, FEED, VOCAB = 32, 128, 4, 2, 352, 512
SHAPES = {
    "q": (WIDTH, WIDTH),
    "k": (WIDTH, WIDTH * KV_HEADS // HEADS),
    "v": (WIDTH, WIDTH * KV_HEADS // HEADS),
    "o": (WIDTH, WIDTH),
    "gate": (WIDTH, FEED),
    "up": (WIDTH, FEED),
    "down": (FEED, WIDTH),
}


def init(key):
    """Float32 parameters: a dictionary for each layer, an embedding that is tied to the head."""
    keys = iter(jax.random.split(key, LAYERS * len(SHAPES) + 1))
    layers = [
        {n: jax.random.normal(next(keys), s) * s[0] ** -0.5 for n, s in SHAPES.items()}
        | {"norm1": jnp.ones(WIDTH), "norm2": jnp.ones(WIDTH)}
        for _ in range(LAYERS)
    ]
    return {"embed": jax.random.normal(next(keys), (VOCAB, WIDTH)), "layers": layers, "norm": jnp.ones(WIDTH)}


def forward(params, tokens, matmul):
    """The model; `matmul(x, w)` is the only thing in which float and int8 differ."""
    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = x + attention(norm(x, layer["norm1"]), layer, matmul)
        h = norm(x, layer["norm2"])
        x = x + matmul(jax.nn.silu(matmul(h, layer["gate"])) * matmul(h, layer["up"]), layer["down"])
    return norm(x, params["norm"]) @ params["embed"].T


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def rotary(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / 10000 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attention(h, layer, matmul):
    batch, length, _ = h.shape
    q = rotary(matmul(h, layer["q"]).reshape(batch, length, HEADS, -1))
    k = rotary(matmul(h, layer["k"]).reshape(batch, length, KV_HEADS, -1))
    v = matmul(h, layer["v"]).reshape(batch, length, KV_HEADS, -1)
    k, v = (jnp.repeat(t, HEADS // KV_HEADS, axis=2) for t in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
    return matmul(mixed.reshape(batch, length, -1), layer["o"])


def plain(params, tokens):
    """The float program, as a user of qjax has it."""
    return forward(params, tokens, lambda x, w: x @ w)


def by_hand(params, tokens):
    """The int8 program, written by hand for weights given as (codes (N, K) int8, scale (N, 1) float32)."""
    return forward(params, tokens, lambda x, w: x @ (w[0].astype(jnp.float32) * w[1]).T)


def codes_and_scales(params):
    """Takes packed parameters apart for `by_hand`."""
    layers = [
        {n: (w.codes, w.scale) if n in SHAPES else w for n, w in layer.items()} for layer in params["layers"]
    ]
    return {**params, "layers": layers}


def instructions(compiled):
    """Counts the instructions of an optimized HLO program."""
    return sum(" = " in line for line in compiled.as_text().splitlines())
