"""Which weights of a sequential run are tuned with their blocks, and that work when its turn comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from qjax.program.flatten import Lit
from qjax.ptq.autoround import AutoRound, blockwise, check_tuned
from qjax.ptq.block_tuning import Choice, Member, Tuner, all_hold
from qjax.ptq.blocks import Block, Flow, find_blocks, why_not_tuned
from qjax.ptq.data import not_finite
from qjax.ptq.input_scale import part_scale
from qjax.ptq.method import Outcome
from qjax.ptq.parts import layout_of, problem_of, take
from qjax.ptq.streams import Batch, Task, Visit, Weights


class Joint(NamedTuple):
    """Visits whose weights are tuned together.

    Attributes:
      method: how.
      numbers: of the visits, ascending.
      blocks: for each stream where the block lies in its program.
    """

    method: AutoRound
    numbers: tuple[int, ...]
    blocks: tuple[Block, ...]


class Joints(NamedTuple):
    """What is tuned with its block, by the number of the visit; and why the others are not, where a block was asked for."""

    joints: Mapping[int, Joint]
    reasons: Mapping[int, str]


def find_joints(streams: Sequence[Batch], visits: Sequence[Sequence[Visit]], tasks: Mapping[int, Task], flat: set[int]) -> Joints:
    """Finds the blocks of every method that tunes them.

    Args:
      streams: the batches.
      visits: for each stream its visits; the same sites in the same order.
      tasks: what to do, by parameter.
      flat: parameters of which every part is seen once.

    Returns:
      The blocks.
    """
    wanted: dict[AutoRound, list[int]] = {}
    for number, visit in enumerate(visits[0]):
        method = blockwise(tasks[visit.site.leaf].method)
        if method is not None and visit.site.leaf in flat:
            wanted.setdefault(method, []).append(number)
    if not wanted:
        return Joints({}, {})
    flows = {id(s.cutter): Flow(s.cutter, {site.key for site in s.program.sites}) for s in streams}
    joints: dict[int, Joint] = {}
    reasons: dict[int, str] = {}
    for method, numbers in wanted.items():
        found = {id(s.cutter): _blocks(flows[id(s.cutter)], mine, numbers, method.span) for s, mine in zip(streams, visits, strict=True)}
        for members, _ in found[id(streams[0].cutter)]:
            where = [dict(found[id(s.cutter)]).get(members) for s in streams]
            why = "batches of other shapes are cut elsewhere" if None in where else ""
            why = why or next(filter(None, (why_not_tuned(flows[id(s.cutter)], b) for s, b in zip(streams, where, strict=True) if b)), "")
            if why:
                reasons |= dict.fromkeys(members, f"not tuned with its block: {why}")
            else:
                joints |= dict.fromkeys(members, Joint(method, members, tuple(b for b in where if b is not None)))
    return Joints(joints, reasons)


def _blocks(flow: Flow, visits: Sequence[Visit], numbers: Sequence[int], span: int) -> list[tuple[tuple[int, ...], Block]]:
    """(numbers of the visits, block) of each block of one program."""
    at: dict[int, list[int]] = {}
    for number in numbers:
        at.setdefault(visits[number].position, []).append(number)
    return [(tuple(n for p in block.members for n in at[p]), block) for block in find_blocks(flow, list(at), span)]


def member_of(visit: Visit, task: Task, weights: Weights) -> Member:
    """The weight that a visit sees, float."""
    layout, part = layout_of(task.leaf), visit.part or ()
    w = take(weights.params[visit.site.leaf], layout, part)
    problem = problem_of(task.leaf, visit.site, task.spec, w, layout.axes)
    check_tuned(problem)
    return Member(visit.site.leaf, layout, part, problem, part_scale(task.scale, layout, part))


def tune_joint(
    tuner: Tuner, joint: Joint, members: Sequence[Member], first: Visit, streams: Sequence[Batch], positions: Sequence[int],
    weights: Weights, floats: Weights,
) -> list[Outcome]:  # fmt: skip
    """Tunes the weights of a block; the streams stand at `positions`, its start or behind it."""
    blocks = [block._replace(start=max(block.start, at)) for block, at in zip(joint.blocks, positions, strict=True)]

    def blame(number: int, what: str) -> ValueError:
        batch = streams[number]
        known = [a for a in first.sources if not isinstance(a, Lit) and (a in batch.live or a in batch.given)]
        if batch.cutter is streams[0].cutter and not all(all_hold(jnp.isfinite, batch.value(a)) for a in known):
            return not_finite(first.site, number)  # the words of every method for what a site reads
        where = f"the block of {first.site.path!r} and {len(members) - 1} more weights"
        return ValueError(f"`calibration` batch {number} cannot be used in {where}: {what}; look at that batch")

    choice = Choice(joint.method.descent, joint.method.batch_size, joint.method.seed)
    return tuner.tune(members, blocks, streams, weights, floats, choice, blame)
