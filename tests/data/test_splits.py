"""Datasets load with the expected splits, columns and classes, or raise an error that names the problem."""

import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from pytest import LogCaptureFixture, mark, raises
from support.processes import write_images

from resnext_hub.data.config import DataConfig
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError, RunError


def load(dataset: object, **settings: object) -> Splits:
    return load_splits(DataConfig(dataset=str(dataset), **settings))


def write_parquet(path: Path, columns: dict[str, Sequence[object]], features: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def some_images(count: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((8, 8, 3), 10 * i % 256, np.uint8)) for i in range(count)]


def test_a_fifth_of_the_digits_is_held_out_stratified_by_class() -> None:
    splits = load("digits")
    assert (len(splits.train), len(splits.eval)) == (1437, 360)
    assert not set(splits.train.indices) & set(splits.eval.indices)
    assert set(splits.train.indices) | set(splits.eval.indices) == set(range(1797))
    parts = np.bincount(splits.eval.labels) / np.bincount(np.concatenate([splits.train.labels, splits.eval.labels]))
    assert parts.min() > 0.19
    assert parts.max() < 0.21
    assert splits.label_names == tuple("0123456789")


def test_digits_have_the_pixels_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    splits = load("digits")
    image = np.asarray(splits.eval.image(5, "L"))
    original = load_digits().images[splits.eval.indices[5]]
    assert np.array_equal(image, np.round(original * 255 / 16))


def test_the_held_out_split_depends_only_on_its_seed() -> None:
    assert np.array_equal(load("digits").eval.indices, load("digits").eval.indices)
    assert not np.array_equal(load("digits").eval.indices, load("digits", split_seed=1).eval.indices)
    assert len(load("digits", eval_fraction=0.5).eval) == 899


def test_a_class_folder_may_be_called_train(folder_of_classes: Path) -> None:
    splits = load(folder_of_classes)
    assert splits.label_names == ("bus", "car", "train")
    assert len(splits.train) + len(splits.eval) == 30
    assert splits.found.eval_split is None
    for index, label in enumerate(splits.train.labels):
        path = splits.train.rows[int(splits.train.indices[index])]["image"]["path"]
        assert Path(path).parent.name == splits.label_names[label]
    assert splits.dataset_id == "vehicles"


def test_folders_named_train_and_val_are_splits(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 3)):
        for name, shade in (("cat", 60), ("dog", 180)):
            write_images(tmp_path / split / name, count, shade)
    splits = load(tmp_path)
    assert (splits.found.train_split, splits.found.eval_split) == ("train", "val")
    assert (len(splits.train), len(splits.eval)) == (10, 6)
    assert splits.label_names == ("cat", "dog")


def test_images_in_subfolders_belong_to_the_class(tmp_path: Path) -> None:
    write_images(tmp_path / "cat" / "persian", 5, 60)
    write_images(tmp_path / "dog", 5, 180)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    splits = load(tmp_path)
    assert splits.label_names == ("cat", "dog")
    assert len(splits.train) + len(splits.eval) == 10


def test_splits_of_parquet_files_follow_from_their_names(tmp_path: Path) -> None:
    features = {
        "image": datasets.Image(),
        "kind": datasets.ClassLabel(names=["a", "b"]),
        "id": datasets.Value("int64"),
    }
    for name, count in (("train-00000-of-00002", 6), ("train-00001-of-00002", 4), ("test-00000-of-00001", 4)):
        columns = {"image": some_images(count), "kind": [i % 2 for i in range(count)], "id": list(range(count))}
        write_parquet(tmp_path / "data" / f"{name}.parquet", columns, features)
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.eval)) == (10, 4)
    assert (splits.found.image_column, splits.found.label_column) == ("image", "kind")
    assert splits.label_names == ("a", "b")
    assert np.asarray(splits.train.image(3)).max() == 30


@mark.parametrize(
    ("values", "feature", "names"),
    [
        (["red", "blue"] * 5, "string", ("blue", "red")),
        ([7, 3] * 5, "int64", ("3", "7")),
        ([True, False] * 5, "bool", ("False", "True")),
    ],
)
def test_a_plain_column_can_hold_the_labels(
    tmp_path: Path, values: list[object], feature: str, names: tuple[str, ...]
) -> None:
    path = write_parquet(
        tmp_path / "all.parquet",
        {"image": some_images(10), "y": values},
        {"image": datasets.Image(), "y": datasets.Value(feature)},
    )
    splits = load(path)
    assert splits.label_names == names
    assert splits.found.label_column == "y"
    assert sorted(set(splits.train.labels)) == [0, 1]


def test_a_binary_column_without_metadata_can_hold_the_images(tmp_path: Path) -> None:
    import io

    encoded = []
    for image in some_images(10):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    path = write_parquet(
        tmp_path / "all.parquet",
        {"blob": encoded, "label": ["x", "y"] * 5},
        {"blob": datasets.Value("binary"), "label": datasets.Value("string")},
    )
    splits = load(path)
    assert splits.found.image_column == "blob"
    assert splits.train.image(0).size == (8, 8)


def test_a_class_with_one_image_stays_in_training(tmp_path: Path) -> None:
    for name, count, shade in (("a", 10, 100), ("b", 10, 130), ("rare", 1, 160)):
        write_images(tmp_path / name, count, shade)
    splits = load(tmp_path)
    assert np.bincount(splits.train.labels, minlength=3)[2] == 1
    assert np.bincount(splits.eval.labels, minlength=3)[2] == 0


def test_the_fingerprint_changes_with_the_files(folder_of_classes: Path) -> None:
    before = load(folder_of_classes).fingerprint
    assert load(folder_of_classes).fingerprint == before
    next((folder_of_classes / "bus").iterdir()).unlink()
    assert load(folder_of_classes).fingerprint != before


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 4, 100)
    write_images(tmp_path / "b", 4, 100)
    image = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "a" / "999.jpg", exif=exif)
    splits = load(tmp_path)
    sizes = {part.image(i).size for part in (splits.train, splits.eval) for i in range(len(part))}
    assert (10, 20) in sizes
    assert (20, 10) not in sizes


def refused(dataset: object, **settings: object) -> str:
    with raises(RequestError) as caught:
        load(dataset, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_table_without_images_raises_an_error_with_its_columns(tmp_path: Path) -> None:
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    path = write_parquet(tmp_path / "all.parquet", {"text": ["x", "y"], "label": [0, 1]}, features)
    assert "has no column of images, or of the names of images in" in refused(path)


def test_one_of_several_image_columns_has_to_be_chosen(tmp_path: Path) -> None:
    features = {"a": datasets.Image(), "b": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    columns = {"a": some_images(10), "b": some_images(10), "label": [0, 1] * 5}
    path = write_parquet(tmp_path / "all.parquet", columns, features)
    assert "has several image columns (a, b); choose one with image_column=a" in refused(path)
    assert load(path, image_column="b").found.image_column == "b"
    assert "image_column=label is not a column of images" in refused(path, image_column="label")
    message = refused(path, image_column="c")
    assert message.startswith("image_column=c: ")
    assert "has no such column; its columns: a (PIL.Image.Image), b (PIL.Image.Image), label (int64)" in message


def test_a_single_class_raises_an_error(tmp_path: Path) -> None:
    write_images(tmp_path / "cat", 5, 100)
    assert "has a single class, cat (.png: 5)" in refused(tmp_path)


def test_a_label_out_of_range_raises_an_error_with_its_index(tmp_path: Path) -> None:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    write_parquet(tmp_path / "train.parquet", {"image": some_images(6), "label": [0, 1] * 3}, features)
    write_parquet(tmp_path / "test.parquet", {"image": some_images(3), "label": [0, 1, -1]}, features)
    message = refused(tmp_path)
    assert "label -1 at index 2 of the evaluation split is out of range" in message
    assert "0 to 1" in message


def test_unknown_datasets_splits_and_files_raise_an_error(tmp_path: Path, folder_of_classes: Path) -> None:
    assert "nowhere does not exist and is not a valid dataset ID on the Hub" in refused(tmp_path / "nowhere")
    assert "has images (.png: 12) but no class folders" in refused(folder_of_classes / "bus")
    assert "eval_split=test: no such split; choose one of train" in refused(folder_of_classes, eval_split="test")
    assert "are only for datasets on the Hub" in refused(folder_of_classes, dataset_revision="main")
    (tmp_path / "table.csv").write_text("a,b")
    assert "has no column of images, or of the names of images in" in refused(tmp_path / "table.csv")


def test_a_hub_dataset_raises_a_run_error_if_the_hub_is_unreachable() -> None:
    with raises(RunError, match="is not a local folder, and the Hub could not be reached"):
        load("somebody/something")


# A test split


def three_splits(root: Path, *names: str, count: int = 4) -> Path:
    for split in names:
        for name, shade in (("cat", 60), ("dog", 180)):
            write_images(root / split / name, count, shade)
    return root


@mark.parametrize(
    ("names", "evaluation", "test"),
    [
        (("train", "val", "test"), "val", "test"),
        (("training", "validation", "testing"), "validation", "testing"),
        (("train", "eval", "test"), "eval", "test"),
        (("train", "test"), "test", "none"),
        (("train", "val"), "val", "none"),
    ],
)
def test_a_split_is_a_test_only_beside_a_validation_split(
    tmp_path: Path, names: tuple[str, ...], evaluation: str, test: str
) -> None:
    splits = load(three_splits(tmp_path, *names))
    assert (splits.found.eval_split, splits.found.test_split) == (evaluation, test)
    assert (splits.test is None) == (test == "none")
    assert len(splits.evaluated) == len(names) - 1


def test_the_test_split_is_chosen_or_left_out_by_its_setting(tmp_path: Path) -> None:
    root = three_splits(tmp_path, "train", "val", "test")
    assert load(root, test_split="none").test is None
    named = three_splits(root / "named", "train", "eval", "test")
    for settings in ({}, {"test_split": "none"}, {"test_fraction": 0.1}):
        assert load(named, **settings).found.eval_split == "eval"
    assert load(root, test_split="none").fingerprint == load(root, test_split="none", eval_split="val").fingerprint
    assert load(root).fingerprint != load(root, test_split="none").fingerprint
    chosen = load(root, eval_split="test", test_split="val")
    assert (chosen.found.eval_split, chosen.found.test_split) == ("test", "val")


def test_without_validation_a_requested_test_leaves_the_evaluation_images_to_be_held_out(tmp_path: Path) -> None:
    splits = load(three_splits(tmp_path, "train", "test"), test_split="test")
    assert (splits.found.eval_split, splits.found.test_split) == (None, "test")
    assert splits.test is not None
    assert [len(part) for part in (splits.train, splits.eval, splits.test)] == [6, 2, 8]


def test_a_held_out_test_leaves_the_evaluation_images_as_they_are() -> None:
    plain, tested = load("digits"), load("digits", test_fraction=0.1)
    assert tested.test is not None
    assert np.array_equal(plain.eval.indices, tested.eval.indices)
    parts = [set(part.indices.tolist()) for part in (tested.train, tested.eval, tested.test)]
    assert set.union(*parts) == set(range(1797))
    assert sum(map(len, parts)) == 1797
    shares = np.bincount(tested.test.labels) / np.bincount(np.concatenate([plain.train.labels, plain.eval.labels]))
    assert shares.min() > 0.09
    assert shares.max() < 0.11
    assert tested.found.test_split is None  # so the resolved settings hold it out again


def test_a_test_is_held_out_beside_a_stored_evaluation_split(tmp_path: Path) -> None:
    splits = load(three_splits(tmp_path, "train", "val"), test_fraction=0.25)
    assert splits.test is not None
    assert [len(part) for part in (splits.train, splits.eval, splits.test)] == [6, 8, 2]


def test_holding_out_too_much_is_refused(tmp_path: Path) -> None:
    with raises(RequestError, match=r"test_fraction=0\.6 and eval_fraction=0\.4 leave too few images to train on"):
        load("digits", eval_fraction=0.4, test_fraction=0.6)
    for name in ("bus", "car"):
        write_images(tmp_path / "two" / name, 2, 90 if name == "bus" else 160)
    with raises(RequestError, match=r"test_fraction=0\.2: no images are left for a test, because each class has only"):
        load(str(tmp_path / "two"), test_fraction=0.2)
    with raises(RequestError, match=r"test_fraction=0\.1 and test_split=test are mutually exclusive"):
        load("digits", test_split="test", test_fraction=0.1)


@mark.parametrize(
    ("settings", "message"),
    [
        ({"test_split": "exam"}, "test_split=exam: no such split; choose one of"),
        ({"test_split": "train"}, "test_split=train is also the training split"),
        ({"eval_split": "val", "test_split": "val"}, "eval_split=val is also the test split"),
    ],
)
def test_a_test_split_that_cannot_be_one_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with raises(RequestError) as caught:
        load(three_splits(tmp_path, "train", "val", "test"), **settings)
    assert message in str(caught.value)


def test_a_test_split_without_labels_is_left_out_unless_requested(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    """Benchmarks keep the labels of their test images secret."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    for split, labels in (("train", [0, 1, 0, 1]), ("validation", [0, 1]), ("test", [-1, -1])):
        columns = {"image": some_images(len(labels)), "label": labels}
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", columns, features)
    logging.getLogger("resnext_hub").propagate = True
    try:
        splits = load(tmp_path)
    finally:
        logging.getLogger("resnext_hub").propagate = False
    assert splits.test is None
    assert splits.found.test_split == "none"
    assert "the test split is not used for a test: label -1 at index 0 of the test split is out of range" in caplog.text
    with raises(RequestError, match="label -1 at index 0 of the test split is out of range"):
        load(tmp_path, test_split="test")
    assert load(tmp_path, streaming=True).test is None
    with raises(RequestError, match="the first images of the test split have no labels"):
        load(tmp_path, streaming=True, test_split="test")


def test_a_class_that_is_missing_from_the_test_split_is_not_fatal(tmp_path: Path) -> None:
    root = three_splits(tmp_path, "train", "val")
    write_images(root / "test" / "cat", 3, 60)
    splits = load(root)
    assert splits.test is not None
    assert splits.label_names == ("cat", "dog")
    assert splits.test.labels.tolist() == [0, 0, 0]
