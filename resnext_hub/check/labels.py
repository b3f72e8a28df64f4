"""Find images of a finished run whose labels are probably wrong, with the predictions of its model."""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from resnext_hub.check.confident import Flagged, Probabilities, find_wrong_labels
from resnext_hub.check.survey import used_images
from resnext_hub.data.batches import Unreadable
from resnext_hub.data.examine import SERIAL
from resnext_hub.data.exclude import Entry, read_exclusions
from resnext_hub.data.images import IndexedImages
from resnext_hub.data.loaders import EvaluationSamples
from resnext_hub.errors import RequestError, setting
from resnext_hub.inference.classifier import load
from resnext_hub.machine import cores, device_type
from resnext_hub.models.views import TestTimeAugmentation
from resnext_hub.processes.accelerator import set_threads
from resnext_hub.runs.reopen import reopen
from resnext_hub.text import printable
from resnext_hub.training.evaluation import log_probabilities, predict_batch
from resnext_hub.training.feed import evaluation_samples

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """The images of a split that the run used."""

    name: str
    """The split, or `held out` if the images were held out of the training split."""
    images: IndexedImages
    trained_on: bool
    """Whether the model was trained on them. It contradicts fewer of their labels then, wrong ones included."""
    estimate: float
    """Estimated number of wrong labels."""
    unreadable: tuple[Unreadable, ...]
    """Images that could not be checked."""


@dataclass(frozen=True, kw_only=True)
class WrongLabel:
    """An image whose label is probably wrong."""

    part: Part
    index: int
    """Its index among the images of the part."""
    label: int
    label_probability: float
    """Probability of its label according to the model."""
    suggested: int
    """The class that it probably belongs to."""
    probability: float
    """Probability of that class according to the model."""

    @property
    def row(self) -> int:
        """Its row in the split as it is stored."""
        return int(self.part.images.indices[self.index])

    @property
    def name(self) -> str:
        """Its name, for messages."""
        return self.part.images.name(self.index)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelFindings:
    """The result of a check of labels."""

    label_names: tuple[str, ...]
    parts: tuple[Part, ...]
    """The training split first."""
    wrong: tuple[WrongLabel, ...]
    """Those with the least probable label first."""
    train_split: str
    source_digest: str
    """Identifies the rows of the dataset as it is stored."""
    excluded: tuple[Entry, ...]
    """Images that the run left out, which are not checked."""

    @property
    def unreadable(self) -> tuple[tuple[str, Unreadable], ...]:
        """Images that could not be checked, with the name of their part."""
        return tuple((part.name, entry) for part in self.parts for entry in part.unreadable)

    def entries(self) -> list[Entry]:
        """Return what a list of images to leave out has to contain: those of the run's own list, and findings.

        Images that the model was not trained on are not listed: without those that a model gets wrong, an evaluation
        would overestimate its accuracy.
        """
        names = self.label_names
        return [
            *self.excluded,
            *(
                (
                    self.train_split,
                    found.row,
                    found.name,
                    f"labeled {names[found.label]}, probably {names[found.suggested]} ({found.probability:.2f})",
                )
                for found in self.wrong
                if found.part.trained_on
            ),
        ]


def check_labels(path: Path, workers: int | None = None) -> LabelFindings:
    """Find images whose labels are probably wrong, in the training and the evaluation split of a run.

    Args:
        path: The folder of a finished run.
        workers: Number of data-loading workers; one per core if not given, and none for few images.

    Raises:
        RequestError: If the folder holds no finished run, or its dataset is a stream, is missing or has changed.
        RunError: If reading fails.
    """
    run = reopen(path)
    if run.config.data.streaming:
        raise RequestError(
            f"the run in {printable(path)} was trained with {setting('streaming', True)}, but a stream cannot be "
            "checked"
        )
    if run.record.evaluation.is_multi_label:
        raise RequestError(
            f"the run in {printable(path)} was trained on images with several labels, but wrong labels can only be "
            "found if each image has one"
        )
    splits = run.load_splits()
    classifier = load(f"local-dir:{run.folder.model}")
    device = torch.device(device_type())
    set_threads("auto", device.type)
    model = classifier.model.to(device).to(memory_format=torch.channels_last)
    images = used_images(splits)
    total = sum(map(len, images.values()))
    _logger.info("%s: predicting the classes of %d images", printable(run.config.data.dataset), total)
    if workers is None:
        workers = cores() if total > SERIAL else 0
    parts, wrong = [], []
    with tqdm(total=total, unit="image", disable=None) as bar:  # shown on a terminal
        for name, own in images.items():
            samples = evaluation_samples(own, classifier.input, run.config.loader.max_image_pixels)
            assert isinstance(samples, EvaluationSamples)
            batch_size = run.record.evaluation.batch_size
            found, unreadable = _predict(model, samples, batch_size, device, classifier.tta, workers, bar)
            flagged = find_wrong_labels(own.labels, found, len(splits.label_names))
            part = Part(
                name=name,
                images=own,
                trained_on=own is splits.train,
                estimate=flagged.estimate,
                unreadable=tuple(unreadable),
            )
            parts.append(part)
            wrong += _wrong_labels(part, found, flagged)
    return LabelFindings(
        label_names=splits.label_names,
        parts=tuple(parts),
        wrong=tuple(sorted(wrong, key=lambda entry: entry.label_probability)),
        train_split=str(splits.found.train_split),
        source_digest=str(splits.source_digest),
        excluded=read_exclusions(run.config.data.exclude).entries,
    )


@torch.inference_mode()
def _predict(
    model: nn.Module,
    samples: EvaluationSamples,
    batch_size: int,
    device: torch.device,
    tta: TestTimeAugmentation,
    workers: int,
    bar: "tqdm[Any]",
) -> tuple[Probabilities, list[Unreadable]]:
    """Return the probabilities of all samples, in their order, computed as in an evaluation."""
    parts, unreadable = [], []
    batches = samples.batches(batch_size, 0, 1, workers, pin_memory=device.type == "cuda")
    with contextlib.closing(batches):
        for batch in batches:
            rows = log_probabilities(predict_batch(model, batch.images, batch_size, device, tta).mean(dim=0)).exp()
            for entry in batch.unreadable:
                rows[batch.indices == entry.index] = torch.nan
            parts.append(Probabilities.of_batch(rows, batch.labels))
            unreadable += batch.unreadable
            bar.update(len(rows))
    return Probabilities.joined(parts), unreadable


def _wrong_labels(part: Part, found: Probabilities, flagged: Flagged) -> list[WrongLabel]:
    columns = (flagged.images, flagged.suggested, flagged.probabilities)
    return [
        WrongLabel(
            part=part,
            index=index,
            label=int(part.images.labels[index]),
            label_probability=float(found.own[index]),
            suggested=suggested,
            probability=probability,
        )
        for index, suggested, probability in zip(*(column.tolist() for column in columns), strict=True)
    ]
