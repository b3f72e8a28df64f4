"""Collate samples into batches and pass them from data-loading workers to the training process.

Allocating memory costs a worker more than writing the pixels: every page has to be mapped and cleared for pixels that
are read once. So workers send pixels in shared memory that they reuse, and small arrays by value; the training process
copies the pixels.
"""

import signal
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from resnext_hub.data.augment import NOTHING, Edges
from resnext_hub.errors import RunError, one_line, setting

GRACE = 25
"""Seconds after SIGTERM at which a worker exits by itself; launchers allow the whole run 30."""

LAST_WORD = 1
"""Seconds to wait for torch's own account of a lost worker: its signal may arrive after the transfer has broken off."""

PREFETCH = 2
"""Batches that a worker loads in advance."""


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded."""

    index: int
    name: str
    """Its name in messages."""
    reason: str


@dataclass(frozen=True, eq=False)
class Sample:
    """An image `(C, H, W)` with its label and index, and the unreadable images that it replaces."""

    image: torch.Tensor
    label: int | np.ndarray
    """Its class, or with several labels, which it has, `(classes,)` bool."""
    index: int
    unreadable: list[Unreadable]
    erased: Edges = NOTHING


class Batch(NamedTuple):
    """Images `(N, C, H, W)`, labels and indices `(N,)` int64, and the unreadable images.

    If an image can have several labels, `labels` is `(N, classes)` bool.

    Training images are uint8 and channels last in memory; `erased` `(N, 4)` int64 holds the edges of the rectangle to
    erase in each. Evaluation images are float32 and normalized.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    unreadable: list[Unreadable]
    erased: torch.Tensor


class Parcel(NamedTuple):
    """A batch in transit, see `Batch`. One from a worker has to be opened before the next one is taken."""

    images: torch.Tensor
    labels: np.ndarray
    """`(N,)` int64 or `(N, classes)` bool."""
    numbers: np.ndarray
    """Index and the four edges of the erased rectangle of each sample; `(N, 5)` int64."""
    unreadable: list[Unreadable]

    def open(self) -> Batch:
        """Return the batch with its own copy of the pixels."""
        numbers = torch.from_numpy(self.numbers)
        return Batch(
            images=self.images.clone() if self.images.is_shared() else self.images,
            labels=torch.from_numpy(self.labels),
            indices=numbers[:, 0],
            unreadable=self.unreadable,
            erased=numbers[:, 1:],
        )


def join_parcels(parcels: Sequence[Parcel], pin_memory: bool) -> Batch:
    """Return the parts of a batch from several workers as one batch with its own copy of the pixels."""
    if len(parcels) == 1:
        return parcels[0].open()
    count, layout = sum(len(parcel.images) for parcel in parcels), parcels[0].images
    images = torch.empty(
        (count, *layout.shape[1:]), dtype=layout.dtype, memory_format=torch.channels_last, pin_memory=pin_memory
    )
    return Parcel(
        images=torch.cat([parcel.images for parcel in parcels], out=images),
        labels=np.concatenate([parcel.labels for parcel in parcels]),
        numbers=np.concatenate([parcel.numbers for parcel in parcels]),
        unreadable=[entry for parcel in parcels for entry in parcel.unreadable],
    ).open()


class Packer:
    """Stacks samples, keeping the memory format of their pixels.

    A worker cycles through `PREFETCH + 1` buffers. It is asked for another batch only when the training process takes
    one, so the buffer that it overwrites belongs to a parcel that was opened by then.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def __call__(self, samples: list[Sample]) -> Parcel:
        """Return the samples as a parcel."""
        images = [sample.image for sample in samples]
        channels_last = images[0].dtype == torch.uint8
        if channels_last:
            images = [image.permute(1, 2, 0) for image in images]
        stacked = torch.stack(images, out=self._buffer(images) if get_worker_info() else None)
        return Parcel(
            images=stacked.permute(0, 3, 1, 2) if channels_last else stacked,
            labels=np.array([sample.label for sample in samples]),
            numbers=np.array([(sample.index, *sample.erased) for sample in samples], dtype=np.int64),
            unreadable=[entry for sample in samples for entry in sample.unreadable],
        )

    def _buffer(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Return shared memory for the stacked images, reusing the oldest buffer if it is large enough."""
        shape, dtype = images[0].shape, images[0].dtype
        kept = self._kept.pop(0) if len(self._kept) > PREFETCH else None
        if kept is None or kept.dtype != dtype or kept.shape[1:] != shape or len(kept) < len(images):
            kept = torch.empty((len(images), *shape), dtype=dtype)
            try:
                kept.share_memory_()
            except RuntimeError as error:
                raise RunError(
                    f"a data-loading worker could not allocate {(PREFETCH + 1) * kept.nbytes / 1e6:.0f} MB of shared "
                    f"memory for its batches ({one_line(error)[:120]}); enlarge /dev/shm (docker run --shm-size) or "
                    f"reduce {setting('workers')}"
                ) from error
        self._kept.append(kept)
        return kept[: len(images)]


def build_loader(
    dataset: Dataset[Any], batches: Iterable[Sequence[Any]] | None, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Return the loader of a process's parcels.

    Args:
        dataset: A map-style dataset of samples, or an iterable one that already yields parcels.
        batches: Keys of the samples of each batch; None for an iterable dataset.
        workers: Number of data-loading workers.
        pin_memory: Whether to copy batches to page-locked memory, for a GPU.
    """
    return DataLoader(
        dataset,
        batch_size=None if batches is None else 1,
        batch_sampler=batches,  # type: ignore[arg-type]  # torch accepts any iterable, but its annotation does not
        num_workers=workers,
        collate_fn=_unchanged if batches is None else Packer(),
        pin_memory=pin_memory,
        worker_init_fn=defer_stop_signals,
        prefetch_factor=PREFETCH if workers else None,
    )


def _unchanged(item: Any) -> Any:
    return item


def defer_stop_signals(worker: int) -> None:
    """Keep a worker running when a stop signal reaches the whole process group.

    The training process finishes its step first and then ends its workers. A worker exits by itself `GRACE` seconds
    after SIGTERM, so shutdown takes at most that long.
    """
    signal.set_wakeup_fd(-1)  # inherited: the training process would take this worker's signals for its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def read_batches(loader: DataLoader[Parcel]) -> Generator[Batch, None, None]:
    """Yield the batches of a loader; closing this generator ends the loader's workers."""
    for parcel in read_items(loader):
        yield parcel.open()


def read_items(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """Yield the items of a loader; closing this generator ends the loader's workers.

    Raises:
        RunError: If reading fails, or a worker exits unexpectedly.
    """
    try:
        yield from loader
    except RunError as error:  # torch puts the worker's traceback in its message
        error.__traceback__ = None  # its frames keep the workers alive
        raise RunError(str(error).rpartition(f"{RunError.__name__}: ")[2].strip()) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        lost = lost_worker(error)
        if lost is None:
            raise
        error.__traceback__ = None
        raise lost from None


def lost_worker(error: Exception) -> RunError | None:
    """Return the error for a worker that exited unexpectedly, or None if the error has another cause.

    Returns after `LAST_WORD` seconds, or earlier if torch gives the reason in the meantime.
    """
    if not _is_lost(error):
        return None
    try:  # torch raises once more, wherever the process is when the worker's signal arrives; here it does no harm
        time.sleep(LAST_WORD)
    except RuntimeError as cause:
        if _is_lost(cause):
            error = cause
    return RunError(
        f"a data-loading worker exited unexpectedly ({one_line(error)[:100]}); if memory ran out (in a container, "
        f"possibly /dev/shm), reduce {setting('workers')} or {setting('batch_size')}"
    )


def _is_lost(error: Exception) -> bool:
    """Return whether an error says that a worker exited: torch's own, or a transfer from the worker that broke off."""
    if str(error).startswith("Caught "):  # raised by the dataset, in a worker that still runs
        return False
    return isinstance(error, (ConnectionError, EOFError)) or str(error).startswith("DataLoader worker")
