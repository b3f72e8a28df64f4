"""The order of the samples is a function of seed and epoch, also if the classes are balanced."""

import hashlib
import json
import pickle
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
from pytest import mark
from support.counting import CountedArray, calls_of

from resnext_hub.data.order import Order, Place, StepSampler, by_class

LABELS = np.repeat([0, 1, 2, 5], [100, 30, 3, 1])
"""A long tail; classes 3 and 4 have no samples."""


def places_of_epoch(order: Order, epoch: int) -> list[Place]:
    return order.step(epoch, order.count)


def test_a_balanced_epoch_has_each_class_equally_often() -> None:
    order = Order(len(LABELS), 3, LABELS)
    for epoch in range(3):
        places = places_of_epoch(order, epoch)
        assert len(places) == len(LABELS)
        counts = np.bincount(LABELS[[place.sample for place in places]], minlength=6)
        assert set(counts[[0, 1, 2, 5]]) == {33, 34}
        assert not counts[[3, 4]].any()


def test_samples_of_a_class_are_drawn_equally_often_and_numbered() -> None:
    places = places_of_epoch(Order(len(LABELS), 3, LABELS), 0)
    small = [place for place in places if LABELS[place.sample] == 2]
    drawn = np.bincount([place.sample - 130 for place in small], minlength=3)
    assert drawn.max() - drawn.min() <= 1
    assert len({(place.sample, place.repeat) for place in places}) == len(places)
    assert {place.repeat for place in places if LABELS[place.sample] == 0} == {0}


def test_epochs_use_different_parts_of_a_large_class() -> None:
    order = Order(len(LABELS), 3, LABELS)
    drawn = [{place.sample for place in places_of_epoch(order, epoch) if place.sample < 100} for epoch in range(20)]
    assert drawn[0] != drawn[1]
    assert set.union(*drawn) == set(range(100))


@mark.parametrize("labels", [None, LABELS])
def test_a_step_is_the_same_wherever_a_run_starts(labels: np.ndarray | None) -> None:
    whole = list(StepSampler(Order(len(LABELS), 7, labels), 12, 0, 60))
    assert list(StepSampler(Order(len(LABELS), 7, labels), 12, 41, 60)) == whole[41:]
    backwards = Order(len(LABELS), 7, labels)
    assert [backwards.step(step, 12) for step in reversed(range(60))] == whole[::-1]


def test_the_order_depends_on_the_seed() -> None:
    assert places_of_epoch(Order(134, 0, LABELS), 0) != places_of_epoch(Order(134, 1, LABELS), 0)
    assert places_of_epoch(Order(134, 0, LABELS), 0) != places_of_epoch(Order(134, 0, LABELS), 1)


def test_places_that_cannot_be_shared_equally_go_to_varying_classes() -> None:
    labels = np.array([0, 0, 1])
    order = Order(3, 0, labels)
    drawn = [sorted(labels[[place.sample for place in places_of_epoch(order, epoch)]].tolist()) for epoch in range(20)]
    assert {tuple(epoch) for epoch in drawn} == {(0, 0, 1), (0, 1, 1)}


@mark.parametrize(("count", "batch", "repeats"), [(120, 12, 3), (100, 12, 3), (50, 8, 4), (7, 4, 4), (30, 10, 3)])
def test_repeated_augmentation_puts_each_image_into_a_batch_several_times(count: int, batch: int, repeats: int) -> None:
    order = Order(count, 5, repeats=repeats, apart=batch // repeats)
    places = places_of_epoch(order, 0)
    assert len(places) == len(set(places)) == count  # every occurrence is augmented differently
    samples = Counter(place.sample for place in places)
    assert max(samples.values()) <= repeats
    assert len(samples) <= count // repeats + batch // repeats
    apart = batch // repeats
    whole = places[: count // (apart * repeats) * apart * repeats]
    for start in range(0, len(whole), apart * repeats):
        block = whole[start : start + apart * repeats]
        assert Counter(place.sample for place in block) == dict.fromkeys({place.sample for place in block}, repeats)
        if apart > 1:
            assert all(one.sample != other.sample for one, other in zip(block[::2], block[1::2], strict=False))
    assert {place.sample for place in places_of_epoch(order, 1)} != set(samples) or count < 20


def test_without_repeats_the_order_is_the_same_as_before() -> None:
    assert Order(40, 3).step(2, 8) == Order(40, 3, repeats=1, apart=5).step(2, 8)


def naive_step(order: Order, epochs: list[list[Place]], step: int, batch: int) -> list[Place]:
    """Return the places of a step, one at a time."""
    return [epochs[place // order.count][place % order.count] for place in range(step * batch, (step + 1) * batch)]


@mark.parametrize("settings", [{}, {"labels": LABELS}, {"repeats": 3, "apart": 4}])
@mark.parametrize(("batch", "processes"), [(12, 1), (12, 4), (300, 5), (134, 2)])
def test_each_process_computes_its_own_part_of_the_step(settings: dict[str, Any], batch: int, processes: int) -> None:
    order = Order(len(LABELS), 7, **settings)
    epochs = [[*order.step(epoch, order.count)] for epoch in range(16)]
    for step in range(5):
        parts = [order.step(step, batch, process, processes) for process in range(processes)]
        assert {len(part) for part in parts} == {batch // processes}
        assert [place for part in parts for place in part] == naive_step(order, epochs, step, batch)


@mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "a5d08e8ef4fdf8d9"),
        ({"labels": LABELS}, "baebab74f783d22d"),
        ({"repeats": 3, "apart": 4}, "7caf7ab807fc471c"),
    ],
)
def test_the_order_is_that_of_existing_runs(settings: dict[str, Any], expected: str) -> None:
    order = Order(134, 7, **settings)
    places = [[int(number) for number in place] for step in range(60) for place in order.step(step, 12)]
    assert hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16] == expected


@mark.parametrize("settings", [{}, {"repeats": 4, "apart": 512}])
def test_the_work_of_a_step_does_not_depend_on_the_batch_size(settings: dict[str, Any]) -> None:
    order = Order(100_000, 0, **settings)
    order.step(0, 16)  # computes the epoch

    def sent(batch: int) -> bytes:
        return bytes(ForkingPickler.dumps(order.step(1, batch, 3, 8)))  # as to a worker

    sent(32_768)  # fills caches
    assert calls_of(lambda: sent(32_768)) == calls_of(lambda: sent(64))
    columns = 1 if not settings else 2
    assert len(sent(32_768)) < columns * 8 * 4096 + 1024


def test_places_survive_the_way_to_a_worker() -> None:
    order = Order(50, 7, repeats=2, apart=3)
    places = order.step(8, 48)
    assert pickle.loads(pickle.dumps(places)) == places == [*places]
    assert places[5] == [*places][5]
    assert places[3:7] == [*places][3:7]
    assert places != [*places][1:]


def test_the_samples_of_each_class_are_found_in_their_order() -> None:
    labels = np.random.default_rng(0).choice([0, 3, 4, 9], 200)
    found = by_class(labels)
    assert len(found) == 4
    for members, label in zip(found, np.unique(labels), strict=True):
        assert (members == np.flatnonzero(labels == label)).all()


def test_the_samples_of_each_class_are_found_without_looking_at_all_samples_for_each_class() -> None:
    def elements(classes: int) -> int:
        by_class(CountedArray.of(np.arange(6000) % classes))
        return CountedArray.elements

    assert elements(2000) <= 2 * elements(2) <= 4 * 6000
