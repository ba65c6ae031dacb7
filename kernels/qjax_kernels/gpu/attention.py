"""A row of attention in front of a chain: what it reads, the same in jax, and what is kept of a step."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

WIDTHS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Heads of attention whose q, k and v lie one behind the other in a row: first all q, then k, then v.

    Attributes:
      heads: of q.
      shared: of k and v, each for heads / shared of q.
      width: of a head: 64, 128 or 256.
      splits: parts of what came before, each with a softmax of its own; they are put together behind.
    """

    heads: int
    shared: int
    width: int
    splits: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError where the kernel has no such heads."""
        for name in ("heads", "shared", "width", "splits"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be a Python int")
        if self.width not in WIDTHS:
            raise ValueError(f"`width` is {self.width}; it must be one of {WIDTHS}")
        if self.shared < 1 or self.heads < 1 or self.heads % self.shared:
            raise ValueError(f"`heads` is {self.heads} and `shared` {self.shared}; heads must be a multiple of shared")
        if not 1 <= self.splits <= 8:
            raise ValueError(f"`splits` is {self.splits}; it must be 1 to 8")

    @property
    def columns(self) -> int:
        """Of q, k and v together."""
        return (self.heads + 2 * self.shared) * self.width


class Past(NamedTuple):
    """What a token reads of those before it.

    Attributes:
      cache: (layers, 2, M, context, shared, width) bfloat16: rotated keys, and values; every row is a sequence of its own.
      layer: int32 scalar: which of the layers, from 0 on. Outside of them the nearest one is read.
      places: (M,) int32: how many tokens came before, of which at most `context` are read, and nothing behind them. A token that finds the
        cache full is not kept.
      rotation: (M, width) float32, what `rotation` gives; None: keys and queries are not rotated.
    """

    cache: jax.Array
    layer: jax.Array
    places: jax.Array
    rotation: jax.Array | None = None


def rotation(places: jax.Array, width: int, base: float = 10000.0) -> jax.Array:
    """Cosines and sines of rotary positions: cos(p / base^(2 i / width)) for i below width / 2, then their sines.

    Args:
      places: (M,) whole numbers.
      width: of a head, even.
      base: of the wavelengths.

    Returns:
      (M, width) float32.

    Raises:
      ValueError: a width that is odd, places that are no vector.

    Example:
      >>> [[f"{value:.3f}" for value in row] for row in rotation(jnp.int32([0, 1]), 4).tolist()]
      [['1.000', '1.000', '0.000', '0.000'], ['0.540', '1.000', '0.841', '0.010']]
    """
    places = jnp.asarray(places)
    if places.ndim != 1 or width % 2:
        raise ValueError(f"`places` are {places.shape} and `width` is {width}; they must be (M,) and even")
    angles = places.astype(jnp.float32)[:, None] * base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def rotated(x: jax.Array, turned: jax.Array | None) -> jax.Array:
    """Heads with their halves rotated against each other, as Llama does: (a cos - b sin, b cos + a sin), in float32.

    Args:
      x: (M, heads, width).
      turned: (M, width) of `rotation`; None: nothing is done.

    Returns:
      The shape of x, float32.
    """
    x = x.astype(jnp.float32)
    if turned is None:
        return x
    (a, b), (cos, sin) = jnp.split(x, 2, axis=-1), jnp.split(turned[:, None], 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def fresh(qkv: jax.Array, attention: Attention, turned: jax.Array | None = None) -> jax.Array:
    """Keys, rotated, and values of this token: what `kept` writes.

    Args:
      qkv: (M, columns) bfloat16.
      attention: the heads.
      turned: (M, width) of `rotation`, or None.

    Returns:
      (2, M, shared, width) bfloat16.

    Raises:
      ValueError: rows that are not as wide as the heads, rotations of other rows.
    """
    _check_rows(qkv, attention, turned, "turned")
    k, v = jnp.split(_heads(qkv, attention)[:, attention.heads :], 2, axis=1)
    return jnp.stack([rotated(k, turned).astype(qkv.dtype), v])


def kept(cache: jax.Array, written: jax.Array, places: jax.Array) -> jax.Array:
    """The cache with the keys and values of a token: of all layers at once, behind the step that reads it. Donate the cache to the program.

    Args:
      cache: (layers, 2, M, context, shared, width) bfloat16.
      written: (layers, 2, M, shared, width) bfloat16: `fresh` of every layer.
      places: (M,) int32: where each row is written; outside of the cache it is not.

    Returns:
      The cache.

    Raises:
      ValueError: what is written or the places do not fit the cache.

    Example:
      >>> cache, written = jnp.zeros((1, 2, 1, 4, 1, 64), jnp.bfloat16), jnp.ones((1, 2, 1, 1, 64), jnp.bfloat16)
      >>> kept(cache, written, jnp.int32([2]))[0, 0, 0, :, 0, 0].tolist()
      [0.0, 0.0, 1.0, 0.0]
    """
    wanted = (*cache.shape[:3], *cache.shape[4:])
    if cache.ndim != 6 or written.shape != wanted or written.dtype != cache.dtype:
        raise ValueError(f"`written` is {written.shape} {written.dtype}; a cache {cache.shape} {cache.dtype} takes {wanted}, `fresh` "
                         "of all layers")  # fmt: skip
    if places.shape != cache.shape[2:3] or not jnp.issubdtype(places.dtype, jnp.integer):
        raise ValueError(f"`places` are {places.shape} {places.dtype}; a cache {cache.shape} takes {cache.shape[2:3]} whole numbers")
    for row in range(cache.shape[2]):
        inside = (places[row] >= 0) & (places[row] < cache.shape[3])
        start = [jnp.zeros((), places.dtype)] * 6
        start[2], start[3] = jnp.full((), row, places.dtype), places[row]
        before = jax.lax.dynamic_slice(cache, start, (*cache.shape[:2], 1, 1, *cache.shape[4:]))
        after = jnp.where(inside, written[:, :, row, None, None], before)
        cache = jax.lax.dynamic_update_slice(cache, after, start)
    return cache


def attended(qkv: jax.Array, past: Past, attention: Attention) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v over the tokens before and this one, in jax, for any device.

    Args:
      qkv: (M, columns) bfloat16.
      past: what came before.
      attention: the heads.

    Returns:
      (M, heads width) bfloat16.

    Raises:
      ValueError, TypeError: rows, cache and heads that do not fit together.

    Example:
      >>> heads = Attention(2, 1, 64)
      >>> past = Past(jnp.zeros((1, 2, 1, 8, 1, 64), jnp.bfloat16), jnp.int32(0), jnp.int32([0]))
      >>> attended(jnp.ones((1, 256), jnp.bfloat16), past, heads)[0, :2].tolist()  # nothing came before: its own values
      [1.0, 1.0]
    """
    past = check(qkv, past, attention)
    m = qkv.shape[0]
    q = rotated(_heads(qkv, attention)[:, : attention.heads], past.rotation)
    new = fresh(qkv, attention, past.rotation)
    there = jnp.arange(past.cache.shape[3])[None] < past.places[:, None]
    layer = jnp.clip(past.layer, 0, past.cache.shape[0] - 1)
    cache = jnp.where(there[..., None, None], past.cache[layer].astype(jnp.float32), 0.0)  # (2, M, context, shared, width)
    keys, values = jnp.concatenate([cache, new[:, :, None].astype(jnp.float32)], axis=2)
    q = q.reshape(m, attention.shared, -1, attention.width)
    scores = jnp.einsum("mshw,mtsw->msht", q, keys) * attention.width**-0.5
    there = jnp.append(there, jnp.ones((m, 1), bool), axis=1)
    weights = jax.nn.softmax(jnp.where(there[:, None, None], scores, -jnp.inf))
    return jnp.einsum("msht,mtsw->mshw", weights, values).reshape(m, -1).astype(qkv.dtype)


def check(qkv: jax.Array, past: Past, attention: Attention) -> Past:
    """What came before, its layer an array; raises where rows, cache and heads do not fit together."""
    if not isinstance(attention, Attention) or not isinstance(past, Past):
        kinds = type(attention).__name__, type(past).__name__
        raise TypeError(f"`attention` is a {kinds[0]} and `past` a {kinds[1]}; they must be Attention(...) and Past(...)")
    _check_rows(qkv, attention, past.rotation, "past.rotation")
    if isinstance(past.layer, int):
        past = past._replace(layer=jnp.int32(past.layer))
    named = {"cache": past.cache, "layer": past.layer, "places": past.places}
    if wrong := next((name for name, value in named.items() if not hasattr(value, "shape")), None):
        raise TypeError(f"`past.{wrong}` is a {type(named[wrong]).__name__}; it must be an array")
    m, cache = qkv.shape[0], past.cache
    wanted = (2, m, attention.shared, attention.width)
    if cache.ndim != 6 or (*cache.shape[1:3], *cache.shape[4:]) != wanted or cache.dtype != jnp.bfloat16 or not cache.size:
        raise ValueError(f"`past.cache` is {cache.shape} {cache.dtype}; {m} rows and {attention} take (layers, 2, {m}, context, "
                         f"{attention.shared}, {attention.width}) bfloat16")  # fmt: skip
    if past.layer.shape != () or past.layer.dtype != jnp.int32:
        raise ValueError(f"`past.layer` is {past.layer.shape} {past.layer.dtype}; it must be a single int32: jnp.int32(i)")
    if past.places.shape != (m,) or past.places.dtype != jnp.int32:
        raise ValueError(f"`past.places` is {past.places.shape} {past.places.dtype}; {m} rows take ({m},) int32")
    return past


def _check_rows(qkv: jax.Array, attention: Attention, turned: jax.Array | None, name: str) -> None:
    if qkv.ndim != 2 or qkv.shape[1] != attention.columns or qkv.dtype != jnp.bfloat16:
        raise ValueError(f"q, k and v are {qkv.shape} {qkv.dtype}; {attention} takes (M, {attention.columns}) bfloat16")
    wanted = qkv.shape[0], attention.width
    if turned is not None and (getattr(turned, "shape", None) != wanted or turned.dtype != jnp.float32):
        given = f"{turned.shape} {turned.dtype}" if hasattr(turned, "shape") else type(turned).__name__
        raise ValueError(f"`{name}` is {given}; these rows and heads take {wanted} float32: rotation(places, {attention.width})")


def _heads(qkv: jax.Array, attention: Attention) -> jax.Array:
    return qkv.reshape(qkv.shape[0], -1, attention.width)
