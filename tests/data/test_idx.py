"""MNIST's IDX files are opened as they are downloaded, and damaged ones are refused by name."""

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pytest import LogCaptureFixture, fixture, mark, raises

from resnext_hub.data.config import DataConfig
from resnext_hub.data.decode import decode
from resnext_hub.data.splits import load_splits
from resnext_hub.errors import RequestError


def idx(values: np.ndarray) -> bytes:
    """Return an IDX file; the header is 0, 0, the type (8 is uint8), the number of dimensions and each length."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 7))


LABELS = {"train": np.arange(12) % 3, "t10k": np.arange(6) % 3}
IMAGES = {"train": pixels(12, 0), "t10k": pixels(6, 1)}


@fixture
def mnist(tmp_path: Path) -> Path:
    """A dataset with the names of MNIST's download."""
    root = tmp_path / "mnist"
    root.mkdir()
    for split in LABELS:
        (root / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES[split])))
        (root / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[split])))
    return root


def unpack(root: Path, suffix: str) -> None:
    """Replace the packed files by plain ones, with another spelling of their names."""
    for path in list(root.iterdir()):
        target = root / path.name.removesuffix(".gz").replace("-idx", suffix)
        target.write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()


@mark.parametrize("spelling", ["packed", "-idx", ".idx"])
def test_idx_files_keep_pixels_labels_and_splits(mnist: Path, caplog: LogCaptureFixture, spelling: str) -> None:
    if spelling != "packed":
        unpack(mnist, spelling)
    with caplog.at_level("INFO"):
        splits = load_splits(DataConfig(dataset=str(mnist)))
    assert "IDX files" in caplog.text
    assert splits.label_names == ("0", "1", "2")
    assert (splits.found.train_split, splits.found.eval_split) == ("train", "test")
    for images, split in ((splits.train, "train"), (splits.eval, "t10k")):
        assert images.labels.tolist() == LABELS[split].tolist()
        for index in range(len(LABELS[split])):
            row = images.rows[index]["image"]
            assert np.array_equal(np.asarray(decode(row, mode="L")), IMAGES[split][index])


def test_the_unpacked_file_is_preferred_to_the_packed_one(mnist: Path) -> None:
    newer = np.flip(LABELS["train"])
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(newer))
    assert load_splits(DataConfig(dataset=str(mnist))).train.labels.tolist() == newer.tolist()


def test_one_split_of_idx_files_is_enough(mnist: Path) -> None:
    for path in mnist.glob("t10k*"):
        path.unlink()
    splits = load_splits(DataConfig(dataset=str(mnist), eval_fraction=0.25))
    assert (splits.train.count, splits.eval.count) == (9, 3)


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(gzip.compress(content)) and None


TRAIN, LABEL = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no labels": (lambda root: (root / LABEL).unlink(), "no IDX file with the labels of the train split"),
    "no images": (lambda root: (root / TRAIN).unlink(), "no IDX file with the images of the train split"),
    "too few labels": (
        replace(LABEL, idx(LABELS["train"][1:])),
        "has 12 images, but train-labels-idx1-ubyte.gz has 11",
    ),
    "truncated": (replace(TRAIN, idx(IMAGES["train"])[:-1]), "its header declares 420 bytes, but it contains only 419"),
    "trailing bytes": (
        replace(LABEL, idx(LABELS["train"]) + b"\0"),
        "its header declares 12 bytes, but it contains more",
    ),
    "empty": (replace(TRAIN, b""), "is not an IDX file with 3 dimensions"),
    "a web page": (replace(TRAIN, b"<html>404 Not Found</html>"), "is not an IDX file with 3 dimensions"),
    "labels as images": (replace(TRAIN, idx(LABELS["train"])), "is not an IDX file with 3 dimensions"),
    "floats": (replace(TRAIN, struct.pack(">HBB3I", 0, 13, 3, 1, 1, 1) + b"\0" * 4), "is not an IDX file"),
    "huge": (replace(TRAIN, struct.pack(">HBB3I", 0, 8, 3, *(1 << 31,) * 3)), "which is too many"),
    "many tiny images": (replace(TRAIN, struct.pack(">HBB3I", 0, 8, 3, 1 << 30, 1, 1)), "which is too many"),
    "truncated gzip": (lambda root: os.truncate(root / TRAIN, 60), "cannot be read"),
    "not gzip": (lambda root: (root / TRAIN).write_bytes(b"words"), "cannot be read"),
    "a folder": (lambda root: ((root / TRAIN).unlink(), (root / TRAIN).mkdir()), "cannot be read"),
    "a pipe": (lambda root: ((root / TRAIN).unlink(), os.mkfifo(root / TRAIN)), "cannot be read"),
    "two test splits": (
        lambda root: (root / "test-labels-idx1-ubyte").write_bytes(idx(LABELS["t10k"])),
        "has two files for the same split, test-labels-idx1-ubyte and t10k-labels-idx1-ubyte.gz",
    ),
}


@mark.parametrize("damage", DAMAGES)
def test_damaged_idx_files_are_refused_by_name(mnist: Path, damage: str) -> None:
    change, reason = DAMAGES[damage]
    change(mnist)
    with raises(RequestError) as caught:
        load_splits(DataConfig(dataset=str(mnist)))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_streaming_idx_files_is_refused(mnist: Path) -> None:
    with raises(RequestError, match="streaming"):
        load_splits(DataConfig(dataset=str(mnist), streaming=True))


@mark.parametrize("name", [TRAIN, LABEL])
def test_a_single_idx_file_is_refused_with_the_way_out(mnist: Path, name: str) -> None:
    with raises(RequestError, match="is one of several IDX files; use its folder as dataset"):
        load_splits(DataConfig(dataset=str(mnist / name)))
