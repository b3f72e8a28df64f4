"""Classify images with a model's own evaluation transform."""

import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadableImageError, upright
from resnext_hub.data.jpeg import FastTransform
from resnext_hub.data.loaders import derive_workers, read_transformed
from resnext_hub.data.remote import RemoteImage
from resnext_hub.data.sources import IMAGE_SUFFIXES, list_images
from resnext_hub.data.sources.walk import is_run_folder
from resnext_hub.data.transforms import EvalTransform
from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.machine import device_type
from resnext_hub.models.input_config import IMAGE_MODES
from resnext_hub.models.views import predict_views
from resnext_hub.processes.launcher import local_processes
from resnext_hub.text import printable

if TYPE_CHECKING:
    from resnext_hub.inference.classifier import Classifier

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray | RemoteImage"
"""A path, an encoded image, a PIL image, a uint8 array `(H, W)` or `(H, W, C)`, or an image on the web."""


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


@dataclass(frozen=True)
class Unread:
    """An image that cannot be decoded."""

    image: ImageInput
    reason: str


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the images at paths, in order: files as they are, all images below a folder, and those of a pattern.

    Raises:
        RequestError: If a path does not exist, is not a file or folder, or is a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError as error:
            if glob.has_magic(str(path)):
                found += _matching(path)
                continue
            raise RequestError(f"{printable(path)}: no such file or folder") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise RequestError(f"{printable(path)} cannot be read: {reason}; expected an image or a folder") from error
        if stat.S_ISDIR(mode):
            inside = list_images(path)
            if is_run_folder(os.listdir(path)):
                raise RequestError(
                    f"{printable(path)} is a run folder whose images are plots; expected a folder of images"
                )
            if not inside:
                raise RequestError(f"{printable(path)} contains no images; known suffixes: {' '.join(IMAGE_SUFFIXES)}")
            found += inside
        elif stat.S_ISREG(mode):
            found.append(path)
        else:
            raise RequestError(f"{printable(path)} is not a regular file: expected an image or a folder of images")
    return found


def _matching(pattern: Path) -> list[Path]:
    """Return the images that match a pattern such as `photos/**/*.jpg`, in the order of their paths."""
    found = [Path(path) for path in sorted(glob.glob(str(pattern), recursive=True)) if os.path.isfile(path)]
    if not found:
        raise RequestError(f"{printable(pattern)}: no file matches this pattern")
    return found


def predict(
    classifier: "Classifier",
    images: Sequence[ImageInput],
    *,
    batch_size: int = 32,
    device: torch.device | None = None,
    top: int | None = None,
    threshold: float | None = None,
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
        decoder: `pil`, as for the accuracy on the card, or `simplejpeg`, which is faster with nearly equal pixels.
        max_pixels: An image with more pixels is unreadable.

    Raises:
        RequestError: If an argument is invalid, or the model does not take images of one or three channels.
        RunError: If probabilities are not finite.
        ModuleNotFoundError: If the decoder is simplejpeg and it is not installed.
    """
    if top is not None and not _is_count(top):
        raise RequestError(f"{setting('top', top)}: expected a whole number of at least 1")
    rows = probabilities(
        classifier, images, batch_size=batch_size, device=device, decoder=decoder, max_pixels=max_pixels
    )
    if threshold is not None and not 0 <= threshold <= 1:
        raise RequestError(f"{setting('threshold', threshold)}: expected a number from 0 to 1")
    return _ranked(classifier, images, rows, top, threshold)


def _ranked(
    classifier: "Classifier",
    images: Sequence[ImageInput],
    rows: Iterator[torch.Tensor | str],
    top: int | None,
    threshold: float | None,
) -> Iterator[Prediction | Unread]:
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
        # stable: of equally probable classes the first wins, as with argmax
        values, indices = row.sort(descending=True, stable=True)
        values, indices = values[:most], indices[:most]
        if limits is not None:
            chosen = values >= limits[indices]
            values, indices = values[chosen], indices[chosen]
        best = zip(indices.tolist(), values.tolist(), strict=True)
        yield Prediction(image, tuple(Guess(index, names[index], value) for index, value in best))


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
    compute = partial(_probabilities, classifier)
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


def prepare(classifier: "Classifier", images: Sequence[ImageInput]) -> torch.Tensor:
    """Return images as input of the model, `(N, C, H, W)` float32 on the CPU.

    Raises:
        RequestError: If there are none, or one is unreadable.
    """
    if not images:
        raise RequestError("expected at least one image")
    found = []
    for index, entry in enumerate(map(_Inputs(classifier, images).__getitem__, range(len(images)))):
        if isinstance(entry, str):
            raise RequestError(f"image {index} is unreadable: {entry}")
        found.append(entry)
    return torch.stack(found)


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
    files = _Inputs(classifier, images, decoder, max_pixels)
    size, place = min(batch_size, max(len(images), 1)), device or torch.device(device_type())
    return _computed(classifier, files, size, place, compute)


def _computed(
    classifier: "Classifier",
    files: "_Inputs",
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


class _Inputs(Dataset[torch.Tensor | str]):
    """Transformed images `(C, H, W)` float32, or the reason if one is unreadable."""

    def __init__(
        self,
        classifier: "Classifier",
        images: Sequence[ImageInput],
        decoder: str = "pil",
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        input = classifier.input
        if input.channels not in IMAGE_MODES:
            raise RequestError(
                f"the model expects images with {input.channels} channels, but only 1 or 3 are supported"
            )
        for index, image in enumerate(images):
            _check_input(index, image)
        self.images = images
        self.transform = EvalTransform(input)
        self.fast = FastTransform(input, max_pixels) if decoder == "simplejpeg" else None
        self.mode, self.max_pixels = input.mode, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        image = self.images[index]
        try:
            if isinstance(image, np.ndarray):
                return self.transform(upright(_from_array(image), self.mode))
            if isinstance(image, RemoteImage):
                image = image.read()
            if isinstance(image, Image.Image):
                return self.transform(_decoded(image, self.mode))
            row = {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": str(image)}
            if self.fast is not None:
                return self.fast(row)
            return read_transformed(row, self.transform, self.mode, self.max_pixels)
        except UnreadableImageError as error:
            return str(error)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _check_input(index: int, image: object) -> None:
    """Raise RequestError for an object that is not an image, before any worker gets it."""
    if not isinstance(image, (str, os.PathLike, bytes, Image.Image, np.ndarray, RemoteImage)):
        raise RequestError(
            f"image {index} is a {type(image).__name__}: expected a path, encoded bytes, a PIL image or a uint8 array"
        )
    if isinstance(image, np.ndarray):
        shape = image.shape
        of_an_image = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
        if image.dtype != np.uint8 or not of_an_image or image.size == 0:
            raise RequestError(
                f"image {index} is an array of shape {shape} and dtype {image.dtype}: expected (H, W) or (H, W, C), "
                "uint8, with 1, 3 or 4 channels"
            )


def _decoded(image: Image.Image, mode: str) -> Image.Image:
    try:
        return upright(image, mode)
    except (OSError, SyntaxError, ValueError) as error:  # an image opened lazily is decoded only here
        raise UnreadableImageError(one_line(error)) from error


def _from_array(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


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


def _probabilities(classifier: "Classifier", model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return probabilities `(N, classes)` float64."""
    logits = predict_views(model, images, classifier.tta).mean(dim=0) / classifier.temperature
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
