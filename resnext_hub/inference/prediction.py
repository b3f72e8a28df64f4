"""Classify images with a model's own evaluation transform."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from resnext_hub.data.decode import MAX_IMAGE_PIXELS
from resnext_hub.data.loaders import derive_workers
from resnext_hub.errors import RequestError, RunError, setting
from resnext_hub.inference.inputs import ImageInput, Inputs
from resnext_hub.machine import device_type
from resnext_hub.models.views import logits_and_features, predict_views, views_of
from resnext_hub.processes.launcher import local_processes

if TYPE_CHECKING:
    from resnext_hub.inference.classifier import Classifier


@dataclass(frozen=True)
class Guess:
    """A class and its probability, 0 to 1."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, in descending order of their probability."""

    image: ImageInput
    guesses: tuple[Guess, ...]
    unsure: bool | None = None
    """Whether the most probable class is less probable than the requested precision requires; None if no precision was
    requested."""
    ood_score: float | None = None
    """How unlike the training images the image is; above 0 for 5 % of the held-out images of the run. None if the model
    has no such score."""


@dataclass(frozen=True)
class Unread:
    """An image that cannot be decoded."""

    image: ImageInput
    reason: str


def predict(
    classifier: "Classifier",
    images: Sequence[ImageInput],
    *,
    batch_size: int = 32,
    device: torch.device | None = None,
    top: int | None = None,
    threshold: float | None = None,
    accept_precision: float | None = None,
    decoder: str = "pil",
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Iterator[Prediction | Unread]:
    """Classify images, with one result for each, in order.

    Args:
        classifier: The classifier; its model is moved to the device.
        images: Images to classify.
        batch_size: Batch size of the forward passes, at most the number of images.
        device: Device to compute on; the accelerator by default, if there is one.
        top: Number of classes for each image, at most all; if not given, the most probable one, or if an image can
            have several labels, all that reach their thresholds.
        threshold: Probability that a class has to reach, 0 to 1; with several labels, in place of their thresholds.
        accept_precision: Fraction of the accepted answers that should be right, between 0 and 1; those that are not
            probable enough for it are unsure.
        decoder: `pil`, as for the accuracy on the card, or `simplejpeg`, which is faster with nearly equal pixels.
        max_pixels: An image with more pixels is unreadable.

    Raises:
        RequestError: If an argument is invalid, or the model does not take images of one or three channels.
        RunError: If probabilities are not finite.
        ModuleNotFoundError: If the decoder is simplejpeg and it is not installed.
    """
    if top is not None and not _is_count(top):
        raise RequestError(f"{setting('top', top)}: expected a whole number of at least 1")
    lowest = None if accept_precision is None else lowest_accepted(classifier, accept_precision)
    compute = partial(_answers, classifier)
    rows = compute_rows(
        classifier, images, compute, batch_size=batch_size, device=device, decoder=decoder, max_pixels=max_pixels
    )
    if threshold is not None and not 0 <= threshold <= 1:
        raise RequestError(f"{setting('threshold', threshold)}: expected a number from 0 to 1")
    return _ranked(classifier, images, rows, top, threshold, lowest)


def lowest_accepted(classifier: "Classifier", precision: float) -> float:
    """Return the lowest probability of an accepted answer for a precision, or for the next higher one that was fitted.

    Raises:
        RequestError: If it is not between 0 and 1, or not known for this model.
    """
    shown = setting("accept_precision", precision)
    if isinstance(precision, bool) or not isinstance(precision, Real) or not 0 < precision < 1:
        raise RequestError(f"{shown}: expected a number between 0 and 1")
    if classifier.is_multi_label:
        raise RequestError(f"{shown} needs exactly one class per image, but this model can predict several labels")
    if not classifier.accept:
        raise RequestError(
            f"{shown}: the model has no thresholds for accepting answers; they are fitted at the end of a training run "
            "with at least 50 evaluation images"
        )
    if not classifier.accept_thresholds:
        as_fitted = classifier.source.saved.config.tta
        raise RequestError(f"{shown} needs a temperature of 1 and {setting('tta', as_fitted)}, as in the run")
    fitting = [known for known in classifier.accept if known >= precision]
    if not fitting:
        raise RequestError(
            f"{shown}: expected at most {max(classifier.accept):g}, the highest precision for which a threshold was "
            "fitted on the evaluation images of the run"
        )
    return classifier.accept[min(fitting)]


def _ranked(
    classifier: "Classifier",
    images: Sequence[ImageInput],
    rows: Iterator[torch.Tensor | str],
    top: int | None,
    threshold: float | None,
    lowest: float | None,
) -> Iterator[Prediction | Unread]:
    """Return predictions from rows of probabilities, followed by the OOD score if there is one."""
    names = classifier.label_names
    limits = None if threshold is None else torch.full((len(names),), threshold, dtype=torch.float64)
    if classifier.thresholds is not None:
        most = len(names) if top is None else top
    else:
        most = 1 if top is None else top
    if classifier.thresholds is not None and top is None and threshold is None:
        # the temperature moves a threshold as it moves a probability
        limits = (torch.tensor(classifier.thresholds, dtype=torch.float64).logit() / classifier.temperature).sigmoid()
    for image, row in zip(images, rows, strict=True):
        if isinstance(row, str):
            yield Unread(image, row)
            continue
        score = float(row[-1]) if len(row) > len(names) else None
        row = row[: len(names)]
        unsure = None if lowest is None else float(row.max()) < lowest
        # stable: of equally probable classes the first wins, as with argmax
        values, indices = row.sort(descending=True, stable=True)
        values, indices = values[:most], indices[:most]
        if limits is not None:
            chosen = values >= limits[indices]
            values, indices = values[chosen], indices[chosen]
        best = zip(indices.tolist(), values.tolist(), strict=True)
        guesses = tuple(Guess(index, names[index], value) for index, value in best)
        yield Prediction(image, guesses, unsure=unsure, ood_score=score)


def probabilities(
    classifier: "Classifier",
    images: Sequence[ImageInput],
    *,
    batch_size: int,
    device: torch.device | None = None,
    decoder: str = "pil",
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Iterator[torch.Tensor | str]:
    """Return an iterator over the probabilities `(classes,)` float64 of images, or the reason if one is unreadable.

    All forward passes have the same shape, as in the evaluation of a run, so probabilities do not depend on the number
    of images in the last batch. Arguments and errors are those of `predict`.
    """
    compute = partial(_plain, classifier)
    return compute_rows(
        classifier, images, compute, batch_size=batch_size, device=device, decoder=decoder, max_pixels=max_pixels
    )


def embeddings(
    classifier: "Classifier",
    images: Sequence[ImageInput],
    *,
    batch_size: int = 32,
    device: torch.device | None = None,
    decoder: str = "pil",
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Iterator[torch.Tensor | str]:
    """Return an iterator over the embeddings `(features,)` float32 of images, or the reason if one is unreadable.

    An embedding is the input of the classifier layer. Arguments and errors are those of `predict`.

    Raises:
        RequestError: If the model was optimized, and so has no layers of its own.
    """
    if not hasattr(classifier.model, "forward_head"):
        raise RequestError("an optimized model has no embeddings; use the original classifier")
    return compute_rows(
        classifier, images, _embeddings, batch_size=batch_size, device=device, decoder=decoder, max_pixels=max_pixels
    )


def compute_rows(
    classifier: "Classifier",
    images: Sequence[ImageInput],
    compute: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    *,
    batch_size: int,
    device: torch.device | None,
    decoder: str,
    max_pixels: int,
) -> Iterator[torch.Tensor | str]:
    """Return an iterator over what a function computes for images, or the reason if one is unreadable.

    Arguments and errors are those of `predict`, except:

    Args:
        classifier: The classifier.
        images: The images.
        compute: Maps the model and a batch `(N, C, H, W)` to `(N, …)`.
        batch_size: Batch size.
        device: Device.
        decoder: Decoder.
        max_pixels: Most pixels of an image.
    """
    if not _is_count(batch_size):
        raise RequestError(f"{setting('batch_size', batch_size)}: expected a whole number of at least 1")
    files = Inputs(classifier, images, decoder, max_pixels)
    size, place = min(batch_size, max(len(images), 1)), device or torch.device(device_type())
    return _computed(classifier, files, size, place, compute)


def _computed(
    classifier: "Classifier",
    files: "Inputs",
    batch_size: int,
    device: torch.device,
    compute: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> Iterator[torch.Tensor | str]:
    model = classifier.model.to(device).to(memory_format=torch.channels_last)
    loader = DataLoader(
        files,
        batch_size=batch_size,
        num_workers=derive_workers(device.type, local_processes()),
        collate_fn=list,
    )
    for batch in loader:
        tensors = [entry for entry in batch if isinstance(entry, torch.Tensor)]
        rows = iter(_in_batch(model, tensors, batch_size, device, compute))
        for entry in batch:
            yield entry if isinstance(entry, str) else next(rows)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


@torch.inference_mode()
def _in_batch(
    model: nn.Module,
    images: Sequence[torch.Tensor],
    batch_size: int,
    device: torch.device,
    compute: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the results `(N, …)` of up to a batch of images `(C, H, W)`; the batch is padded."""
    if not images:
        return torch.empty(0)
    stacked = F.pad(torch.stack(list(images)), (0,) * 7 + (batch_size - len(images),))
    return compute(model, stacked.to(device).contiguous(memory_format=torch.channels_last))[: len(images)].cpu()


def _answers(classifier: "Classifier", model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return probabilities, followed by the OOD score if there is one: `(N, classes)` or `(N, classes + 1)` float64."""
    if classifier.ood is None or not hasattr(model, "forward_head"):
        return _plain(classifier, model, images)
    found = [logits_and_features(model, view) for view in views_of(images, classifier.tta)]
    probabilities = _probabilities(classifier, torch.stack([logits for logits, _ in found]))
    logits, features = found[0]
    score = classifier.ood(logits.cpu(), features.cpu()).double()
    return torch.cat([probabilities, score[:, None]], dim=1)


def _plain(classifier: "Classifier", model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return _probabilities(classifier, predict_views(model, images, classifier.tta))


def _probabilities(classifier: "Classifier", views: torch.Tensor) -> torch.Tensor:
    """Return probabilities `(N, classes)` float64 from the logits of each view, `(views, N, classes)`."""
    logits = views.mean(dim=0) / classifier.temperature
    several = classifier.is_multi_label
    found: torch.Tensor = (
        logits.cpu().double().sigmoid() if several else F.log_softmax(logits, dim=1).cpu().double().exp()
    )
    if not found.isfinite().all():
        raise RunError(
            "the probabilities are not finite: check the model's weights, and the mean and std in its config.json"
        )
    return found


def _embeddings(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the inputs of the classifier layer, `(N, features)` float32."""
    found: torch.Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return found.float().flatten(1)
