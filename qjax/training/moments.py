"""Moments of optimizers in 8 bits: codes of the dynamic map and the largest magnitude of each block of 256."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qjax.core import DYNAMIC, UNSIGNED_DYNAMIC, codebook_decode, codebook_params, dynamic_encode
from qjax.core.specs import as_count, check_number, is_number

_SECTIONS = 16  # of an axis, of which each part takes rows: up to so many devices have shards of it and go over their own rows only


class Moment8(NamedTuple):
    """A moment in 8 bits.

    Attributes:
      codes: uint8, of the shape of the parameter, so that a sharding of the parameter fits it as it is.
      absmax: float32 (leading axes..., blocks), see `Blocks`.
    """

    codes: jax.Array
    absmax: jax.Array


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How moments are stored.

    Blocks follow each other in the flat array, row by row, as bitsandbytes has them. The largest magnitudes keep the leading axes that no
    block crosses: of a stack (layers, K, N) with K N a multiple of the block they are (layers, K N / size), and (layers, K, N / size)
    where N is a multiple itself. So they lie on the devices where the codes lie whenever a shard holds whole blocks; where shards cut
    blocks, codes keep their sharding, and where the few largest magnitudes lie after a step is the compiler's choice.

    Args:
      size: values that share a largest magnitude.
      at_once: values that an update has in float32 at a time, about; None: whole arrays. Without it, the float copies of a stack of layers
        would be as large as the state that 8 bits save. A part takes rows of 16 sections of an axis, so up to 16 shards of the axis stay
        where they are; with more of them, or none of 16 that divide it, take None. On a mesh with explicit axes arrays stay whole.
      at_least: arrays of fewer values keep their moments in float32. Norms, biases and small tables hold next to nothing of a model's
        state, and are what 8 bits would hurt: few values of very different size in one block.

    Raises:
      ValueError: naming the argument.

    Example:
      >>> Blocks().layout((3, 32, 48)), Blocks().layout((1000, 3))
      (((3,), 6, 0), ((), 12, 72))

    Source: Dettmers et al. 2022, arXiv 2110.02861, section 2.1; the sizes are those of bitsandbytes 0.50 (`min_8bit_size`).
    """

    size: int = 256
    at_least: int = 4096
    at_once: int | None = 2**20

    def __post_init__(self) -> None:
        for name, least in (("size", 2), ("at_least", 0), ("at_once", 1)):
            value = getattr(self, name)
            if value is not None or name != "at_once":
                object.__setattr__(self, name, as_count(name, value, least))

    def layout(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """The leading axes, how many blocks stand behind them, and how many values the last block lacks."""
        for first in reversed(range(len(shape))):
            length = math.prod(shape[first:])
            if length % self.size == 0:
                return tuple(shape[:first]), length // self.size, 0
        total = math.prod(shape)
        return (), -(-total // self.size), -total % self.size

    def zeros(self, p: Any, signed: bool) -> Moment8 | jax.Array:
        """A moment of zeros for a parameter, where the parameter lies."""
        if getattr(p, "size", 1) < self.at_least:  # a number of Python has no size
            return jnp.zeros_like(p, dtype=jnp.float32)
        lead, count, _ = self.layout(p.shape)
        zero = _spec(signed).levels.index(0.0)
        codes = jnp.full_like(p, zero, dtype=jnp.uint8)
        return Moment8(codes, jnp.zeros((*lead, count), jnp.float32, device=self._placed(p)))

    def read(self, moment: Moment8 | jax.Array, signed: bool) -> jax.Array:
        """The moment in float32; of a `Moment8` codes are blocks (..., size)."""
        return codebook_decode(moment.codes, moment.absmax[..., None], _spec(signed)) if isinstance(moment, Moment8) else moment

    def write(self, x: jax.Array, old: Moment8 | jax.Array, signed: bool) -> Moment8 | jax.Array:
        """Stores a moment as `old` is stored. Without a sign, what is no zero does not become one (see `adam8bit`)."""
        if not isinstance(old, Moment8):
            return x
        absmax = codebook_params(x, _spec(signed))
        codes = dynamic_encode(x, absmax, signed)
        if not signed:
            codes = jnp.maximum(codes, (x > 0).astype(jnp.uint8))
        return Moment8(codes, absmax[..., 0])

    def update(self, run: Callable[..., tuple[Any, ...]], g: jax.Array, moments: Sequence[Any]) -> tuple[Any, ...]:
        """Calls `run` with a gradient and its moments, in blocks, and returns its results as they came.

        Raises:
          ValueError: moments were made for an array of another shape.
        """
        if not all(isinstance(m, Moment8) for m in moments):
            _check_shapes(g, moments)
            return run(g, *moments)
        lead, count, _ = self.layout(g.shape)
        for m in moments:
            if m.codes.shape != g.shape or m.absmax.shape != (*lead, count):
                raise ValueError(
                    f"`state` holds codes of shape {m.codes.shape} with {m.absmax.shape} largest magnitudes for a gradient of shape "
                    f"{g.shape}, which has {(*lead, count)} blocks of {self.size}: call init with the same `blocks` and where update is "
                    "called (inside a shard_map, on the shards)"
                )
        blocked = self._blocked(g), *(Moment8(self._blocked(m.codes), m.absmax) for m in moments)
        move, *new = self._in_parts(run, blocked, (*lead, count), _explicit(g))
        stored = [Moment8(self._flat(n.codes, m.codes), _alike(n.absmax, m.absmax)) for n, m in zip(new, moments, strict=True)]
        return self._flat(move, g), *stored

    def _in_parts(self, run: Any, blocked: tuple[Any, ...], rows: tuple[int, ...], explicit: bool) -> tuple[Any, ...]:
        """A part of one axis at a time, in place: what is in float32 is a part."""
        axis, outer, parts = _parts(rows, self.size, self.at_once)
        if parts == 1 or explicit:
            return run(*blocked)

        def step(i: jax.Array, carry: Any) -> Any:
            part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False), carry)
            put = lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, i, axis + 1)  # noqa: E731
            return jax.tree.map(put, carry, run(*part))

        split = jax.tree.map(lambda x: x.reshape(*x.shape[:axis], outer, parts, -1, *x.shape[axis + 1 :]), blocked)
        done = jax.lax.fori_loop(0, parts, step, split)
        return jax.tree.map(lambda x, like: x.reshape(like.shape), done, blocked)

    def _blocked(self, x: jax.Array) -> jax.Array:
        lead, count, short = self.layout(x.shape)
        if _explicit(x):
            x = jax.sharding.reshard(x, self._sharding(x))
            if not short:
                return jax.lax.reshape(x, (*lead, count, self.size), out_sharding=self._sharding(x))
        if short:
            x = jnp.pad(x.reshape(-1), (0, short))
        return x.reshape(*lead, count, self.size)

    def _flat(self, blocked: jax.Array, like: jax.Array) -> jax.Array:
        if self.layout(like.shape)[2]:
            blocked = blocked.reshape(-1)[: math.prod(like.shape)]
        if not _explicit(like):
            return _alike(blocked.reshape(like.shape), like)
        x = jax.lax.reshape(blocked, like.shape, out_sharding=self._sharding(like))
        return jax.sharding.reshard(x, jax.typeof(like).sharding)

    def _sharding(self, x: Any) -> NamedSharding:
        """That of an array's blocks: of its leading axes and the first that blocks run over, as far as shards hold whole blocks."""
        sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
        lead, _, short = self.layout(x.shape)
        parts, first = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))], len(lead)
        whole = math.prod(sharding.shard_shape(x.shape)[first:]) % self.size == 0 and not any(parts[first + 1 :])
        kept = [*parts[:first], parts[first] if whole and not short else None]
        while kept and kept[-1] is None:  # as the compiler writes it, so that the first step's state has the type of the second's
            kept.pop()
        return NamedSharding(sharding.mesh, PartitionSpec(*kept))

    def _placed(self, p: Any) -> NamedSharding | None:
        """Where the largest magnitudes lie: on the devices of their codes, or on all where a shard cuts blocks."""
        known = _explicit(p) if isinstance(p, Tracer) else isinstance(getattr(p, "sharding", None), NamedSharding)
        return self._sharding(p) if known else None


def _explicit(x: Any) -> bool:
    """Whether the type of an array says where it lies."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _alike(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, where `like` lies: where a shard cuts blocks, the compiler would leave it where it was computed."""
    # A choice between both, of which it drops one after it has settled where both lie.
    return x if _explicit(x) else jax.lax.select(jnp.zeros(x.shape, bool), like, x)


def _parts(rows: tuple[int, ...], size: int, at_once: int | None) -> tuple[int, int, int]:
    """The axis along which to go in parts, in how many sections each of them takes its rows, and how many parts there are."""
    wanted, best = 1 if at_once is None else -(-math.prod(rows) * size // at_once), (0, 1, 1)
    for axis, n in enumerate(rows):
        outer = math.gcd(n, _SECTIONS)
        parts = next((k for k in range(min(wanted, n // outer), 0, -1) if (n // outer) % k == 0), 1)
        best = (axis, outer, parts) if parts > best[2] else best
    return best


def _check_shapes(g: Any, moments: Sequence[Any]) -> None:
    for shape in (m.codes.shape if isinstance(m, Moment8) else jnp.shape(m) for m in moments):
        if shape != jnp.shape(g):
            raise ValueError(f"`state` holds a moment of shape {shape} for a gradient of shape {jnp.shape(g)}: call init for the "
                             "parameters that these are the gradients of")  # fmt: skip


def _spec(signed: bool) -> Any:
    return DYNAMIC if signed else UNSIGNED_DYNAMIC


def for_each(run: Callable[..., tuple[Any, ...]], blocks: Blocks, updates: Any, *moments: Any) -> tuple[Any, ...]:
    """Calls `run` with each array of a tree of updates and its moments.

    Args:
      run: a function of an update and its moments, which returns as many results, of the same shapes.
      blocks: how moments are stored.
      updates: a tree; None has no moments.
      moments: trees with an array or a `Moment8` for each of its arrays.

    Returns:
      A tree for each result.

    Raises:
      ValueError: the moments are of another tree, or of arrays of other shapes.
    """
    leaves, tree = jax.tree.flatten(updates)
    found = [blocks.update(run, g, each) for g, *each in zip(leaves, *(_moments_of(updates, tree, each) for each in moments), strict=True)]
    return tuple(tree.unflatten([one[i] for one in found]) for i in range(1 + len(moments)))


def _moments_of(updates: Any, tree: Any, moments: Any) -> list[Any]:
    """The moment of each array of a tree of updates."""
    try:
        found = tree.flatten_up_to(moments)
    except ValueError:  # nothing else says whether a tree is the front of another one
        raise ValueError(f"`updates` are of another tree than `state`: {_first_difference(updates, moments)}; call init for the "
                         "parameters that these are the gradients of") from None  # fmt: skip
    return [_whole(m) for m in found]


def _whole(moment: Any) -> Any:
    """A moment as it was stored: an `nnx.Optimizer` puts the two arrays of a `Moment8` back by name."""
    stored = isinstance(moment, Mapping) and set(moment) == set(Moment8._fields)
    return Moment8(**{name: moment[name] for name in Moment8._fields}) if stored else moment


def _first_difference(updates: Any, moments: Any) -> str:
    given, held = (
        [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in
         jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Moment8))]
        for tree in (updates, moments)
    )  # fmt: skip
    for these, those, what in ((given, held, "there is no moment of"), (held, given, "there is no gradient of")):
        missing = next((path for path in these if path not in those), None)
        if missing is not None:
            return f"{what} {missing!r}"
    return f"{type(updates).__name__} and {type(moments).__name__}"


def check_state(state: Any, kind: type) -> None:
    """Refuses the state of another optimizer, which may well have the same fields.

    Raises:
      TypeError: naming what it is.
    """
    if not isinstance(state, kind):
        raise TypeError(f"`state` must be the {kind.__name__} that init of this optimizer gave, got {type(state).__name__}: states of "
                        "other optimizers have other moments; call init, and go on from there")  # fmt: skip


def chained(*parts: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.chain`, which refuses what is no state of a chain before it looks into it."""
    tx = optax.chain(*parts)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
        if not isinstance(state, tuple) or len(state) != len(parts):
            raise TypeError(f"`state` must be what init of this optimizer gave, {len(parts)} states in a tuple, got {_named(state)}")
        return tx.update(updates, state, params, **more)

    return tx._replace(update=update)


def _named(state: Any) -> str:
    return f"{type(state).__name__} of {len(state)}" if isinstance(state, tuple) else type(state).__name__


def check_decays(**decays: Any) -> None:
    """Refuses decays outside of 0 .. 1, 1 excluded; arrays, as `optax.inject_hyperparams` gives them, are not looked into.

    Raises:
      TypeError: naming what is no number.
      ValueError: naming what is out of range.
    """
    for name, value in decays.items():
        if not isinstance(value, (np.ndarray, jax.Array)):
            check_number(name, value, below=1)


def check_eps(eps: Any) -> None:
    """Refuses what is no number, or below 0; arrays are not looked into."""
    if not isinstance(eps, (np.ndarray, jax.Array)):
        check_number("eps", eps)


def check_decay(weight_decay: Any, mask: Any) -> None:
    """Refuses a mask of nothing, and what is no mask."""
    if mask is not None and weight_decay is None:
        raise ValueError("`mask` says which parameters decay, and `weight_decay` is None: give it, or leave `mask` out")
    if not callable(mask) and not all(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(mask)):
        raise TypeError(f"`mask` must be a tree of True and False like the parameters, or a function that gives it, got {mask!r}")


def check_rates(**rates: Any) -> None:
    """Refuses what is no number and no schedule; arrays are not looked into.

    Raises:
      TypeError, ValueError: naming the argument.
    """
    for name, value in rates.items():
        what = f"`{name}` must be a finite number or a schedule, a function of the step, got {value!r}"
        if not (is_number(value) or callable(value) or isinstance(value, (np.ndarray, jax.Array))):
            raise TypeError(what)
        if is_number(value) and not math.isfinite(value):
            raise ValueError(what)


def check_blocks(blocks: Any) -> Blocks:
    """The argument `blocks`, if it is one."""
    if not isinstance(blocks, Blocks):
        raise TypeError(f"`blocks` must be qjax.training.Blocks(...), got {blocks!r}")
    return blocks
