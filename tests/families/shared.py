"""What the definitions in Linen and in NNX share: sizes, and the arithmetic between the layers."""

import jax
import jax.numpy as jnp
from jax import lax

# No two are equal and the width is no power of two, so that a shape in a compiled program says what it is.
VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD, LAYERS, EXPERTS, TOP = 53, 24, 44, 4, 2, 6, 3, 7, 2
BATCH, TIME = 5, 9
IMAGE, CHANNELS, WIDER, CLASSES = 13, 12, 18, 10


def rotate(x):
    """Rotary positions of (batch, time, heads, width)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q, k, v, visible):
    """Query head i reads key and value head i // group; softmax in float32."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.float32(-1e9)), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def causal(time):
    return jnp.tril(jnp.ones((time, time), bool))[None, None]


def heads(x, count):
    return x.reshape(*x.shape[:-1], count, -1)


def routed(logits):
    """The gates and numbers of the experts that a token goes to."""
    gates, chosen = lax.top_k(logits, TOP)
    return jax.nn.softmax(gates, axis=-1), chosen


def sorted_experts(x, logits, gate, up, down):
    """Rows sorted by expert, one ragged product a layer."""
    gates, chosen = routed(logits)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=logits.shape[-1]).astype(jnp.int32)
    rows = x[order // TOP]
    hidden = jax.nn.silu(lax.ragged_dot(rows, gate, sizes)) * lax.ragged_dot(rows, up, sizes)
    out = lax.ragged_dot(hidden, down, sizes) * gates.reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[order // TOP].add(out)


def dispatched_experts(x, logits, gate, up, down):
    """One-hot dispatch into a fixed number of places an expert, batched products over the experts."""
    gates, chosen = routed(logits)
    experts, capacity = logits.shape[-1], x.shape[0]
    mine = jax.nn.one_hot(chosen, experts)
    place = (jnp.cumsum(mine.sum(1), axis=0) - 1)[:, None, :] * mine
    dispatch = mine[..., None] * jax.nn.one_hot(place.astype(jnp.int32), capacity)
    rows = jnp.einsum("tkec,td->ecd", dispatch, x)
    hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", rows, gate)) * jnp.einsum("ecd,edf->ecf", rows, up)
    return jnp.einsum("tkec,tk,ecd->td", dispatch, gates, jnp.einsum("ecf,efd->ecd", hidden, down))
