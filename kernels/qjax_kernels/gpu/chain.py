"""Products of few rows that follow one another, as one launch: what comes behind attention in a layer, for Hopper GPUs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .attention import Attention, Past, attended
from .attention import check as check_attention
from .chain_shape import Link, shapes_of
from .chain_shape import check as check_link
from .operands import check_cut
from .tiles import PIECE, Direct
from .weight_only import plain, whole_rows

TILES = Direct(16, 2, 1)  # the fastest on an H200; two blocks of eight warps take 1260 us in place of 1205 in a step of a 7B shape
GATED_ROWS = 8  # of a gate, then as many of what it multiplies: half a tile


def interleaved(gate: jax.Array, other: jax.Array) -> jax.Array:
    """Codes or scales (N, ...) of a gate and of what it multiplies as (2 N, ...), eight rows of each in turn.

    Args:
      gate: (N, ...), N a multiple of 8.
      other: the same shape and dtype.

    Returns:
      What `Link(gated=True)` takes.

    Raises:
      ValueError: two shapes or dtypes, or rows that eight does not divide.

    Example:
      >>> interleaved(jnp.zeros((16, 1)), jnp.ones((16, 1)))[:, 0].astype(int).tolist()[6:18]
      [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    """
    if (gate.shape, gate.dtype) != (other.shape, other.dtype) or not gate.ndim or gate.shape[0] % GATED_ROWS:
        raise ValueError(f"`gate` is {gate.shape} {gate.dtype} and `other` {other.shape} {other.dtype}: they must be alike, of a multiple "
                         f"of {GATED_ROWS} rows")  # fmt: skip
    cut = (each.reshape(-1, 1, GATED_ROWS, *each.shape[1:]) for each in (gate, other))
    return jnp.concatenate([*cut], axis=1).reshape(-1, *gate.shape[1:])


def counters(links: int) -> jax.Array:
    """What the blocks of a launch meet by: zeros, and zeros again behind every launch, so that one array serves launches one by one.

    Args:
      links: products of the longest chain, and one more where attention stands in front.

    Returns:
      (links,) int32 zeros.

    Example:
      >>> counters(4).tolist()
      [0, 0, 0, 0]
    """
    return jnp.zeros((links,), jnp.int32)


def chain(
    inputs: Sequence[jax.Array], weights: Sequence[tuple[jax.Array, jax.Array]], counters: jax.Array, *, links: Sequence[Link],
    group_size: int, tiles: Direct | None = None, cores: int = 132, attention: Attention | None = None, past: Past | None = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Products of 1 to 8 rows, each of a value that came in or of a result before it, in one launch.

    y_i = f(r x w_i^T) + a, with x and a among the inputs and y_0 ... y_(i-1); see `Link`.

    Args:
      inputs: (M, K) bfloat16 each, M the same.
      weights: for every product codes (N, K), int8 or int4 by threads (`order.by_threads`), and scales (N, K / group_size), bfloat16,
        float16 or float32. Further columns of scales are not used.
      counters: int32 zeros, one for every product and one more with attention (`counters`), an argument of the program: the launch uses
        and clears them.
      links: what the products multiply and add.
      group_size: consecutive k that share a scale, a multiple of 128.
      tiles: the cut, of at most `tiles.CORE_WARPS` warps a multiprocessor; None for the default.
      cores: multiprocessors of the GPU; with fewer than this the launch fails.
      attention: what stands in front: inputs[0] is then q, k and v of this token, and value 0 what attention gives of them, which can be
        multiplied and not be added.
      past: what attention reads; the cache is not written (`attention.kept`).

    Returns:
      All results, (M, N) bfloat16 each (N / 2 of gated ones). Under `vmap` there is a launch after the other.

    Raises:
      ValueError: values, weights, links, attention and what came before that do not fit together, with their number; more than 8 rows, or
        than shared memory holds (7 of K = 14336).
      TypeError: arguments of another kind.
      NotImplementedError: where it is differentiated.

    All blocks of a launch must live at once, which nothing but the device's order of work sees to: let no other program run there at the
    same time. Two launches side by side may each hold half of the multiprocessors, and end with an error after seconds; with the same
    counters they compute wrong numbers.
    """
    group_size, past = _check(inputs, weights, links, group_size, attention, past)
    if inputs[0].shape[0] > 8:
        raise ValueError(f"`inputs` have {inputs[0].shape[0]} rows; a launch takes 1 to 8: `one_by_one` takes more")
    _check_launch(counters, len(links) + (attention is not None), tiles, cores)
    return _chain(tuple(inputs), tuple(weights), counters, past, links=tuple(links), group=group_size, tiles=tiles or TILES, cores=cores,
                  attention=attention)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("links", "group", "tiles", "cores", "attention"))
def _chain(inputs, weights, counters, past, *, links, group, tiles, cores, attention) -> tuple[jax.Array, ...]:
    from .attention_kernel import Heads
    from .chain_kernel import linked

    weights = [(codes, whole_rows(scales)) for codes, scales in weights]
    read = [x.shape for x in inputs]
    if attention is not None:
        read[0] = (read[0][0], attention.heads * attention.width)
    shapes = shapes_of(read, [codes.shape for codes, _ in weights], links, [s.shape[1] for _, s in weights],
                       [s.dtype for _, s in weights], [4 if codes.dtype == jnp.int4 else 8 for codes, _ in weights],
                       group=group, tiles=tiles, cores=cores)  # fmt: skip
    heads = None
    if attention is not None:
        layers, context = past.cache.shape[0], past.cache.shape[3]
        heads = Heads(attention, read[0][0], context, layers, shapes[0].blocks, tiles.warps, past.rotation is not None)
    # Blocks of a batch that Pallas puts into the grid would meet those of another by the same counters.
    launch = jax.custom_jvp(jax.custom_batching.sequential_vmap(
        functools.partial(linked, links=links, shapes=shapes, parts=tiles.blocks, heads=heads)))  # fmt: skip
    launch.defjvp(_refused)
    return launch(inputs, weights, counters, past)


def _refused(primals, tangents):
    raise NotImplementedError("`chain` has no derivative, it is a kernel of decoding: differentiate `one_by_one`, which computes the same")


def _check_launch(counters, stages, tiles, cores) -> None:
    check_cut(tiles, (Direct,), cores)
    if counters.ndim != 1 or counters.size < stages or counters.dtype != jnp.int32:
        raise ValueError(f"`counters` are {counters.shape} {counters.dtype}; make them by counters({stages})")


def _check(inputs, weights, links, group, attention, past) -> tuple[int, Past | None]:
    """The group as an int, and what came before with its layer as an array; raises where things do not fit together."""
    for name, given in (("inputs", inputs), ("weights", weights), ("links", links)):
        if not isinstance(given, list | tuple):
            raise TypeError(f"`{name}` is a {type(given).__name__}; it must be a list or tuple")
    if not inputs or any(not hasattr(x, "dtype") or x.ndim != 2 or x.dtype != jnp.bfloat16 or x.shape[0] < 1 for x in inputs):
        found = [(x.shape, str(x.dtype)) if hasattr(x, "dtype") else type(x).__name__ for x in inputs]
        raise ValueError(f"`inputs` are {found}; they must be arrays of rows of bfloat16")
    if any(x.shape[0] != inputs[0].shape[0] for x in inputs):
        raise ValueError(f"`inputs` have {[x.shape[0] for x in inputs]} rows; all must have the same number")
    group = _check_weights(weights, links, group)
    if (attention is None) != (past is None):
        raise ValueError("`attention` and `past` belong together: give both or none")
    widths = [x.shape[1] for x in inputs]
    if attention is not None:
        past, widths[0] = check_attention(inputs[0], past, attention), attention.heads * attention.width
        if any(link.added == 0 for link in links):
            raise ValueError("`added` of a product is value 0, which is what attention gives: it can be multiplied only")
    for i, (link, (codes, _)) in enumerate(zip(links, weights, strict=True)):
        n, k = codes.shape
        check_link(i, link, widths, n, k, group)
        widths.append(n // 2 if link.gated else n)
    return group, past


def _check_weights(weights, links, group) -> int:
    if not links or len(weights) != len(links) or not all(isinstance(link, Link) for link in links):
        raise ValueError(f"`links` are {len(links)} and `weights` {len(weights)}; every product has one, a Link(...) and two arrays")
    if not hasattr(group, "__index__") or operator.index(group) < 1 or operator.index(group) % PIECE:
        raise ValueError(f"`group_size` is {group!r}; it must be an int, a multiple of {PIECE}")
    group = operator.index(group)
    for i, pair in enumerate(weights):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(hasattr(part, "dtype") for part in pair):
            raise TypeError(f"weight {i} is a {type(pair).__name__}; it must be (codes, scales), two arrays")
        codes, scales = pair
        if codes.ndim != 2 or codes.dtype not in (jnp.int4, jnp.int8):
            raise ValueError(f"codes of product {i} are {codes.shape} {codes.dtype}; they must be (N, K) int4 or int8")
        wanted = codes.shape[0], codes.shape[1] // group
        if scales.ndim != 2 or scales.shape[0] != wanted[0] or scales.shape[1] < wanted[1]:
            raise ValueError(f"scales of product {i} are {scales.shape}; codes {codes.shape} in groups of {group} take {wanted}")
        if scales.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise ValueError(f"scales of product {i} are {scales.dtype}; they must be bfloat16, float16 or float32")
    return group


def one_by_one(
    inputs: Sequence[jax.Array], weights: Sequence[tuple[jax.Array, jax.Array]], *, links: Sequence[Link], group_size: int,
    attention: Attention | None = None, past: Past | None = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The same in jax, a product after the other, for any number of rows and any device: results are rounded to bfloat16 as there.

    Args:
      inputs: (M, K) bfloat16 each, M the same.
      weights: as for `chain`.
      links: what the products multiply and add.
      group_size: consecutive k that share a scale, a multiple of 128.
      attention: as for `chain`.
      past: as for `chain`.

    Returns:
      All results, (M, N) bfloat16 each (N / 2 of gated ones).

    Raises:
      ValueError, TypeError: what `chain` refuses of inputs, weights, links, attention and what came before.

    Example:
      >>> codes, scales = jnp.ones((64, 128), jnp.int8), jnp.full((64, 1), 0.5, jnp.bfloat16)
      >>> x, residual = jnp.ones((1, 128), jnp.bfloat16), jnp.ones((1, 64), jnp.bfloat16)
      >>> (y,) = one_by_one((x, residual), [(codes, scales)], links=[Link(0, added=1)], group_size=128)
      >>> y.shape, y[0, 0].item()
      ((1, 64), 65.0)
    """
    group_size, past = _check(inputs, weights, links, group_size, attention, past)
    values = list(inputs)
    if attention is not None and past is not None:
        values[0] = attended(values[0], past, attention)
    for link, (codes, scales) in zip(links, weights, strict=True):
        y = plain(values[link.x].astype(jnp.float32), None, codes, scales, group_size, None, link.norm)
        if link.gated:
            gate, other = jnp.moveaxis(y.reshape(y.shape[0], -1, 2, GATED_ROWS), 2, 0).reshape(2, y.shape[0], -1)
            y = jax.nn.silu(gate) * other
        values.append((y if link.added is None else y + values[link.added].astype(jnp.float32)).astype(jnp.bfloat16))
    return tuple(values[len(inputs) :])
