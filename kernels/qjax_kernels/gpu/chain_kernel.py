"""The Hopper kernel of products that follow one another in one launch: between two of them all blocks wait for each other.

The first codes of the next product are on their way while blocks wait. More of them are no gain (experiments/kernels): what blocks wait
for comes through the same queues.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from .attention import Past
from .attention_kernel import Attend, Heads, Mixed, Sources
from .chain_shape import Link, shared_bytes
from .direct_kernel import multiply
from .direct_shape import Shape
from .mosaic import LANE
from .warps import Int, Long, Warps, device_address, shared_address


def follow(
    w: Warps, shapes: Sequence[Shape], links: Sequence[Link], shared: Int, inputs: Sequence[Long], rest: Sequence[Long],
    heads: Heads | None = None,
) -> None:  # fmt: skip
    """The work of one block, or of a part of one.

    Args:
      w: the instructions.
      shapes: of the products, of as many blocks each.
      links: what they multiply and add.
      shared: where its shared memory begins.
      inputs: where the values that come in begin.
      rest: where codes and scales of each product begin, then the counters, then the results; with attention cache, layer, places and, if
        it is there, rotation before the counters, and what its parts give behind the results.
      heads: the attention in front.
    """
    count, front = len(links), int(heads is not None)
    weights, rest = rest[: 2 * count], rest[2 * count :]
    past, rest = (rest[: 3 + heads.turned], rest[3 + heads.turned :]) if heads else ((), rest)
    counters, results = rest[0], rest[1 : 1 + count]
    values, before = [*inputs, *results], None
    if heads:
        values[0] = rest[1 + count]
        before = _attend(w, heads, shared, Sources(inputs[0], *past), values[0], counters)
    for i, (s, link) in enumerate(zip(shapes, links, strict=True)):
        wait = before
        if i:
            _arrive(w, counters, i - 1 + front)  # before the first codes are asked for, behind which it would have to wait
            wait = functools.partial(_await, w, s.blocks, counters, i - 1 + front)
        rows = functools.partial(Mixed, w, s, x=values[0], heads=heads) if heads and link.x == 0 else None
        added = [] if link.added is None else [values[link.added]]
        multiply(w, s, shared, values[link.x], *weights[2 * i : 2 * i + 2], *added, results[i], wait=wait, rows=rows)
    if count + front > 1:
        w.when(w.thread == 0, lambda: _leave(w, shapes[0].blocks, counters, count + front - 1))


def _attend(w: Warps, heads: Heads, shared: Int, sources: Sources, parts: Long, counters: Long) -> Callable[[], None]:
    """Asks for what attention reads first; what is given does the rest, while the first codes are on their way."""
    stage = Attend(w, heads, shared, sources, parts)
    begun = stage.begin()

    def rest() -> None:
        stage.finish(begun)
        _arrive(w, counters, 0)
        _await(w, heads.blocks, counters, 0)

    return rest


def _arrive(w: Warps, counters: Long, number: int) -> None:
    """What the block wrote may be read by others."""

    def first_thread() -> None:
        w.arrive(counters + w.integer(4 * number))

    w.barrier()
    w.when(w.thread == 0, first_thread)


def _await(w: Warps, blocks: int, counters: Long, number: int) -> None:
    """Waits for all blocks, and for what they wrote. Who has met for the second time has left the first: its counter goes back to 0."""

    def first_thread() -> None:
        w.await_count(counters + w.integer(4 * number), w.integer(blocks))
        if number:
            w.when(w.block == 0, lambda: w.store_word(counters + w.integer(4 * (number - 1)), w.integer(0)))

    w.when(w.thread == 0, first_thread)
    w.barrier()


def _leave(w: Warps, blocks: int, counters: Long, last: int) -> None:
    """The block that leaves last puts the last two counters back to 0."""
    before = w.count_in(counters + w.integer(4 * last))

    def clear() -> None:
        for number in (last - 1, last):
            w.store_word(counters + w.integer(4 * number), w.integer(0))

    w.when(before == blocks - 1, clear)


def linked(
    inputs: Sequence[jax.Array], weights: Sequence[tuple[jax.Array, jax.Array]], counters: jax.Array, past: Past | None = None, *,
    links: Sequence[Link], shapes: Sequence[Shape], parts: int, heads: Heads | None = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The kernel; see `chain.chain`.

    Args:
      inputs: (M, K) bfloat16 each.
      weights: codes (N, K) and scales (N, G), rows of a multiple of 16 bytes.
      counters: int32 zeros, which are zeros again when the launch ends.
      past: what attention reads.
      links: the products.
      shapes: theirs, of as many blocks each.
      parts: of a thread block, each of which counts as a block.
      heads: the attention in front.

    Returns:
      The result of every product, bfloat16.
    """
    read = [] if past is None else [array.reshape(-1) if array.ndim == 0 else array for array in past if array is not None]
    operands = [*inputs, *(part for weight in weights for part in weight), *read, counters]
    each = -(-max(shared_bytes(shapes), heads.shared_bytes if heads else 0) // 128) * 128
    results: list[Any] = [jax.ShapeDtypeStruct((s.m, s.out), jnp.bfloat16) for s in shapes]
    if heads:
        results.append(jax.ShapeDtypeStruct((heads.bytes // 4,), jnp.float32))

    def hopper_chain(*references):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(references))
        def work(_, *own):
            addresses = [device_address(ref) for ref in own[:-1]]
            start = shared_address(own[-1])
            w = Warps(parts, shapes[0].warps)
            follow(w, shapes, links, start + w.part * each, addresses[: len(inputs)], addresses[len(inputs) :], heads)

        work(*references)  # pyright: ignore[reportCallIssue]

    warpgroups = parts * shapes[0].warps // 4
    kernel = plgpu.kernel(
        hopper_chain,
        out_type=tuple(results),
        scratch_types=[plgpu.SMEM((parts * each,), jnp.int8)],
        grid=(shapes[0].blocks // parts,),
        grid_names=("n",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE),
        **({} if warpgroups == 1 else {"num_threads": warpgroups, "thread_name": "wg"}),
    )
    return kernel(*operands)[: len(shapes)]
