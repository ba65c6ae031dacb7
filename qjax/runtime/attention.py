"""`cached_attention`: attention to a cache as one call, which `quantized` runs on the packed cache where a kernel takes it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from qjax_kernels.request import Cached, CacheRead

from qjax.core import IntSpec, PerGroup, QCache, hadamard_transform
from qjax.core.cache import latest_tokens, past_tokens
from qjax.program import compat, materialize
from qjax.program.flatten import canonical_jaxpr
from qjax.runtime.alone import alone_or
from qjax.runtime.kernels import CacheKernel, CacheOperands, Runtime, Tokens, choose_read

_LOW = -1e30  # the score of what is not seen; minus infinity less itself is NaN
Read = Callable[[jax.Array, QCache, QCache, jax.Array], jax.Array]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array) -> jax.Array:
    """Causal attention: softmax(q k^T / sqrt(head_dim)) v over keys s <= position + t, softmax in float32.

    Args:
      q: (B, kv_heads, group, T, head_dim).
      k: (B, kv_heads, S, head_dim).
      v: (B, kv_heads, S, head_dim).
      position: scalar int32, place of the first query among the keys.

    Returns:
      (B, kv_heads, group, T, head_dim) in q's dtype.
    """
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    queries = position + jnp.arange(q.shape[3], dtype=jnp.int32)
    visible = jnp.arange(k.shape[2], dtype=jnp.int32)[None, :] <= queries[:, None]
    scores = jnp.where(visible[None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksd->bkgtd", weights, v)


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, position: Any) -> jax.Array:
    """Causal attention of new tokens to a cache that holds them and those before them, as one call of the program.

        y_t = softmax(q_t k^T / sqrt(D)) v  over the tokens 0 .. position + t

    Alone it is those few lines of jax. `qjax.quantized` knows the call: where k and v come packed, T is 1 and a kernel takes their form,
    it multiplies codes, and no float copy of the cache is made; elsewhere the cache is dequantized in front of it.
    `qjax.runtime.cache_kernel_of` says which, and why not. So write the cache, and hand it over as it is, in any dtype. A `vmap` belongs
    around the quantized function: one inside of it makes another call, which is not known.

    Args:
      q: (B, H, N, T, D) floating: N query heads share each of the H heads of the cache.
      k: (B, H, S, D), keys. Tokens up to position + T - 1 must have been written, into k and v alike.
      v: (B, H, S, D), values.
      position: int scalar, place of the first of the T tokens among the S.

    Returns:
      (B, H, N, T, D) in the dtype of q. The softmax is in float32.

    Raises:
      TypeError: `position` is no whole number, `q` not floating.
      ValueError: shapes that do not fit; a position outside of the cache, where it is no tracer.

    Example:
      >>> q, k = jnp.ones((1, 1, 2, 1, 4)), jnp.ones((1, 1, 8, 4))
      >>> v = jnp.arange(8.0).reshape(1, 1, 8, 1) * k
      >>> cached_attention(q, k, v, 2)[0, 0, :, 0, 0].tolist()  # the mean of 0, 1 and 2
      [1.0, 1.0]
    """
    if q.ndim != 5 or k.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[4]:
        raise ValueError(f"`q` (B, H, N, T, D), `k` and `v` (B, H, S, D) do not fit: {q.shape}, {k.shape} and {v.shape}")
    place = jnp.asarray(position)
    if place.shape or not jnp.issubdtype(place.dtype, jnp.integer):
        raise TypeError(f"`position` must be a whole number, got {place.dtype}{list(place.shape)}: vmap what has places of its own")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"`q` must be floating, got {q.dtype}")
    if not isinstance(place, Tracer) and not 0 <= int(place) <= k.shape[2] - q.shape[3]:
        last = k.shape[2] - q.shape[3]
        raise ValueError(f"`position` must be 0 .. {last}, so that the {q.shape[3]} tokens lie in the cache, got {int(place)}")
    return _call(q, k, v, place.astype(jnp.int32))


CALL = "cached_attention_call"  # the name of the call in programs


def cached_attention_call(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array) -> jax.Array:
    """`attend`, under the name that it has in programs."""
    return attend(q, k, v, position)


_call = jax.jit(cached_attention_call)


def packed_attention(eqn: Any, operands: Sequence[Any], runtime: Runtime) -> list[Any] | None:
    """Runs a call of `cached_attention` on packed keys and values.

    Args:
      eqn: a call of that name; what it computes is compared with `attend`, so another function of the name is left alone.
      operands: its operands, packed caches among them.
      runtime: what to choose from.

    Returns:
      Its results; None where no kernel takes it.

    Raises:
      ValueError: `runtime.force_cache` names a kernel that cannot run here.
    """
    forced = runtime.force_cache not in (None, "xla")
    if not _is_attend(eqn):
        if forced:
            raise ValueError(f"`kernel` {runtime.force_cache!r} cannot run {CALL}: the program changes the call, as a vmap in it does; "
                             "put the vmap around qjax.quantized(...)")  # fmt: skip
        return None
    q, k, v, position = operands
    read = read_of(q.shape, q.dtype, k, v, runtime.device)
    if isinstance(read, str):
        if forced:
            raise ValueError(f"`kernel` {runtime.force_cache!r} cannot run {CALL}: {read}")
        return None
    kernel, _ = choose_read(read, runtime)
    if kernel is None:
        return None
    return [_differentiable(eqn, kernel, read, runtime.force_cache is not None)(q, k, v, jnp.asarray(position))]


def read_of(shape: Sequence[int], dtype: Any, k: Any, v: Any, device: Any) -> CacheRead | str:
    """What a decode step asks of a kernel, or why it is nothing that kernels are written for.

    Args:
      shape: of q, (B, H, N, T, D).
      dtype: of q.
      k: the keys.
      v: the values.
      device: where.
    """
    for name, cache in (("keys", k), ("values", v)):
        if not isinstance(cache, QCache):
            return f"the {name} are not packed"
        if cache.axis != -2:
            return f"tokens of the {name} lie along axis {cache.axis}, not in front of the channels"
    if k.spec.held != v.spec.held or k.spec.window != v.spec.window:
        return f"keys keep {k.spec.held} tokens in float and values {v.spec.held}: both are cut at one token"
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16") or k.dtype.name == "float16" or v.dtype.name == "float16":
        return f"queries of {name} to keys of {k.dtype.name}: kernels are for float32 and bfloat16"
    return CacheRead(device, shape[3], shape[4], k.capacity, _cached(k), _cached(v), name)


def cache_kernel_of(keys: QCache, values: QCache, runtime: Runtime, dtype: Any = None) -> tuple[str, tuple[str, ...]]:
    """Which kernel reads a packed cache when a token is decoded with `cached_attention`.

    Args:
      keys: of one layer, arrays or shapes, (B, H, S, D).
      values: as `keys`.
      runtime: from `runtime_of(device=...)`.
      dtype: of the queries; None for that of the keys.

    Returns:
      (its name, or "xla", where the cache is dequantized; why not faster ones, in words).

    Example:
      >>> import qjax
      >>> from qjax.runtime import Device, runtime_of
      >>> cache = jax.eval_shape(lambda: qjax.core.init_cache((1, 8, 512, 128), jnp.bfloat16, qjax.kv_cache(qjax.int8()), 2))
      >>> cache_kernel_of(cache, cache, runtime_of(device=Device("tpu", "v6e")))
      ('tpu decode attention', ())
      >>> cache_kernel_of(cache, cache, runtime_of(device=Device("tpu", "v3")))[1]
      ("tpu decode attention: no TPU kernel is tuned for the generation 'v3': v5e, v5p, v6e, tpu7x",)
    """
    shape = (*keys.shape[:-2], 1, 1, keys.shape[-1])
    read = read_of(shape[-5:], keys.dtype if dtype is None else dtype, keys, values, runtime.device)
    if isinstance(read, str):
        return "xla", (read,) if runtime.cache_kernels else ()
    kernel, reasons = choose_read(read, runtime)
    if kernel is None and not reasons and not runtime.cache_kernels:
        return "xla", (f"there is no kernel that reads packed caches on {runtime.device.platform}",)
    return "xla" if kernel is None else kernel.name, tuple(f"{name}: {why}" for name, why in reasons)


def _cached(cache: QCache) -> Cached:
    spec, stored = cache.spec.spec, cache.spec.stored
    grouped = isinstance(stored.granularity, PerGroup) and cache.spec.per == "token"
    group = 1 if cache.spec.per == "channel" else stored.granularity.size if grouped else None
    if not isinstance(spec, IntSpec) or spec.float_zero or spec.signed != spec.symmetric:
        return Cached("other", spec.bits if spec is not None else 16, group, cache.spec.tokens)
    return Cached("int" if spec.signed else "uint", spec.bits, group, cache.spec.tokens)


def _is_attend(eqn: Any) -> bool:
    body, _ = compat.parts(eqn.params["jaxpr"])
    shapes = tuple((v.aval.shape, v.aval.dtype, v.aval.weak_type) for v in body.invars)
    fits = len(shapes) == 4 and [len(shape) for shape, *_ in shapes] == [5, 4, 4, 0]
    return fits and canonical_jaxpr(eqn.params["jaxpr"]) == _own(shapes)


@functools.lru_cache(maxsize=64)
def _own(shapes: tuple[Any, ...]) -> Any:
    return canonical_jaxpr(jax.make_jaxpr(attend)(*(jax.ShapeDtypeStruct(s, d, weak_type=weak) for s, d, weak in shapes)))


def _differentiable(eqn: Any, kernel: CacheKernel, read: CacheRead, forced: bool) -> Read:
    """The read with the derivatives of the plain one, and where it is lowered for another platform or several devices that one."""

    def plain(q: jax.Array, k: QCache, v: QCache, position: jax.Array) -> jax.Array:
        return compat.bind(eqn, [q, materialize(k), materialize(v), position])[0]

    fast = _vmappable(kernel, read, plain, forced)

    @jax.custom_vjp
    def run(q: jax.Array, k: QCache, v: QCache, position: jax.Array) -> jax.Array:
        return fast(q, k, v, position)

    def forward(*given: Any) -> tuple[jax.Array, Any]:
        return fast(*given), given

    def backward(given: Any, t: jax.Array) -> Any:
        return jax.vjp(plain, *given)[1](t)

    run.defvjp(forward, backward)
    return run


def _vmappable(kernel: CacheKernel, read: CacheRead, slow: Read, forced: bool) -> Read:
    """Axes that `vmap` added in front of queries and caches are sequences more of the same read."""

    def fast(q: jax.Array, k: QCache, v: QCache, position: jax.Array) -> jax.Array:
        return _on_kernel(kernel, read, q, k, v, position)

    @jax.custom_batching.custom_vmap
    def run(q: jax.Array, k: QCache, v: QCache, position: jax.Array) -> jax.Array:
        if forced:
            return lax.platform_dependent(q, k, v, position, **{kernel.platform: fast})
        return lax.platform_dependent(q, k, v, position, **{kernel.platform: alone_or(fast, slow)}, default=slow)

    @run.def_vmap
    def rule(size: int, batched: Any, *given: Any) -> tuple[jax.Array, bool]:
        axes = jax.tree.map(lambda own: 0 if own else None, tuple(batched))
        if not all(jax.tree.leaves(batched[:3])):  # what all share would be copied for each
            if forced:
                raise ValueError(f"`kernel` {kernel.name!r} cannot run {CALL}: some of its queries, keys and values alone are vmapped")
            return jax.vmap(slow, in_axes=axes)(*given), True
        q, k, v, position = given
        position = position if batched[3] else jnp.broadcast_to(position, (size, *position.shape))
        return _vmappable(kernel, read, jax.vmap(slow), forced)(q, k, v, position), True

    return run


def _on_kernel(kernel: CacheKernel, read: CacheRead, q: jax.Array, k: QCache, v: QCache, position: jax.Array) -> jax.Array:
    """q (extra..., B, H, N, 1, D); the packed tokens by the kernel, joined with those in float by the sums of both softmaxes."""
    *lead, h, n, _, d = q.shape
    queries = q.reshape(-1, h, n, d)
    rows = queries.shape[0]
    seen = jnp.broadcast_to(position[..., None], lead).reshape(rows).astype(jnp.int32) + 1
    length = k.length.reshape(rows, h)[:, 0]
    packed = jnp.minimum(past_tokens(length, k.spec), seen)
    turned = hadamard_transform(queries.astype(jnp.float32)).astype(q.dtype) if k.spec.rotate else queries
    operands = CacheOperands(turned.reshape(rows, h * n, d), _tokens(k, rows, h), _tokens(v, rows, h), packed)
    old, total = kernel.run(read, operands)
    old = old.reshape(queries.shape).astype(jnp.float32)
    old = hadamard_transform(old, inverse=True) if v.spec.rotate else old
    if k.spec.held:
        old = _with_window(queries, old, total.reshape(rows, h, n), k, v, length, seen)
    return old.astype(q.dtype).reshape(q.shape)


def _tokens(cache: QCache, rows: int, h: int) -> Tokens:
    past = cache.past
    zero = None if past.zero_point is None else past.zero_point.astype(jnp.float32).reshape(rows, h, -1)
    return Tokens(past.codes.reshape(rows, h, -1, past.codes.shape[-1]), past.scales().reshape(rows, h, -1), zero)


def _with_window(
    q: jax.Array, old: jax.Array, total: jax.Array, k: QCache, v: QCache, length: jax.Array, seen: jax.Array
) -> jax.Array:
    """The result over packed tokens, `old` with the log-sum-exp `total`, joined with that over the tokens in float."""
    rows, h, _, d = q.shape
    keys, values = (c.window.reshape(rows, h, -1, d).astype(q.dtype) for c in (k, v))
    tokens = jax.vmap(lambda end: latest_tokens(end, k.spec.held))(length)  # (rows, slots)
    first = past_tokens(length, k.spec)[:, None]
    there = ((tokens >= first) & (tokens < seen[:, None]))[:, None, None]
    scores = jnp.einsum("bhnd,bhsd->bhns", q, keys, preferred_element_type=jnp.float32) * (1 / math.sqrt(d))
    scores = jnp.where(there, scores, _LOW)
    largest = jnp.maximum(total, scores.max(axis=-1))[..., None]
    p, before = jnp.where(there, jnp.exp(scores - largest), 0.0), jnp.exp(total[..., None] - largest)
    whole = p.sum(axis=-1, keepdims=True) + before
    new = jnp.einsum("bhns,bhsd->bhnd", (p / whole).astype(values.dtype), values, preferred_element_type=jnp.float32)
    return new + old * (before / whole)
