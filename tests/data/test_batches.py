"""Batches from data-loading workers equal their samples, although workers reuse shared memory."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import numpy as np
import torch
from pytest import mark, raises
from support.processes import ROOT
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from resnext_hub.data.augment import Edges
from resnext_hub.data.batches import (
    PREFETCH,
    Batch,
    Packer,
    Parcel,
    Sample,
    Unreadable,
    build_loader,
    read_batches,
    read_items,
)
from resnext_hub.errors import RunError

COUNT, SIZE = 20, 3
"""Number of batches, and of samples in each."""


def sample(index: int, dtype: torch.dtype = torch.uint8) -> Sample:
    unreadable = [Unreadable(index, f"image {index}", "truncated")] if index == 7 else []
    return Sample(torch.full((3, 4, 5), index, dtype=dtype), index % 10, index, unreadable, Edges(0, index % 4, 1, 2))


class Samples(Dataset[Sample]):
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __getitem__(self, index: int) -> Sample:
        return sample(index, self.dtype)


class Parcels(IterableDataset[Parcel]):
    def __iter__(self):
        worker, pack = get_worker_info(), Packer()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in range(number, COUNT, workers):
            yield pack([sample(batch * SIZE + i) for i in range(SIZE)])


def loader(workers: int, dtype: torch.dtype = torch.uint8, *, in_order: bool = False):
    places = [list(range(start, start + SIZE)) for start in range(0, COUNT * SIZE, SIZE)]
    places[-1] = places[-1][:1]  # the last batch is smaller
    return build_loader(Parcels() if in_order else Samples(dtype), None if in_order else places, workers, False)


def check(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected) == COUNT
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("images", "labels", "indices", "erased"):
            left, right = getattr(mine, name), getattr(theirs, name)
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        assert mine.unreadable == theirs.unreadable
        assert not mine.images.is_shared()


@mark.filterwarnings("ignore:This DataLoader will create")  # more workers than some machines have cores
@mark.parametrize("in_order", [False, True])
@mark.parametrize("workers", [1, 3])
@mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_batches_do_not_change_while_later_ones_are_loaded(dtype: torch.dtype, workers: int, in_order: bool) -> None:
    expected = list(read_batches(loader(0, dtype, in_order=in_order)))
    assert [float(batch.images[0, 0, 0, 0]) for batch in expected] == list(range(0, COUNT * SIZE, SIZE))
    check(list(read_batches(loader(workers, dtype, in_order=in_order))), expected)


@mark.parametrize("in_order", [False, True])
def test_a_parcel_does_not_change_until_the_next_one_is_taken(in_order: bool) -> None:
    expected = iter(read_batches(loader(0, in_order=in_order)))
    for number, parcel in enumerate(loader(1, in_order=in_order)):
        if number in (0, PREFETCH, PREFETCH + 1, 8):
            time.sleep(0.3)  # by now, the worker has written all batches that it may prefetch
        assert torch.equal(parcel.open().images, next(expected).images), number


def test_training_images_are_channels_last_in_memory() -> None:
    for workers in (0, 1):
        batch = next(read_batches(loader(workers)))
        assert batch.images.shape == (SIZE, 3, 4, 5)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.erased[2].numpy(), sample(2).erased)


class KillsWorker(Samples):
    """Samples whose worker is killed at one of them, as if memory ran out."""

    def __getitem__(self, index: int) -> Sample:
        if index == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


# torch raises the same error again in whatever runs when the signal arrives, which may be a finalizer
@mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_reported_in_one_line() -> None:
    places = [[place] for place in range(40)]
    batches = read_batches(build_loader(KillsWorker(torch.uint8), places, 1, False))
    advice = r"if memory ran out \(in a container, possibly /dev/shm\), reduce workers or batch_size"
    with raises(RunError, match=rf"^a data-loading worker exited unexpectedly \(.*\); {advice}$"):
        list(batches)


def test_a_worker_whose_signal_arrives_late_is_reported_with_its_reason() -> None:
    """The transfer breaks off first; torch raises the reason from the handler of a signal that follows."""

    def reason(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def broken_off() -> Iterator[Batch]:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        raise ConnectionResetError("Connection reset by peer")
        yield

    before = signal.signal(signal.SIGALRM, reason)
    try:
        with raises(RunError, match="killed by signal: Killed"):
            list(read_items(broken_off()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


SHORT = """
mount -t tmpfs -o size=200k tmpfs /dev/shm && exec "$0" -m resnext_hub train --model test_resnet --max-steps 3 \
    --batch-size 200 --workers 1 --threads 1 --output-dir "$1"
"""

ALONE = ("unshare", "--map-root-user", "--mount")


@mark.skipif(
    not which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs permission to create a mount namespace",
)
@mark.slow
def test_too_little_shared_memory_is_reported_in_one_line(tmp_path: Path) -> None:
    words = [*ALONE, "sh", "-c", SHORT, sys.executable, str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert re.search(
        r"^error: a data-loading worker could not allocate \d+ MB of shared memory", done.stderr, re.MULTILINE
    )
    assert "Traceback" not in done.stderr
