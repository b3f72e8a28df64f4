"""Count the correct predictions of a saved model again, with timm in a process of its own."""

import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from resnext_hub.data.decode import UnreadableImageError, decode, within_memory
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.splits import Images
from resnext_hub.errors import RunError
from resnext_hub.facts import LabelFacts
from resnext_hub.models.lookup import ModelSource, needs_plugin
from resnext_hub.record import sparse_rows
from resnext_hub.runs import stock_timm
from resnext_hub.runs.evaluation_facts import label_facts
from resnext_hub.text import printable
from resnext_hub.training.multi_label import MultiLabelEvaluation


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a model predicts for a split, by the classes of the dataset."""

    correct: int
    count: int
    confusion: list[list[tuple[int, int]]]
    """As in a record; empty with several labels."""
    labels: list[LabelFacts] | None
    """Results for each label if an image can have several."""


class StockTimm:
    """A process in which timm computes logits; see `start_timm`."""

    def __init__(self, process: "subprocess.Popen[bytes]", errors: IO[bytes], batch_size: int, classes: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._errors = process, errors
        self._input, self._output = process.stdin, process.stdout
        self.batch_size, self._classes = batch_size, classes
        try:
            self.versions: dict[str, Any] = json.loads(self._output.readline())
        except ValueError:
            raise self._failure() from None

    def logits(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the logits of at most a batch of images, `(N, classes)` float32.

        Raises:
            RunError: If the process failed; the message has its last line.
        """
        try:
            self._input.write(struct.pack("<I", len(images)))
            for image in images:
                pixels = np.asarray(image)
                self._input.write(struct.pack("<3I", *pixels.shape[:2], len(image.getbands())))
                self._input.write(pixels.tobytes())
            self._input.flush()
        except OSError:
            raise self._failure() from None
        found = self._output.read(4 * len(images) * self._classes)
        if len(found) < 4 * len(images) * self._classes:
            raise self._failure()
        return np.frombuffer(found, np.float32).reshape(len(images), self._classes)

    def _failure(self) -> RunError:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {self._process.returncode}"
        return RunError(f"timm could not compute the logits: {printable(reason)[:300]}")


@contextmanager
def start_timm(folder: Path, source: ModelSource, batch_size: int, device: str) -> Iterator[StockTimm]:
    """Start a process in which timm computes logits, and end it afterwards.

    Args:
        folder: The model folder.
        source: The model in it.
        batch_size: Images per forward pass.
        device: Device to compute on.

    Raises:
        RunError: If the process fails.
    """
    # -P, because the folder of the script has modules with common names
    words = [sys.executable, "-P", stock_timm.__file__, str(folder.absolute()), f"--batch-size={batch_size}"]
    words += [f"--device={device}", f"--threads={torch.get_num_threads()}"]
    words += ["--flip"] if source.saved.config.tta == "flip" else []
    words += ["--plugin"] if needs_plugin(source.architecture) else []
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=errors) as process,
    ):
        try:
            yield StockTimm(process, errors, batch_size, source.saved.config.num_classes)
        finally:
            process.kill()


def recount(timm: StockTimm, source: ModelSource, images: Images, names: Sequence[str], max_pixels: int) -> Counts:
    """Evaluate a model on a split.

    Predictions are compared by name, so a name that is given to another output counts as that class.

    Args:
        timm: The process that has the model.
        source: The model; its label names are those of the dataset, in any order.
        images: The split.
        names: The class names of the dataset.
        max_pixels: An image with more pixels is unreadable, as in the evaluation of the run.

    Raises:
        RunError: If the process fails, or no image is readable.
    """
    outputs = np.array([source.saved.label_names.index(name) for name in names])
    decoded = _decoded(images, source.saved.input.mode, max_pixels)
    results: list[tuple[Any, Any]] = []
    while batch := list(islice(decoded, timm.batch_size)):
        logits = timm.logits([image for image, _ in batch])[:, outputs]
        readable = [(label, row) for (_, label), row in zip(batch, logits, strict=True) if label is not None]
        results += readable if images.is_multi_label else [(label, row.argmax()) for label, row in readable]
    if not results:
        raise RunError("none of the images is readable")
    labels, found = (np.array(column) for column in zip(*results, strict=True))
    if images.is_multi_label:
        return _several(labels, found, np.array(source.saved.config.thresholds or [0.5] * len(names))[outputs])
    matrix = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(matrix, (labels, found), 1)
    return Counts(correct=int(matrix.trace()), count=len(labels), confusion=sparse_rows(matrix.tolist()), labels=None)


def _several(labels: np.ndarray, logits: np.ndarray, thresholds: np.ndarray) -> Counts:
    evaluation = MultiLabelEvaluation(
        indices=np.arange(len(labels)),
        labels=labels,
        probabilities=torch.from_numpy(logits).double().sigmoid().numpy(),
        losses=np.zeros(len(labels)),
        thresholds=thresholds,
        unreadable=[],
        total=len(labels),
    )
    return Counts(correct=evaluation.correct, count=evaluation.count, confusion=[], labels=label_facts(evaluation))


def _decoded(images: Images, mode: str, max_pixels: int) -> Iterator[tuple[Image.Image, Any]]:
    """Yield images with their labels, in order; an unreadable one is black and has the label None."""
    entries: Any = (
        ((index, images.label(index)) for index in range(len(images)))
        if isinstance(images, IndexedImages)
        else ((record, record.label) for record in images.records())
    )
    for entry, label in entries:
        try:
            with within_memory():
                image = decode(images.row(entry), mode, max_pixels)
        except UnreadableImageError:
            image, label = Image.new(mode, (8, 8)), None
        yield image, label
