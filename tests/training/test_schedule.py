"""The image size is a function of the step."""

from pytest import mark

from resnext_hub.training.schedule import size_at, sizes_of


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
