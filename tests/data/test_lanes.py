"""The lanes of a stream stay in step, hold each sample once per epoch, and are found by arithmetic."""

from collections import Counter
from itertools import pairwise, product

import numpy as np
from pytest import mark

from resnext_hub.data.lanes import (
    FEWEST_LANES,
    GROUPS_PER_LANE,
    MOST_LANES,
    Lanes,
    Share,
    divide,
    fitting_lanes,
    in_order,
)

GENERATOR = np.random.default_rng(0)

GROUPS = [GENERATOR.integers(0, 9, GENERATOR.integers(1, 6)) + (np.arange(1) == 0) for _ in range(9)]
"""Rows of the row groups of some shards, of any size from 1 to 9."""

COUNT = sum(int(rows.sum()) for rows in GROUPS)

SIZES = (1, 2, 3, 7, 16, COUNT - 1, COUNT, COUNT + 3)
"""Numbers of lanes."""


def lanes_of(lanes: int, block: int = 8, seed: int = 3) -> Lanes:
    return Lanes(GROUPS, lanes=lanes, seed=seed, block_size=block * lanes)


def samples(lanes: Lanes, lane: int, first: int, last: int) -> list[tuple[int, int, int]]:
    """Return epoch, shard and row at each place of a lane."""
    found = []
    for block in lanes.blocks(lane, first, last):
        rows = [(piece.shard, row) for piece in block.pieces for row in range(piece.first, piece.last)]
        assert sorted(block.order.tolist()) == list(range(len(rows)))
        found += [(block.epoch, *rows[n]) for n in block.order[block.begin : block.end]]
    return found


@mark.parametrize("size", SIZES)
def test_the_lanes_of_an_epoch_follow_each_other_and_hold_all_samples(size: int) -> None:
    lanes = lanes_of(size)
    for epoch in range(5):
        parts = [lanes.part(epoch, lane) for lane in range(size)]
        assert (parts[0][0], parts[-1][1]) == (0, COUNT)
        assert all(before[1] == after[0] for before, after in pairwise(parts))


@mark.parametrize("size", SIZES)
def test_lanes_never_differ_by_more_than_one_sample_after_any_number_of_epochs(size: int) -> None:
    lanes = lanes_of(size)
    totals = np.zeros(size, dtype=int)
    for epoch in range(200):
        totals += [last - first for first, last in (lanes.part(epoch, lane) for lane in range(size))]
        assert totals.max() - totals.min() <= 1
    assert totals.sum() == 200 * COUNT


@mark.parametrize("size", SIZES)
def test_every_sample_occurs_once_in_each_epoch(size: int) -> None:
    lanes = lanes_of(size)
    places = 4 * COUNT // size + 1
    seen = Counter(sample for lane in range(size) for sample in samples(lanes, lane, 0, places))
    assert max(seen.values()) == 1
    assert [sum(epoch == found[0] for found in seen) for epoch in range(3)] == [COUNT] * 3


@mark.parametrize("size", SIZES)
def test_a_lane_continues_at_any_place_as_if_it_had_been_read_from_the_start(size: int) -> None:
    lanes = lanes_of(size)
    for lane in (0, size // 2, size - 1):
        whole = samples(lanes, lane, 0, 60)
        assert len(whole) == 60
        for first, last in ((1, 60), (7, 31), (17, 18), (59, 60), (20, 20)):
            assert samples(lanes_of(size), lane, first, last) == whole[first:last]
        for place in (0, 13, 59):
            epoch, within = lanes.locate(lane, place)
            begin, end = lanes.part(epoch, lane)
            assert whole[place][0] == epoch
            assert 0 <= within < end - begin


def test_a_resume_opens_the_block_of_its_place_alone() -> None:
    lanes = lanes_of(2)
    for place in range(COUNT):
        (first, *_) = lanes.blocks(0, place, 3 * COUNT)
        assert first.begin < first.end <= len(first.order)
        assert first.order[first.begin :].size + first.begin == sum(p.last - p.first for p in first.pieces)


def test_a_block_has_as_many_row_groups_as_fit_but_at_least_one() -> None:
    groups = [np.full(40, 5) for _ in range(20)]  # 4,000 rows
    for block, rows in ((1, 5), (24, 10), (40, 20), (10_000, 40)):  # of two lanes; at most 80 of 4,000 rows
        lanes = Lanes(groups, lanes=2, seed=3, block_size=block)
        for lane in range(2):
            blocks = list(lanes.blocks(lane, 0, 2000))
            assert {len(found.order) for found in blocks} == {rows}
            assert all(piece.first % 5 == piece.last % 5 == 0 for found in blocks for piece in found.pieces)


def test_order_depends_on_seed_and_epoch() -> None:
    first = samples(lanes_of(4), 1, 0, 20)
    assert first == samples(lanes_of(4), 1, 0, 20)
    assert first != samples(lanes_of(4, seed=4), 1, 0, 20)
    epochs = [[row[1:] for row in samples(lanes_of(1), 0, epoch * COUNT, (epoch + 1) * COUNT)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_the_row_groups_of_an_evaluation_are_in_the_order_of_the_shards() -> None:
    everything = [(shard, row) for shard, rows in enumerate(GROUPS) for row in range(int(rows.sum()))]
    for first, last in ((0, COUNT), (0, 0), (5, 6), (3, COUNT - 2), (COUNT, COUNT)):
        pieces = list(in_order(GROUPS, first, last))
        assert [(p.shard, row) for p in pieces for row in range(p.first, p.last)] == everything[first:last]
        assert all(piece.last - piece.first <= 9 for piece in pieces)


@mark.parametrize("lanes", [1, 2, 4, 8, 24])
def test_processes_and_workers_share_a_global_batch_in_its_order(lanes: int) -> None:
    each = 24 // lanes
    for processes, workers in product((1, 2, 3, 4, 8, 24), (0, 1, 2, 3, 7)):
        places = []
        for process in range(processes):
            shares = divide(24, lanes, process, processes, workers)
            assert 0 < len(shares) <= max(workers, 1)
            mine = [share for of_worker in shares for share in of_worker]
            places += [lane * each + n for lane, first, last in mine for n in range(first, last)]
            assert len(places) == (process + 1) * 24 // processes
            if lanes % processes == 0:
                assert all(share[1:] == (0, each) for share in mine)  # whole lanes
        assert places == list(range(24))


def test_each_worker_reads_lanes_of_its_own() -> None:
    assert divide(64, 16, 1, 4, 3) == [
        [Share(4, 0, 4)],
        [Share(5, 0, 4)],
        [Share(6, 0, 4), Share(7, 0, 4)],
    ]


@mark.parametrize(
    ("batch_size", "groups", "lanes"),
    [
        (256, 12_900, MOST_LANES),
        (256, 100 * MOST_LANES * GROUPS_PER_LANE, MOST_LANES),
        (192, 12_900, 48),  # 64 would suit 2, 4, 8 and 16 processes; 48 also 3, 6 and 12
        (128, 16 * GROUPS_PER_LANE, 16),
        (128, 17 * GROUPS_PER_LANE, 16),
        (128, 1, FEWEST_LANES),
        (1, 12_900, 1),
        (74, 12_900, 2),
    ],
)
def test_the_default_number_of_lanes_follows_from_batch_size_and_row_groups(
    batch_size: int, groups: int, lanes: int
) -> None:
    assert fitting_lanes(batch_size, groups) == lanes
