"""A stream has the same order for any number of processes and workers, and can be resumed at any position."""

import hashlib
import io
from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from pytest import fixture, mark, raises

from resnext_hub.data.augment import Augmentation
from resnext_hub.data.batches import Batch
from resnext_hub.data.config import DataConfig
from resnext_hub.data.images import StreamedImages
from resnext_hub.data.splits import load_splits
from resnext_hub.data.stream import StreamedEvaluation, StreamSamples
from resnext_hub.data.transforms import EvalTransform, TransformConfig, resolve_input
from resnext_hub.errors import RequestError, RunError
from resnext_hub.models.input_config import InputConfig

CFG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
AUGMENTED = TransformConfig(auto_augment="rand-m7-mstd0.5", random_erasing=0.5, color_jitter=0.3)

SHARDS = (17, 5, 21)
"""Number of samples in each shard of the training split: 43, not divisible by any batch or block size."""


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(shade).integers(0, 60, (40, 40, 3))
    Image.fromarray((noise + shade % 190).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shard(path: Path, images: list[bytes], label: object = datasets.ClassLabel(names=["cat", "dog"])) -> None:
    features = datasets.Features({"image": datasets.Image(), "kind": label})
    rows = [{"bytes": content, "path": None} for content in images]
    table = {"image": rows, "kind": [i % 2 for i in range(len(rows))]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(path, batch_size=4)


@fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    number = 0
    for shard, size in enumerate(SHARDS):
        write_shard(folder / f"train-{shard:05d}-of-00003.parquet", [png(number + i) for i in range(size)])
        number += size
    write_shard(folder / "test-00000-of-00001.parquet", [png(1000 + i) for i in range(11)])
    return folder


@fixture(scope="module")
def stream(shards: Path) -> StreamedImages:
    images = load_splits(DataConfig(dataset=str(shards), streaming=True)).train
    assert isinstance(images, StreamedImages)
    return images


def batches(
    stream: StreamedImages,
    steps: int,
    processes: int = 1,
    workers: int = 0,
    start: int = 0,
    block: int = 40,
    batch: int = 12,
    lanes: int = 4,
) -> list[list[Batch]]:
    """Return the batches of each process."""
    augment = Augmentation(AUGMENTED, resolve_input(AUGMENTED, CFG))
    samples = StreamSamples(stream, augment, seed=3, batch_size=batch, lanes=lanes, block_size=block)
    return [
        list(samples.batches(start, steps, process, processes, workers, pin_memory=False))
        for process in range(processes)
    ]


def hashes(parts: list[list[Batch]]) -> list[str]:
    """Return a hash of the pixels of each global batch."""
    found = []
    for same_step in zip(*parts, strict=True):
        digest = hashlib.sha256(torch.cat([batch.images for batch in same_step]).numpy().tobytes())
        digest.update(torch.cat([batch.erased for batch in same_step]).numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def indices(parts: list[list[Batch]]) -> list[int]:
    return [index for same_step in zip(*parts, strict=True) for batch in same_step for index in batch.indices.tolist()]


def test_columns_classes_and_length_of_a_stream_are_known_without_reading_it(shards: Path) -> None:
    splits = load_splits(DataConfig(dataset=str(shards), streaming=True))
    assert splits.label_names == ("cat", "dog")
    assert isinstance(splits.train, StreamedImages)
    assert (splits.train.count, splits.eval.count) == (43, 11)
    assert (splits.train.image_column, splits.train.label_column) == ("image", "kind")
    assert [groups.tolist() for groups in splits.train.groups] == [[4, 4, 4, 4, 1], [4, 1], [4, 4, 4, 4, 4, 1]]


def test_an_alternating_flip_mirrors_each_image_of_a_stream_in_every_other_epoch(stream: StreamedImages) -> None:
    config = TransformConfig(alternating_flip=True, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    augment = Augmentation(config, resolve_input(config, CFG))
    samples = StreamSamples(stream, augment, seed=3, batch_size=4, lanes=4, block_size=40)
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in samples.batches(0, 43 * 3 // 4, 0, 1, 0, pin_memory=False):
        for index, image in zip(batch.indices.tolist(), batch.images.clone(), strict=True):
            seen.setdefault(index, []).append(image)
    pairs = [pair for images in seen.values() for pair in pairwise(images)]
    assert len(pairs) > 80
    assert all(torch.equal(before, after.flip(-1)) for before, after in pairs)
    assert not all(torch.equal(before, after) for before, after in pairs)


@mark.parametrize(("block", "batch", "lanes"), [(40, 12, 4), (1, 12, 12), (1000, 12, 1), (100, 60, 60)])
def test_every_sample_occurs_once_per_epoch(stream: StreamedImages, block: int, batch: int, lanes: int) -> None:
    seen = indices(batches(stream, -(-3 * 43 // batch), block=block, batch=batch, lanes=lanes))
    counts = Counter(seen)
    assert set(counts) == set(range(43))
    assert set(counts.values()) <= {len(seen) // 43, len(seen) // 43 + 1}
    if lanes == 1:
        for epoch in range(3):
            assert sorted(seen[43 * epoch : 43 * epoch + 43]) == list(range(43))
    assert seen[:43] != seen[43:86]  # epochs differ in order


def test_row_groups_are_shuffled_and_samples_within_them(stream: StreamedImages) -> None:
    seen = indices(batches(stream, 1, batch=43, lanes=1))
    ends = np.cumsum(np.concatenate(stream.groups))
    groups = np.searchsorted(ends, seen, "right").tolist()
    in_a_row = [group for group, _ in groupby(groups)]
    assert sorted(in_a_row) == list(range(len(ends)))
    assert in_a_row != sorted(in_a_row)
    assert any(a > b for (a, b), (g, h) in zip(pairwise(seen), pairwise(groups), strict=True) if g == h)


@mark.filterwarnings("ignore:This DataLoader will create")  # more workers than some machines have cores
@mark.parametrize("workers", [0, 1, 2, 3])
@mark.parametrize("processes", [1, 2, 3, 4])
def test_two_epochs_have_the_same_pixels_for_any_number_of_processes_and_workers(
    stream: StreamedImages, processes: int, workers: int
) -> None:
    assert hashes(batches(stream, 8, processes, workers)) == hashes(batches(stream, 8))


def test_a_stream_resumes_at_any_step_with_the_same_pixels(stream: StreamedImages) -> None:
    whole = hashes(batches(stream, 9))
    for step in range(1, 9):
        assert hashes(batches(stream, 9, processes=2, start=step)) == whole[step:], step


@mark.parametrize("processes", [1, 2, 3])
@mark.parametrize("workers", [0, 2])
def test_the_evaluation_split_is_read_completely_and_in_order(shards: Path, processes: int, workers: int) -> None:
    images = load_splits(DataConfig(dataset=str(shards), streaming=True)).eval
    assert isinstance(images, StreamedImages)
    transform = EvalTransform(InputConfig.resolve(CFG))
    expected = load_splits(DataConfig(dataset=str(shards))).eval
    seen: dict[int, torch.Tensor] = {}
    for process in range(processes):
        samples = StreamedEvaluation(images, transform)
        for batch in samples.batches(4, process, processes, workers, pin_memory=False):
            seen |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
        assert samples.count == 11
    assert sorted(seen) == list(range(11))
    for index, image in seen.items():
        assert torch.equal(image, transform(expected.image(index)))  # type: ignore[union-attr, arg-type]


def test_an_unreadable_sample_is_replaced_by_the_next_one_of_its_block_or_by_another(tmp_path: Path) -> None:
    contents = [png(i) for i in range(6)]
    contents[2] = contents[2][:200]
    write_shard(tmp_path / "train-0.parquet", contents)
    write_shard(tmp_path / "test-0.parquet", [png(9), b""])
    splits = load_splits(DataConfig(dataset=str(tmp_path), streaming=True))
    found = [batches(splits.train, 2, processes, batch=6, lanes=lanes) for lanes in (6, 1) for processes in (1, 2, 3)]
    assert hashes(found[0]) == hashes(found[1]) == hashes(found[2])  # each block is a single sample
    found = found[3:]
    assert hashes(found[0]) == hashes(found[1]) == hashes(found[2])
    unreadable = [entry for part in found[0] for batch in part for entry in batch.unreadable]
    assert {(entry.name, entry.index) for entry in unreadable} == {("shard 0, record 2", 2)}
    assert len(unreadable) == 2  # once in each epoch
    (batch,) = StreamedEvaluation(splits.eval, EvalTransform(InputConfig.resolve(CFG))).batches(
        8, 0, 1, 0, pin_memory=False
    )
    assert [(entry.index, entry.reason) for entry in batch.unreadable] == [(1, "zero bytes")]


@mark.parametrize("workers", [0, 1])
def test_unreadable_images_only_end_the_run_with_one_line(tmp_path: Path, workers: int) -> None:
    write_shard(tmp_path / "train-0.parquet", [b"x"] * 6)
    write_shard(tmp_path / "test-0.parquet", [png(9)] * 2)
    splits = load_splits(DataConfig(dataset=str(tmp_path), streaming=True))
    with raises(RunError, match=r"^100 images in a row were unreadable; the last one was .*\(not an image\)$"):
        batches(splits.train, 1, workers=workers, batch=6, lanes=1)


def test_datasets_that_cannot_be_streamed_raise_an_error(tmp_path: Path) -> None:
    with raises(
        RequestError,
        match=r"^streaming=True needs .+ or WebDataset shards, but digits is none of these; use streaming=False$",
    ):
        load_splits(DataConfig(streaming=True))
    write_shard(tmp_path / "train-0.parquet", [png(1)] * 4)
    with raises(
        RequestError,
        match=r"^streaming=True needs an evaluation split, .* has the split train; choose one with eval_split$",
    ):
        load_splits(DataConfig(dataset=str(tmp_path), streaming=True))
    write_shard(tmp_path / "train-0.parquet", [png(1)] * 4, datasets.Value("int64"))
    write_shard(tmp_path / "test-0.parquet", [png(1)] * 4, datasets.Value("int64"))
    with raises(RequestError, match=r"column kind of .* does not define its classes"):
        load_splits(DataConfig(dataset=str(tmp_path), streaming=True))
    with raises(RequestError, match="shuffle_block=0"):
        DataConfig(shuffle_block=0)
