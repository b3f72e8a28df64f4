"""The image size and the evaluations are functions of the step."""

import math

from pytest import mark

from resnext_hub.training.config import TrainConfig
from resnext_hub.training.schedule import plan_schedule, size_at, sizes_of


@mark.parametrize(("first", "full"), [(32, 64), (128, 224), (16, 32), (40, 45), (58, 64), (90, 96)])
def test_image_sizes_grow_in_few_stages_to_the_full_size(first: int, full: int) -> None:
    sizes = [size_at(step, 80, first, full) for step in range(80)]
    assert (sizes[0], sizes[14], sizes[-1]) == (first, first, full)
    assert sizes == sorted(sizes)
    assert sizes[60:] == [full] * 20  # the last quarter
    assert len(set(sizes)) <= 5
    assert all(first <= size <= full for size in sizes)


def test_image_sizes_are_constant_by_default() -> None:
    assert {size_at(step, 10, None, 224) for step in range(10)} == {224}


@mark.parametrize("steps", [1, 2, 3, 5, 7, 16, 80])
def test_the_sizes_of_a_run_are_the_sizes_of_its_steps(steps: int) -> None:
    for first, full in ((32, 64), (58, 64), (None, 64), (128, 224)):
        assert sizes_of(steps, first, full) == sorted({size_at(step, steps, first, full) for step in range(steps)})


@mark.parametrize("every", [1, 2, 3])
def test_evaluations_are_at_the_steps_that_complete_epochs(every: int) -> None:
    config = TrainConfig.from_flat({"batch_size": 64, "epochs": 10, "eval_every": every})
    schedule = plan_schedule(config, 1437)
    assert schedule.steps == math.ceil(14370 / 64)
    expected = {math.ceil(epoch * 1437 / 64) for epoch in range(every, 11, every)} | {schedule.steps}
    assert schedule.evaluations == expected


def test_evaluations_may_be_fractions_of_an_epoch_apart() -> None:
    config = TrainConfig.from_flat({"batch_size": 10, "epochs": 1, "eval_every": 0.1})
    assert sorted(plan_schedule(config, 1000).evaluations) == list(range(10, 101, 10))
    often = TrainConfig.from_flat({"batch_size": 100, "epochs": 2, "eval_every": 0.001})
    assert sorted(plan_schedule(often, 1000).evaluations) == list(range(1, 21))


def test_a_stream_is_evaluated_like_other_images() -> None:
    config = TrainConfig.from_flat({"batch_size": 10, "epochs": 1, "eval_every": 0.5, "streaming": True})
    assert plan_schedule(config, 100).evaluations == {5, 10}
