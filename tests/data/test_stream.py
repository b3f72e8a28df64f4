"""A stream has the same order for any number of processes and workers, and can be resumed at any position."""

import hashlib
import io
import logging
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from pytest import LogCaptureFixture, fixture, mark, raises

from resnext_hub.data.augment import Augmentation
from resnext_hub.data.batches import Batch, Position, read_batches
from resnext_hub.data.config import DataConfig
from resnext_hub.data.images import StreamedImages
from resnext_hub.data.splits import load_splits
from resnext_hub.data.stream import StreamBatches, StreamedEvaluation, build_stream_loader
from resnext_hub.data.transforms import EvalTransform, TransformConfig, resolve_input
from resnext_hub.errors import RequestError, RunError
from resnext_hub.models.input_config import InputConfig

CFG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
AUGMENTED = TransformConfig(auto_augment="rand-m7-mstd0.5", random_erasing=0.5, color_jitter=0.3)

START = Position(0, 0)

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
    datasets.Dataset.from_dict(table, features=features).to_parquet(path)


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
    start: Position = START,
    block: int = 10,
    batch: int = 12,
) -> list[list[Batch]]:
    """Return the batches of each process."""
    augment = Augmentation(AUGMENTED, resolve_input(AUGMENTED, CFG))
    return [
        list(
            read_batches(
                build_stream_loader(
                    StreamBatches(
                        stream, augment, seed=3, batch_size=batch, block_size=block, start=start,
                        steps=steps, process=process, processes=processes,
                    ),
                    workers,
                )
            )
        )
        for process in range(processes)
    ]  # fmt: skip


def hashes(parts: list[list[Batch]]) -> list[str]:
    """Return a hash of the pixels of each global batch."""
    found = []
    for same_step in zip(*parts, strict=True):
        assert len({batch.end for batch in same_step}) == 1
        digest = hashlib.sha256(torch.cat([batch.images for batch in same_step]).numpy().tobytes())
        digest.update(torch.cat([batch.erased for batch in same_step]).numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def indices(parts: list[list[Batch]]) -> list[int]:
    return [index for same_step in zip(*parts, strict=True) for batch in same_step for index in batch.indices.tolist()]


def test_columns_and_classes_of_a_stream_are_known_without_reading_it(shards: Path) -> None:
    splits = load_splits(DataConfig(dataset=str(shards), streaming=True))
    assert splits.label_names == ("cat", "dog")
    assert isinstance(splits.train, StreamedImages)
    assert (splits.train.shards, splits.train.image_column, splits.train.label_column) == (3, "image", "kind")


@mark.parametrize(("block", "batch"), [(10, 12), (1, 12), (1000, 12), (7, 60)])
def test_every_sample_occurs_once_per_epoch(stream: StreamedImages, block: int, batch: int) -> None:
    everything = {(shard << 32) + n for shard, size in enumerate(SHARDS) for n in range(size)}
    seen = indices(batches(stream, steps=-(-3 * 43 // batch), block=block, batch=batch))
    for epoch in range(3):
        assert set(seen[43 * epoch : 43 * epoch + 43]) == everything
    assert seen[:43] != seen[43:86]  # epochs differ in order


def test_samples_are_shuffled_within_their_block(stream: StreamedImages) -> None:
    in_order = indices(batches(stream, 1, block=1, batch=43))
    shuffled = indices(batches(stream, 1, block=10, batch=43))
    assert shuffled != in_order
    for begin in range(0, 43, 10):
        assert sorted(shuffled[begin : begin + 10]) == sorted(in_order[begin : begin + 10])


@mark.filterwarnings("ignore:This DataLoader will create")  # more workers than some machines have cores
@mark.parametrize("workers", [0, 1, 2, 3])
@mark.parametrize("processes", [1, 2, 3, 4])
def test_two_epochs_have_the_same_pixels_for_any_number_of_processes_and_workers(
    stream: StreamedImages, processes: int, workers: int
) -> None:
    assert hashes(batches(stream, 8, processes, workers)) == hashes(batches(stream, 8))


def test_a_stream_resumes_at_any_step_with_the_same_pixels(stream: StreamedImages, caplog: LogCaptureFixture) -> None:
    whole = batches(stream, 9)
    with caplog.at_level(logging.INFO, "resnext_hub"):
        for step, batch in enumerate(whole[0][:-1], start=1):
            assert batch.end is not None
            rest = batches(stream, 9 - step, processes=2, start=batch.end)
            assert hashes(rest) == hashes(whole)[step:], step
    assert "skipped 12 records of epoch 0 without decoding" in caplog.text
    # the fourth batch of 12 ends 5 samples after the first epoch of 43
    assert whole[0][3].end == Position(1, 5)
    assert "skipped 5 records of epoch 1 without decoding" in caplog.text


def test_the_end_of_an_epoch_is_the_start_of_the_next(stream: StreamedImages) -> None:
    ends = [batch.end for batch in batches(stream, 4, batch=43)[0]]
    assert ends == [Position(1, 0), Position(2, 0), Position(3, 0), Position(4, 0)]


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


def test_an_unreadable_sample_is_replaced_by_the_next_one_of_its_block(tmp_path: Path) -> None:
    contents = [png(i) for i in range(6)]
    contents[2] = contents[2][:200]
    write_shard(tmp_path / "train-0.parquet", contents)
    write_shard(tmp_path / "test-0.parquet", [png(9), b""])
    splits = load_splits(DataConfig(dataset=str(tmp_path), streaming=True))
    found = [batches(splits.train, 2, processes, batch=6, block=4) for processes in (1, 2, 3)]
    assert hashes(found[0]) == hashes(found[1]) == hashes(found[2])
    unreadable = [entry for part in found[0] for batch in part for entry in batch.unreadable]
    assert {(entry.name, entry.index) for entry in unreadable} == {("shard 0, record 2", 2)}
    assert len(unreadable) == 2  # once in each epoch
    (batch,) = StreamedEvaluation(splits.eval, EvalTransform(InputConfig.resolve(CFG))).batches(
        8, 0, 1, 0, pin_memory=False
    )
    assert [(entry.index, entry.reason) for entry in batch.unreadable] == [(1, "zero bytes")]


@mark.parametrize("workers", [0, 1])
def test_a_block_of_unreadable_images_ends_the_run_with_one_line(tmp_path: Path, workers: int) -> None:
    write_shard(tmp_path / "train-0.parquet", [b"x"] * 6)
    write_shard(tmp_path / "test-0.parquet", [png(9)] * 2)
    splits = load_splits(DataConfig(dataset=str(tmp_path), streaming=True))
    with raises(RunError, match=r"^4 consecutive records are unreadable; the last one: .*\(not an image\)$"):
        batches(splits.train, 1, workers=workers, batch=6, block=4)


def test_datasets_that_cannot_be_streamed_raise_an_error(tmp_path: Path) -> None:
    with raises(
        RequestError,
        match=r"^streaming=True needs .+ or WebDataset shards, and digits is none of these; use streaming=False$",
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
