"""A stream is read once, however many processes and workers share it; measured by the server that it comes from."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from pytest import fixture, mark
from support import warm_start
from support.loopback_hub import LoopbackHub, serve
from support.processes import ROOT

SHARDS = 32
BATCH = 64

READ = """
import hashlib, json, sys
import torch
from resnext_hub.data.augment import Augmentation
from resnext_hub.data.config import DataConfig
from resnext_hub.data.lanes import fitting_lanes
from resnext_hub.data.splits import load_splits
from resnext_hub.data.stream import StreamedEvaluation, StreamSamples
from resnext_hub.data.transforms import EvalTransform, TransformConfig, resolve_input
from resnext_hub.models.input_config import InputConfig

def digest(tensors):
    return [hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for tensor in tensors]

torch.set_num_threads(1)
cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
process, processes, workers, start, what = *map(int, sys.argv[1:5]), sys.argv[5]
splits = load_splits(DataConfig(dataset="me/images", streaming=True))
train = splits.train
if what == "training":
    lanes = fitting_lanes(BATCH, train.row_groups)
    transform = TransformConfig(random_erasing=0.5)
    augment = Augmentation(transform, resolve_input(transform, cfg))
    samples = StreamSamples(train, augment, seed=3, batch_size=BATCH, lanes=lanes, block_size=1000)
    batches = samples.batches(start, train.count // BATCH, process, processes, workers, False)
    found = [digest(batch.images) for batch in batches]
else:
    samples = StreamedEvaluation(train, EvalTransform(InputConfig.resolve(cfg)))
    lanes = 0
    batches = list(samples.batches(BATCH, process, processes, workers, False))
    found = sorted((int(n), pixels) for b in batches for n, pixels in zip(b.indices, digest(b.images)))
print(json.dumps({"lanes": lanes, "found": found}))
"""


@fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LoopbackHub]:
    """A dataset of 32 shards of unequal length on the Hub, with small row groups."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    files = {}
    for shard in range(SHARDS):
        count = int(generator.integers(44, 61))
        pixels = generator.integers(0, 256, (count, 80, 80, 3), dtype=np.uint8)
        table = {"image": list(pixels), "label": [n % 2 for n in range(count)]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "part.parquet", batch_size=4)
        files[f"data/train-{shard:05d}-of-{SHARDS:05d}.parquet"] = (folder / "part.parquet").read_bytes()
    files["data/test-00000-of-00001.parquet"] = (folder / "part.parquet").read_bytes()
    with serve() as hub:
        hub.create("datasets", "me/images").commit("data", files)
        yield hub


def size_of(hub: LoopbackHub) -> int:
    files = hub.repos["datasets/me/images"].commits[-1].files
    return sum(len(content) for name, content in files.items() if "train" in name)


def read(
    hub: LoopbackHub, home: Path, processes: int, workers: int, start: int = 0, what: str = "training"
) -> tuple[list[dict[str, object]], int]:
    """Read an epoch from a step on; return what each process found, and the bytes that the server sent."""
    environment = os.environ | hub.environment() | {"HF_HOME": str(home), "RESNEXT_HUB_CACHE": str(home / "cache")}
    before = hub.sent
    code = READ.replace("BATCH", str(BATCH))
    running = [
        warm_start.Popen(
            [sys.executable, "-c", code, *map(str, (process, processes, workers, start)), what],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    found = [json.loads(process.communicate(timeout=300)[0]) for process in running]
    return found, hub.sent - before


def hashes(parts: list[dict[str, object]]) -> list[str]:
    """Return a hash of the pixels of each global batch."""
    steps = zip(*(part["found"] for part in parts), strict=True)  # type: ignore[call-overload]
    return [hashlib.sha256("".join(digest for part in step for digest in part).encode()).hexdigest() for step in steps]


@fixture(scope="module")
def alone(hub: LoopbackHub, tmp_path_factory) -> tuple[list[dict[str, object]], int]:
    return read(hub, tmp_path_factory.mktemp("alone"), 1, 0)


@mark.slow
@mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 2), (4, 2)])
def test_processes_and_workers_read_an_epoch_once_with_the_same_pixels(
    hub: LoopbackHub, alone: tuple[list[dict[str, object]], int], tmp_path: Path, processes: int, workers: int
) -> None:
    found, sent = alone if (processes, workers) == (1, 0) else read(hub, tmp_path, processes, workers)
    print(f"{processes} x {workers}: {sent / size_of(hub):.3f} times the bytes of an epoch")
    assert found[0]["lanes"] == 8
    assert hashes(found) == hashes(alone[0])
    assert 0.9 < sent / size_of(hub) < 1.1


@mark.slow
def test_a_resume_reads_what_is_left(
    hub: LoopbackHub, alone: tuple[list[dict[str, object]], int], tmp_path: Path
) -> None:
    whole = hashes(alone[0])
    start = round(0.9 * len(whole))
    read(hub, tmp_path, 1, 0, len(whole))  # only the footers, which the next run finds in the cache
    found, sent = read(hub, tmp_path, 2, 2, start)
    left = size_of(hub) * (len(whole) - start) / len(whole)
    print(f"resume at step {start} of {len(whole)}: {sent / left:.3f} times the bytes that are left")
    assert hashes(found) == whole[start:]
    assert sent / left < 1.2


@mark.slow
@mark.parametrize(("processes", "workers"), [(1, 2), (2, 2), (4, 2)])
def test_an_evaluation_reads_a_stream_once(hub: LoopbackHub, tmp_path: Path, processes: int, workers: int) -> None:
    found, sent = read(hub, tmp_path, processes, workers, what="evaluation")
    print(f"evaluation with {processes} x {workers}: {sent / size_of(hub):.3f} times the bytes")
    everything = [tuple(sample) for part in found for sample in part["found"]]  # type: ignore[attr-defined]
    assert [index for index, _ in everything] == list(range(len(everything)))
    assert sent / size_of(hub) < 1.1
