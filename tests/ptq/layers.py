"""Layers of attention and SwiGLU for tests of blocks, scanned and unrolled, with a mask that all of them read; specs that are tuned."""

import jax
import jax.numpy as jnp
import numpy as np

import qjax


def numbers(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def mixer(x, mask, w):
    """A residual branch whose weights meet, with a mask that every layer reads."""
    h = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w["norm"]
    score = jax.nn.softmax((h @ w["q"]) @ (h @ w["k"]).swapaxes(-1, -2) + mask)
    return x + (score @ (h @ w["v"])) @ w["o"]


def layer(x, mask, w):
    x = mixer(x, mask, w)
    return x + jax.nn.silu(x @ w["gate"]) * (x @ w["up"]) @ w["down"]


def scanned(p, x):
    mask = jnp.where(jnp.tri(x.shape[-2]) > 0, 0.0, -1e9)
    return jax.lax.scan(jax.checkpoint(lambda x, w: (layer(x, mask, w), None)), x * p["norm"][0], p)[0]


def unrolled(p, x):
    mask = jnp.where(jnp.tri(x.shape[-2]) > 0, 0.0, -1e9)
    x = x * p[0]["norm"]
    for w in p:
        x = layer(x, mask, w)
    return x


D, F, L = 8, 16, 2
SHAPES = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "gate": (D, F), "up": (D, F), "down": (F, D)}


def layers_params(dtype=jnp.float32):
    each = [{k: numbers(*s, seed=10 * i + j, dtype=dtype) / s[0] ** 0.5 for j, (k, s) in enumerate(SHAPES.items())} for i in range(L)]
    return [w | {"norm": jnp.ones(D, dtype)} for w in each]


def stacked_params(dtype=jnp.float32):
    return jax.tree.map(lambda *w: jnp.stack(w), *layers_params(dtype))


def data(n=2, seed=5, dtype=jnp.float32):
    return [numbers(4, 6, D, seed=seed + i, dtype=dtype) for i in range(n)]


SPECS = [
    qjax.int2(group_size=4), qjax.int3(scale_rule="full"), qjax.uint3(group_size=8, pad=True, scale_dtype="bfloat16"),
    qjax.int4(per="tensor"), qjax.uint4(block=(2, 4)), qjax.integer(4, signed=False, symmetric=True),
    qjax.uint2(group_size=4, zero_dtype="float32"), qjax.uint3(zero_dtype="float16"), qjax.ternary(group_size=4),
]  # fmt: skip
