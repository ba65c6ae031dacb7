"""QCache: the keys or values of past tokens, packed, and those of the latest tokens in float; what it is made by and read with."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.granularity import Granularity, PerChannel, PerGroup, PerToken
from qjax.core.hadamard import hadamard_transform
from qjax.core.qtensor import QTensor, quantize, quantize_unchecked
from qjax.core.specs import CastSpec, LearnedSpec, Spec, check_flag

CHANNEL_GROUP = 32  # tokens that share the scale of a channel, unless told otherwise: KIVI's group


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a cache becomes. Built by `kv_cache`.

    Attributes:
      spec: what the numbers of past tokens are rounded to; None leaves the cache float.
      per: "token" or "channel": which numbers share a scale.
      group_size: per token, channels that share a scale, None for all of them; per channel, tokens that do.
      window: how many of the latest tokens stay float.
      rotate: whether packed tokens are rotated along the channels.
    """

    spec: Spec | None
    per: Literal["token", "channel"] = "token"
    group_size: int | None = None
    window: int = 32
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.spec is not None:
            _check_spec(self.spec)
        if self.per not in ("token", "channel"):
            raise ValueError(f"`per` must be 'token' or 'channel', got {self.per!r}")
        if self.group_size is not None:
            _check_count("group_size", self.group_size, 1, "or None")
            own = _own_group(self.spec)
            if own not in (None, self.group_size):
                raise ValueError(f"`group_size` {self.group_size} contradicts {self.spec}, whose groups are of {own}: give one of them")
        _check_count("window", self.window, 0, "the number of latest tokens that stay float")
        check_flag("rotate", self.rotate)

    @property
    def tokens(self) -> int:
        """Tokens that are rounded together: 1, or a group of them that shares the scales of its channels."""
        return 1 if self.per == "token" else self.group_size or _own_group(self.spec) or CHANNEL_GROUP

    @property
    def held(self) -> int:
        """Tokens that the float buffer holds: the window, and a group that is not full yet."""
        return self.window + self.tokens - 1

    @property
    def stored(self) -> Any:
        """The spec of what is packed, with the granularity that it has along the axis of channels or of tokens."""
        group = self.tokens if self.per == "channel" else self.group_size or _own_group(self.spec)
        granularity: Granularity = PerChannel() if group is None else PerGroup(group)
        return dataclasses.replace(self.spec, granularity=granularity)  # type: ignore[type-var]

    def __str__(self) -> str:
        if self.spec is None:
            return "float"
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        name = str(self.spec).replace('per="channel", ', "").replace('per="channel"', "")  # the default, which says nothing here
        rotate = ", rotate=True" if self.rotate else ""
        return f'kv_cache({name}, per="{self.per}"{group}, window={self.window}{rotate})'


def kv_cache(
    spec: Spec | None,
    per: Literal["token", "channel"] = "token",
    *,
    group_size: int | None = None,
    window: int = 32,
    rotate: bool = False,
) -> CacheSpec:
    """A cache of keys or values whose past tokens are packed; the latest stay float.

    Token t < n of n is rounded once, when `window` later ones have come: alone (`per="token"`, a scale for each of its groups of
    channels), or with the `group_size` tokens that it shares the scales of its channels with (`per="channel"`).

    Args:
      spec: integers, a fixed table or a float format, without a granularity of its own or with groups; None leaves the cache float (for
        an exception in front of a wider rule). Asymmetric ones such as `qjax.uint4()` fit keys and values best.
      per: "token", or "channel" as KIVI does for keys, whose outliers keep to few channels.
      group_size: per token, how many channels share a scale, None for all; per channel, how many tokens do, 32 unless told.
      window: latest tokens that stay float. Per channel up to `group_size - 1` more do, until their group is full.
      rotate: multiply a token by a Hadamard matrix along its channels before it is rounded, and back when it is read
        (`hadamard_transform`): what is large in few channels, as in keys, is spread over all, and coarsens the others less. The model
        stays as it is.

    Returns:
      A `CacheSpec` for `qjax.Rule(cache=...)`.

    Raises:
      TypeError: `spec` is no spec, or a cast.
      ValueError: an argument out of range; a spec whose scales span a tensor or a block; a learned table.

    Example:
      >>> import qjax
      >>> str(kv_cache(qjax.uint4(), per="channel", window=16))
      'kv_cache(uint4(), per="channel", window=16)'

    Source: KIVI (arXiv 2402.02750): keys per channel, values per token, groups of 32, a residual of 128 tokens in float. There the
    residual is packed as a whole when it is full, so between 0 and 128 of the latest tokens are float; here it slides, so that never
    fewer than `window` are. There a prompt attends to its own float numbers; here what is older than the window is read packed, in the
    pass that writes it, too. Rotated keys: QuaRot (arXiv 2404.00456), section 4, which rotates queries too and never rotates back.
    """
    return CacheSpec(spec, per, group_size, window, rotate)


def _check_spec(spec: Any) -> None:
    if isinstance(spec, CastSpec):
        raise TypeError(f"`spec` of a cache must round to codes, got the cast {spec}: make the cache in that dtype instead")
    if not isinstance(spec, Spec):
        raise TypeError(f"`spec` of a cache must be a spec such as qjax.int4(), or None, got {spec!r}")
    if isinstance(spec, LearnedSpec):
        raise ValueError(f"`spec` of a cache must not be {spec}, whose table would be fitted to every token anew: "
                         f"take integers such as qjax.uint{spec.bits}(), or a fixed table such as qjax.nf4()")  # fmt: skip
    granularity = getattr(spec, "granularity", None)
    if not isinstance(granularity, (PerChannel, PerToken, PerGroup)):
        raise ValueError(f"`spec` of a cache must have no granularity of its own but groups, got {spec}: scales go by `per`")


def _check_count(argument: str, value: Any, least: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{argument}` must be an int of at least {least}, {what}, got {value!r}")


def _own_group(spec: Any) -> int | None:
    granularity = getattr(spec, "granularity", None)
    return granularity.size if isinstance(granularity, PerGroup) else None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["past", "window", "length"], meta_fields=["spec", "axis", "capacity"]
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QCache:
    """A cache of n <= capacity tokens. Built by `init_cache`, changed by `append_cache`, which give a new one.

    With G = `spec.tokens`, the tokens before `past_tokens(n) = G floor(max(n - spec.window, 0) / G)` are packed and the others are
    float. Inside, time is the last axis but one. Leading axes may be added or removed by `vmap` and `scan`.

    Invariants:
      past: a `QTensor` (..., ceil(capacity / G), G, channels): groups of tokens. What it holds from past_tokens(n) on means nothing.
      window: (..., spec.held, channels) in the logical dtype, a ring: token t is at t mod spec.held.
      length: int32 (...), n; equal everywhere unless rows were given their own positions by `vmap`.
      spec: what it was made with.
      axis: negative logical position of time.
      capacity: tokens that it has room for.
    """

    past: QTensor
    window: Any
    length: Any
    spec: CacheSpec
    axis: int
    capacity: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        rest = [*self.window.shape[:-2], self.window.shape[-1]]
        rest.insert(len(rest) + 1 + self.axis, self.capacity)
        return tuple(rest)

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return len(self.window.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of what is read, and of the float tokens."""
        return np.dtype(self.window.dtype)

    @property
    def size(self) -> int:
        """The number of logical elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that all the arrays inside take."""
        return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(self))

    def quantized_tokens(self, length: int) -> int:
        """How many of `length` tokens are packed.

        >>> import qjax
        >>> init_cache((2, 64, 8), jnp.float32, qjax.kv_cache(qjax.int4(), window=16), axis=1).quantized_tokens(64)
        48
        """
        return int(past_tokens(length, self.spec))

    def read(self) -> jax.Array:
        """The array of `shape` and `dtype` that it stands for; zeros where no token is yet."""
        return read_cache(self)

    def append(self, new: jax.Array, position: Any) -> QCache:
        """`append_cache`."""
        return append_cache(self, new, position)

    def _packed(self, *_: Any) -> Any:
        raise TypeError(f"{self!r} is packed and has no arithmetic: run the function as qjax.quantized(fn), or .read() it")

    __matmul__ = __rmatmul__ = __add__ = __radd__ = __mul__ = __rmul__ = __getitem__ = _packed

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.read(), dtype=dtype)

    def __repr__(self) -> str:
        if not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in jax.tree.leaves(self)):
            return f"QCache({self.spec}, holding {', '.join(type(a).__name__ for a in jax.tree.leaves(self))})"
        shape = ",".join(map(str, self.shape))
        bits = self.nbytes * 8 / self.size if self.size else 0.0
        before = self.size * self.dtype.itemsize
        more = f": no fewer than the {before:,} of a float cache, for {self.spec.held} tokens stay float" if self.nbytes >= before else ""
        return f"QCache({self.spec}, {self.dtype}[{shape}], {self.nbytes:,} bytes, {bits:.3g} bits/value{more})"


def init_cache(shape: tuple[int, ...], dtype: Any, spec: CacheSpec, axis: int, *, name: str = "cache") -> QCache:
    """An empty packed cache.

    Args:
      shape: logical shape of at least two axes: time, channels (the last that is not time), and any others.
      dtype: logical, floating; float tokens are kept in it.
      spec: what it becomes.
      axis: the axis of time, along which tokens are appended.
      name: what an error calls it.

    Returns:
      A `QCache` without a token.

    Raises:
      TypeError: `dtype` is not floating, or `spec` leaves the cache float.
      ValueError: `axis` out of range; a group that does not divide the channels; no room for a token beyond those that stay float; a
        format that shares numbers between tokens.

    >>> import qjax
    >>> init_cache((2, 4, 256, 64), jnp.bfloat16, qjax.kv_cache(qjax.int4(), window=16), axis=2)
    QCache(kv_cache(int4(), per="token", window=16), bfloat16[2,4,256,64], 90,144 bytes, 5.5 bits/value)
    """
    if not isinstance(spec, CacheSpec) or spec.spec is None:
        raise TypeError(f"`spec` of `{name}` must be qjax.kv_cache(...) with a spec, got {spec}")
    ndim, dtype = len(shape), np.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` of `{name}` must be floating, got {dtype}")
    if ndim < 2 or not -ndim <= axis < ndim:
        raise ValueError(f"`axis` must be one of the {ndim} axes of `{name}`, which needs two at least, got {axis}")
    axis = axis % ndim - ndim
    capacity, rest = shape[axis], [n for i, n in enumerate(shape, -ndim) if i != axis]
    if spec.held >= capacity:
        raise ValueError(f"`{name}` has room for {capacity} tokens, of which {spec} leaves up to {spec.held} float: "
                         "take a shorter `window` or a smaller `group_size`, or leave it float")  # fmt: skip
    *lead, channels = rest
    groups = -(-capacity // spec.tokens)
    empty = jax.ShapeDtypeStruct((*lead, groups, spec.tokens, channels), dtype)
    past = jax.eval_shape(functools.partial(_rounded, spec=spec, rounding=functools.partial(quantize, name=name)), empty)
    shared = [leaf.shape for leaf in jax.tree.leaves(past) if len(leaf.shape) <= len(lead) or leaf.shape[len(lead)] != groups]
    if shared:
        raise ValueError(f"`spec` {spec.spec} of `{name}` shares numbers between tokens, which come one after the other: take another")
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), past)
    window = jnp.zeros((*lead, spec.held, channels), dtype)
    return QCache(zeros, window, jnp.zeros(tuple(lead), jnp.int32), spec, axis, capacity)


def append_cache(cache: QCache, new: jax.Array, position: Any) -> QCache:
    """Writes tokens `position .. position + t - 1`; `dynamic_update_slice` along time on the packed form.

    What is written before `position` stays, what was after it is forgotten; so a position that goes back takes tokens back. Of the
    tokens that are among the latest then, those whose float numbers are gone stay as they were rounded. A position that wraps round to
    begin at 0 again, as in a cache that keeps a sliding window, forgets everything.

    Args:
      cache: of n >= position tokens.
      new: the logical shape of the cache, but t along time. Its numbers are not looked at: NaN is read back as NaN from whatever shares
        a scale with it.
      position: int scalar; clamped so that the tokens fit, as `dynamic_update_slice` does.

    Returns:
      The cache of position + t tokens.

    >>> import qjax
    >>> cache = init_cache((4, 2), jnp.float32, qjax.kv_cache(qjax.int2(scale_rule="full"), window=1), axis=0)
    >>> cache = append_cache(cache, jnp.float32([[1.0, 0.4], [1.0, 0.4]]), 0)
    >>> cache.read()[:2].tolist()
    [[1.0, 0.0], [1.0, 0.4000000059604645]]
    """
    spec = cache.spec
    new = jnp.moveaxis(new, cache.axis, -2).astype(cache.dtype)
    count = new.shape[-2]
    start = jnp.clip(jnp.asarray(position, jnp.int32), 0, cache.capacity - count)
    window = _ring_before(cache, start)
    first = past_tokens(start, spec)
    groups = -(-count // spec.tokens)  # no more than these can fill up; what of them is not full yet is written again later
    tokens = first + jnp.arange(groups * spec.tokens, dtype=jnp.int32)
    leaving = _tokens_at(window, new, start, tokens, count)
    blocks = leaving.reshape(*leaving.shape[:-2], groups, spec.tokens, leaving.shape[-1])
    past = _write_groups(cache, _rounded(blocks, spec), first // spec.tokens, start)
    end = start + count
    if spec.held and count:
        slots = latest_tokens(end, spec.held)
        window = jnp.where(_column(slots >= start, cache.ndim), _take(new, slots - start), window)
    return QCache(past, window, jnp.broadcast_to(end, cache.length.shape), spec, cache.axis, cache.capacity)


def read_cache(cache: QCache) -> jax.Array:
    """The numbers that a cache stands for: packed tokens dequantized, the latest as they are, zeros after them.

    Args:
      cache: a `QCache`.

    Returns:
      An array of its logical shape and dtype.

    >>> import qjax
    >>> read_cache(init_cache((4, 2), jnp.float32, qjax.kv_cache(qjax.int4(), window=1), axis=0)).tolist()[0]
    [0.0, 0.0]
    """
    x = _numbers(cache.past, cache)[..., : cache.capacity, :]
    times = _column(jnp.arange(cache.capacity, dtype=jnp.int32), cache.ndim)
    length = jnp.asarray(cache.length)[..., None, None]
    if cache.spec.held:
        turns = -(-cache.capacity // cache.spec.held)
        ring = jnp.concatenate([cache.window] * turns, axis=-2)[..., : cache.capacity, :]
        x = jnp.where(times < past_tokens(length, cache.spec), x, ring)
    return jnp.moveaxis(jnp.where(times < length, x, jnp.zeros((), x.dtype)), -2, cache.axis)


def _rounded(blocks: jax.Array, spec: CacheSpec, rounding: Callable[..., QTensor] = quantize_unchecked) -> QTensor:
    """Groups of tokens (..., groups, tokens, channels), packed."""
    if spec.rotate:
        blocks = hadamard_transform(blocks.astype(jnp.float32))
    return rounding(blocks, spec.stored, axes=(-1 if spec.per == "token" else -2,))


def _numbers(past: QTensor, cache: QCache) -> jax.Array:
    """The tokens of packed groups (..., tokens, channels), dequantized."""
    x = past.dequantize()
    x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    return hadamard_transform(x, inverse=True).astype(cache.dtype) if cache.spec.rotate else x


def past_tokens(length: Any, spec: CacheSpec) -> Any:
    """How many of `length` tokens are packed."""
    leaving = jnp.maximum(length - spec.window, 0) if not isinstance(length, int) else max(length - spec.window, 0)
    return leaving // spec.tokens * spec.tokens


def latest_tokens(end: jax.Array, held: int) -> jax.Array:
    """Of each slot of a ring the latest token before `end` that belongs there; negative where there is none."""
    slots = jnp.arange(held, dtype=jnp.int32)
    return end - 1 - (end - 1 - slots) % held


def _column(x: jax.Array, ndim: int) -> jax.Array:
    """Numbers of tokens, along the axis of time."""
    return x.reshape((1,) * (ndim - 2) + (-1, 1))


def _take(x: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take(x, tokens, axis=-2, mode="clip")


def _tokens_at(window: jax.Array, new: jax.Array, start: jax.Array, tokens: jax.Array, count: int) -> jax.Array:
    """Tokens by number, out of the ring before `start` and out of the new ones; those after them hold anything."""
    held = window.shape[-2]
    fresh = _take(new, jnp.clip(tokens - start, 0, count - 1))
    return jnp.where(_column(tokens >= start, new.ndim), fresh, _take(window, tokens % held)) if held else fresh


def _write_groups(cache: QCache, groups: QTensor, first: jax.Array, start: jax.Array) -> QTensor:
    """The past with groups from number `first` on replaced, but for those before `start` that it holds: they are not rounded again."""
    at, held = cache.ndim - 2, past_tokens(jnp.asarray(cache.length), cache.spec)[..., None]
    count = groups.shape[at]
    ends = (first + jnp.arange(1, count + 1, dtype=jnp.int32)) * cache.spec.tokens
    keep = ends.reshape((1,) * at + (-1,)) <= jnp.minimum(held, start)

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        there = jax.lax.dynamic_slice_in_dim(old, first, count, axis=at)
        new = jnp.where(keep.reshape(keep.shape + (1,) * (new.ndim - keep.ndim)), there, new)
        return jax.lax.dynamic_update_slice_in_dim(old, new, first, axis=at)

    return jax.tree.map(write, cache.past, groups)


def _ring_before(cache: QCache, start: jax.Array) -> jax.Array:
    """The ring as it was when there were `start` tokens: where later ones took their place, as they were rounded."""
    spec = cache.spec
    if not spec.held:
        return cache.window
    at, groups = cache.ndim - 2, cache.past.codes.shape[cache.ndim - 2]
    count = min(-(-(spec.held + spec.tokens - 1) // spec.tokens), groups)
    first = jnp.minimum(jnp.maximum(start - spec.held, 0) // spec.tokens, groups - count)
    # A slice: in front of a gather XLA lays all of the past out anew, in every step.
    near = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count, axis=at), cache.past)
    rounded = _numbers(near, cache)
    slots = latest_tokens(start, spec.held)
    later = _column(slots + spec.held, cache.ndim) < jnp.asarray(cache.length)[..., None, None]
    lost = later & _column(slots >= 0, cache.ndim)
    return jnp.where(lost, _take(rounded, slots - first * spec.tokens), cache.window)
