"""Who computes what: every stage of every tile once, and nobody waits for one that may start later."""

import itertools

import numpy as np
import pytest
from qjax_kernels.gpu.schedule import HANDED_OVER, Schedule


def pieces(schedule: Schedule) -> dict:
    """(first, last, group, number, begun) of the pieces of every tile."""
    found: dict = {}
    for group in range(schedule.groups):
        for number in range(int(schedule.count(group))):
            piece = schedule.piece(group, number)
            each = (int(piece.first), int(piece.last), group, number, int(piece.begun))
            found.setdefault((int(piece.m), int(piece.n)), []).append(each)
    return {tile: sorted(each) for tile, each in found.items()}


def drawn(count: int) -> list[Schedule]:
    draw = np.random.default_rng(0)
    limits = (5, 10, 40, 5, 12)
    return [Schedule.of(*(int(draw.integers(1, limit)) for limit in limits)) for _ in range(count)]


@pytest.mark.parametrize("schedule", [*drawn(80), Schedule.of(4, 75, 64, 4, 66)], ids=str)
def test_every_stage_is_computed_once(schedule):
    found = pieces(schedule)
    assert set(found) == {(m, n) for m in range(schedule.across) for n in range(schedule.down)}
    for each in found.values():
        assert each[0][0] == 0 and each[-1][1] == schedule.stages
        assert all(one[1] == next_one[0] for one, next_one in itertools.pairwise(each))
        assert all(first < last and first % schedule.slots == 0 for first, last, *_ in each)
        # Whoever ends a tile adds what exactly those have handed over who began it, all of them groups that start before it does.
        *begun, (first, _, group, _, since) = each
        assert [other for _, _, other, _, _ in begun] == (list(range(since, group)) if first else [])
        assert bool(begun) == (first > 0)
        # A group hands over one part at most, and does so first.
        assert all(number == 0 for _, _, _, number, _ in begun)


def test_shares_are_even_and_tiles_are_cut_only_where_it_helps():
    assert sum(bool(schedule.shared) for schedule in drawn(80)) > 10
    wide = Schedule.of(4, 75, 64, 4, 66)  # 600 blocks of 128 x 192 in pairs
    stages = np.zeros(wide.groups)
    for each in pieces(wide).values():
        for first, last, group, *_ in each:
            stages[group] += last - first
    assert stages.max() - stages.min() <= wide.slots and stages.max() <= 300 / 66 * 64 + wide.slots < 5 * 64
    assert wide.longest == pytest.approx(300 / 66 * 64 + HANDED_OVER)
    assert Schedule.of(4, 32, 64, 4, 132).shared == 0  # 128 tiles nearly fill 132 multiprocessors
    assert Schedule.of(2, 64, 64, 4, 64).shared == 0 and Schedule.of(2, 64, 64, 4, 64).longest == 128


def test_few_tiles_are_cut_into_equal_parts():
    schedule = Schedule.of(2, 32, 32, 4, 132)
    assert (schedule.groups, schedule.shared) == (128, 64)
    assert all([(first, last) for first, last, *_ in each] == [(0, 16), (16, 32)] for each in pieces(schedule).values())
