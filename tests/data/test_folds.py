"""Folds divide a training split completely, by class, without separating duplicates."""

import shutil
from pathlib import Path

import numpy as np
from pytest import LogCaptureFixture, fixture, mark, param, raises
from support.counting import CountedArray
from support.digit_pairs import write_pairs
from support.processes import write_images

from resnext_hub.data.config import DataConfig
from resnext_hub.data.folds import assign_folds, small_classes
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError


@mark.parametrize("seed", range(5))
@mark.parametrize("folds", [2, 3, 7])
def test_classes_and_folds_differ_by_at_most_one_image(folds: int, seed: int) -> None:
    labels = np.random.default_rng(seed).choice(6, size=211, p=[0.5, 0.2, 0.2, 0.05, 0.03, 0.02])
    owner = assign_folds(labels, [], folds, seed)
    for counts in [np.bincount(owner, minlength=folds)] + [
        np.bincount(owner[labels == label], minlength=folds) for label in range(6)
    ]:
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(owner, assign_folds(labels, [], folds, seed))
    assert not np.array_equal(owner, assign_folds(labels, [], folds, seed + 1))


@mark.parametrize("seed", range(5))
def test_groups_stay_together_and_the_other_images_balance_the_folds(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, size=400)
    order = generator.permutation(400)
    groups = [order[start : start + size] for start, size in ((0, 40), (40, 9), (49, 2), (51, 2), (53, 3))]
    owner = assign_folds(labels, groups, 4, seed)
    assert all(len(set(owner[group])) == 1 for group in groups)
    assert set(owner) == set(range(4))
    for label in range(4):
        counts = np.bincount(owner[labels == label], minlength=4)
        assert counts.max() - counts.min() <= 1  # the largest group has fewer images of a class than a fold


def test_the_members_of_a_class_are_found_without_looking_at_all_images_for_each_class() -> None:
    def elements(classes: int) -> int:
        assign_folds(CountedArray.of(np.arange(3000) % classes), [], 3, 0)
        return CountedArray.elements

    assert elements(1000) <= 2 * elements(2) + 3000


def test_the_folds_are_those_of_existing_runs() -> None:
    generator = np.random.default_rng(4)
    labels = generator.integers(0, 7, 60)
    owner = assign_folds(labels, np.split(generator.permutation(60)[:8], 2), 4, 9)
    assert "".join(map(str, owner.tolist())) == "130032212120020130221223010313110301300132223223031321310230"


def test_too_many_folds_are_refused() -> None:
    with raises(
        RequestError, match=r"^folds=9 leaves folds without images: the training split has 8 images; use fewer"
    ):
        assign_folds(np.zeros(8, dtype=np.int64), [], 9, 0)
    with raises(RequestError, match="1 groups of duplicates"):
        assign_folds(np.zeros(8, dtype=np.int64), [np.arange(7)], 3, 0)


def test_small_classes_are_named() -> None:
    assert small_classes(["a", "b", "c"], [9, 4, 1], 5) is not None
    assert "b (4), c (1)" in str(small_classes(["a", "b", "c", "none"], [9, 4, 1, 0], 5))
    assert small_classes(["a", "b"], [9, 5], 5) is None


@fixture
def twins(tmp_path: Path) -> Path:
    """Images of three classes; the first four of each have a copy."""
    root = tmp_path / "twins"
    for name, count, shade in (("bus", 13, 40), ("car", 12, 120), ("tram", 11, 200)):
        write_images(root / name, count, shade)
        for index in range(4):
            shutil.copy(root / name / f"{index:03d}.png", root / name / f"{index:03d}-copy.png")
    return root


def folds_of(config: dict, folds: int) -> list[Splits]:
    return [load_splits(DataConfig(**config, folds=folds, fold=fold)) for fold in range(1, folds + 1)]


def rows(images: object) -> list[int]:
    assert isinstance(images, IndexedImages)
    return images.indices.tolist()


def test_every_image_is_evaluated_in_one_fold_and_trained_on_in_all_others(twins: Path) -> None:
    every = folds_of({"dataset": str(twins)}, 4)
    evaluated = [rows(splits.eval) for splits in every]
    assert sorted(row for own in evaluated for row in own) == list(range(48))
    for splits, own in zip(every, evaluated, strict=True):
        assert sorted([*own, *rows(splits.train)]) == list(range(48))
        images = splits.eval
        assert isinstance(images, IndexedImages)
        names = {images.name(index).replace("-copy", "") for index in range(len(images))}
        train = splits.train
        assert isinstance(train, IndexedImages)
        assert not names & {train.name(index).replace("-copy", "") for index in range(len(train))}
    assert len({splits.label_names for splits in every}) == 1


def test_without_the_search_for_duplicates_copies_are_separated(twins: Path) -> None:
    every = folds_of({"dataset": str(twins), "group_duplicates": False}, 4)
    counts = np.array([np.bincount(splits.eval.labels, minlength=3) for splits in every])
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
    owner = {row: fold for fold, splits in enumerate(every) for row in rows(splits.eval)}
    names = [every[0].train.name(index) for index in range(3)]
    assert names
    assert len(owner) == 48


def test_a_stored_evaluation_split_is_the_test_of_every_fold(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    for split, count in (("train", 9), ("val", 4)):
        for name, shade in (("bus", 60), ("car", 120)):
            write_images(tmp_path / "cars" / split / name, count, shade)
    data = str(tmp_path / "cars")
    one, two = folds_of({"dataset": data}, 2)
    assert one.test is not None
    assert one.test.count == 8
    assert one.stored_in("evaluation") is None
    assert one.stored_in("test") == "val"
    assert sorted(rows(one.eval) + rows(two.eval)) == list(range(18))
    again = load_splits(one.found)  # as config.yaml states it
    assert (rows(again.eval), again.fingerprint, again.found) == (rows(one.eval), one.fingerprint, one.found)
    (none, _) = folds_of({"dataset": data, "test_split": "none"}, 2)
    assert none.test is None


def test_several_labels_are_stratified_by_the_rarest_one(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", {"train": 200})
    every = folds_of({"dataset": str(pairs)}, 4)
    assert sorted(row for splits in every for row in rows(splits.eval)) == list(range(200))
    assert {splits.eval.count for splits in every} <= {49, 50, 51}


@mark.parametrize(
    ("settings", "message"),
    [
        param({"fold": 1}, "fold=1 needs folds", id="fold alone"),
        param({"folds": 3, "fold": 4}, "fold=4: there are only 3 folds", id="beyond the last"),
        param({"folds": 3, "streaming": True}, "streaming=True cannot be combined with folds=3", id="stream"),
        param(
            {"folds": 3, "eval_split": "val"}, "eval_split=val cannot be combined with folds=3", id="evaluation split"
        ),
        param(
            {"folds": 3, "test_fraction": 0.1}, "test_fraction=0.1 cannot be combined with folds=3", id="test fraction"
        ),
        param({"folds": 1}, "folds=1: expected", id="one fold"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(settings: dict, message: str) -> None:
    with raises(RequestError) as failure:
        DataConfig(**settings)
    assert str(failure.value).startswith(message)
