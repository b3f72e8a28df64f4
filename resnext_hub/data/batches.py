"""From samples to batches, and from the processes that read images to the one that computes.

New memory costs a reading process more than all that it writes there: each page is fetched and cleared, for pixels that
are looked at once. So pixels travel in memory that is kept and written anew, small arrays by value, and the computing
process takes a copy of the pixels.
"""

import signal
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from resnext_hub.data.augment import NOTHING, Edges
from resnext_hub.errors import RunError, one_line

GRACE = 25
"""Seconds that a reading process outlives SIGTERM; launchers give the whole run 30."""

PREFETCH = 2
"""Batches that a reading process makes ahead."""


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded."""

    index: int
    name: str
    """What people know it by."""
    reason: str


@dataclass(frozen=True, eq=False)
class Sample:
    """An image `(C, H, W)` with its label and index, and what could not be read on the way."""

    image: torch.Tensor
    label: int
    index: int
    unreadable: list[Unreadable]
    erased: Edges = NOTHING


class Position(NamedTuple):
    """Where the endless sequence of samples stands: in which epoch, and how many of its samples are done."""

    epoch: int
    place: int


class Batch(NamedTuple):
    """Images `(N, C, H, W)`, labels and indices `(N,)` int64, what was unreadable.

    Images to train on are uint8 and channels last in memory, `erased` `(N, 4)` int64 has the edges of what is to be
    erased of each; those to evaluate on are float32 and normalised. `end` is where the sequence stands after the global
    batch; None if that follows from the step.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    unreadable: list[Unreadable]
    erased: torch.Tensor
    end: Position | None = None


class Parcel(NamedTuple):
    """A batch on its way, as in `Batch`. From a reading process, it is to be opened before the next one is taken."""

    images: torch.Tensor
    numbers: np.ndarray
    """Of each sample: label, index, and the four edges of what is erased; `(N, 6)` int64."""
    unreadable: list[Unreadable]
    end: Position | None

    def open(self) -> Batch:
        """Give the batch, with pixels of its own."""
        numbers = torch.from_numpy(self.numbers)
        return Batch(
            images=self.images.clone() if self.images.is_shared() else self.images,
            labels=numbers[:, 0],
            indices=numbers[:, 1],
            unreadable=self.unreadable,
            erased=numbers[:, 2:],
            end=self.end,
        )


class Packer:
    """Stacks samples, pixels in the order that they have in memory.

    A reading process goes round in memory for one batch more than it makes ahead: it is asked for the next but one when
    the computing process takes a batch, so what it writes over was opened by then.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def __call__(self, samples: list[Sample], end: Position | None = None) -> Parcel:
        """Make a parcel."""
        images = [sample.image for sample in samples]
        channels_last = images[0].dtype == torch.uint8
        if channels_last:
            images = [image.permute(1, 2, 0) for image in images]
        stacked = torch.stack(images, out=self._room(images) if get_worker_info() else None)
        return Parcel(
            images=stacked.permute(0, 3, 1, 2) if channels_last else stacked,
            numbers=np.array([(sample.label, sample.index, *sample.erased) for sample in samples], dtype=np.int64),
            unreadable=[entry for sample in samples for entry in sample.unreadable],
            end=end,
        )

    def _room(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Give shared memory for the stacked images: that which was given longest ago, if it is large enough."""
        shape, dtype = images[0].shape, images[0].dtype
        kept = self._kept.pop(0) if len(self._kept) > PREFETCH else None
        if kept is None or kept.dtype != dtype or kept.shape[1:] != shape or len(kept) < len(images):
            kept = torch.empty((len(images), *shape), dtype=dtype)
            try:
                kept.share_memory_()
            except RuntimeError as error:
                raise RunError(
                    f"a reader has no shared memory for its {(PREFETCH + 1) * kept.nbytes / 1e6:.0f} MB of batches "
                    f"({one_line(error)[:120]}); give more to /dev/shm (docker run --shm-size), or take fewer --workers"
                ) from error
        self._kept.append(kept)
        return kept[: len(images)]


def build_loader(
    dataset: Dataset[Any], batches: Iterable[Sequence[Any]] | None, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Give the parcels of a process.

    Args:
        dataset: Samples by place; or parcels, and what else it has to say, in order.
        batches: The places of each batch; None with what is in order.
        workers: Reading processes.
        pin_memory: Whether batches lie where a GPU can fetch them.
    """
    return DataLoader(
        dataset,
        batch_size=None if batches is None else 1,
        batch_sampler=batches,  # type: ignore[arg-type]  # whose type leaves out what it takes
        num_workers=workers,
        collate_fn=_as_it_is if batches is None else Packer(),
        pin_memory=pin_memory,
        worker_init_fn=leave_stopping_to_the_parent,
        prefetch_factor=PREFETCH if workers else None,
    )


def _as_it_is(item: Any) -> Any:
    return item


def leave_stopping_to_the_parent(worker: int) -> None:
    """Read on when a signal reaches the whole process group: the training process ends its step, and its readers then.

    After `GRACE` seconds a reader goes in any case, so that nobody who wants it gone waits for ever.
    """
    signal.set_wakeup_fd(-1)  # the training process's, which would take this worker's signals for its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def read_batches(loader: DataLoader[Parcel]) -> Generator[Batch, None, None]:
    """Give the batches of a loader; closing this generator ends the loader's workers."""
    for parcel in read_items(loader):
        yield parcel.open()


def read_items(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """Give what a loader gives; closing this generator ends the loader's workers.

    Raises:
        RunError: If reading fails, or a reader does not live on.
    """
    try:
        yield from loader
    except RunError as error:  # from a worker it comes with that one's traceback in its text
        error.__traceback__ = None  # its frames hold the workers
        raise RunError(str(error).rpartition(f"{RunError.__name__}: ")[2].strip()) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        lost = lost_worker(error)
        if lost is None:
            raise
        error.__traceback__ = None
        raise lost from None


def lost_worker(error: Exception) -> RunError | None:
    """Give the error of a reader that is gone, if that is what torch says of it.

    Torch says so in whatever the computing process is at when the reader ends, or finds what it sent broken off.
    """
    text = str(error)
    broken_off = isinstance(error, (ConnectionError, EOFError)) and not text.startswith("Caught ")
    if not broken_off and not text.startswith("DataLoader worker"):
        return None
    return RunError(
        f"a reading process is gone ({one_line(error)[:100]}); where memory is short, as of /dev/shm in a container, "
        "fewer --workers or a smaller --batch-size help"
    )
