"""From pictures to labels, with the evaluation transform that the model itself states."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadablePictureError
from resnext_hub.data.jpeg import FastTransform
from resnext_hub.data.loaders import PICTURE_MODES, derive_workers, read_transformed
from resnext_hub.data.sources import PICTURE_SUFFIXES, list_pictures
from resnext_hub.data.sources.walk import is_run_folder
from resnext_hub.data.transforms import build_eval_transform
from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.inference.trained import TrainedModel
from resnext_hub.machine import local_processes
from resnext_hub.text import printable


@dataclass(frozen=True)
class Guess:
    """A class, and the probability that the network gives it, 0 to 1."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a picture shows: the most probable class first."""

    path: Path
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Unread:
    """A picture that could not be read."""

    path: Path
    reason: str


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Give the pictures that paths stand for, in their order: files as they are, of folders all pictures in them.

    Raises:
        RequestError: If there is nothing at a path, or a folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError as error:
            raise RequestError(f"{printable(path)}: there is no such file or folder") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise RequestError(f"{printable(path)} cannot be read: {reason}; expected an image or a folder") from error
        if stat.S_ISDIR(mode):
            inside = list_pictures(path)
            if is_run_folder(os.listdir(path)):
                raise RequestError(
                    f"{printable(path)} is a run folder, whose images are its plots: expected a folder of images"
                )
            if not inside:
                raise RequestError(f"{printable(path)} holds no images; known suffixes: {' '.join(PICTURE_SUFFIXES)}")
            found += inside
        elif stat.S_ISREG(mode):
            found.append(path)
        else:
            raise RequestError(f"{printable(path)} is no regular file: expected an image, or a folder with images")
    return found


def predict(
    model: TrainedModel,
    paths: Sequence[Path],
    *,
    batch_size: int,
    device: torch.device,
    top: int = 1,
    decoder: str = "pil",
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Iterator[Prediction | Unread]:
    """Classify pictures, one result for each, in their order.

    Every forward pass has one shape, as in the evaluation of a run, so that a picture's probabilities do not depend on
    how many others come with it in the last batch.

    Args:
        model: The network, which is moved to the device.
        paths: Picture files.
        batch_size: Shape of the forward passes; fewer pictures than that make it smaller.
        device: Where to compute.
        top: Number of classes to give for each picture, at most all.
        decoder: pil, as in the figures of a card, or simplejpeg, which is faster and gives nearly the same pixels.
        max_pixels: Pixels above which an image is unreadable.

    Raises:
        RequestError: If the model takes images of other than one or three channels.
        RunError: If its probabilities are not finite.
        ModuleNotFoundError: If simplejpeg is asked for and not installed.
    """
    channels = model.data_config["input_size"][0]
    if channels not in PICTURE_MODES:
        raise RequestError(f"the model takes images of {channels} channels: expected 1 or 3")
    if decoder == "simplejpeg":
        files = _PictureFiles(paths, FastTransform(model.data_config, max_pixels))
    else:
        transform = partial(
            read_transformed,
            transform=build_eval_transform(model.data_config),
            mode=PICTURE_MODES[channels],
            max_pixels=max_pixels,
        )
        files = _PictureFiles(paths, transform)
    return _predict(model, files, min(batch_size, len(paths)), device, top)


def _predict(
    model: TrainedModel, files: "_PictureFiles", batch_size: int, device: torch.device, top: int
) -> Iterator[Prediction | Unread]:
    network = model.network.to(device).to(memory_format=torch.channels_last)
    loader = DataLoader(
        files,
        batch_size=batch_size,
        num_workers=derive_workers(device.type, local_processes()),
        collate_fn=list,
    )
    paths = iter(files.paths)
    for batch in loader:
        images = [image for image in batch if isinstance(image, torch.Tensor)]
        rows = iter(_probabilities(network, images, batch_size, device))
        for entry in batch:
            path = next(paths)
            if isinstance(entry, str):
                yield Unread(path, entry)
                continue
            # of equally probable classes the first comes first, as in argmax
            values, indices = next(rows).sort(descending=True, stable=True)
            best = zip(indices[:top].tolist(), values[:top].tolist(), strict=True)
            yield Prediction(path, tuple(Guess(index, model.label_names[index], value) for index, value in best))


class _PictureFiles(Dataset[torch.Tensor | str]):
    """Transformed pictures `(C, H, W)` float32; in place of one that cannot be read, the reason."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[dict[str, Any]], torch.Tensor]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return self.transform({"bytes": None, "path": str(self.paths[index])})
        except UnreadablePictureError as error:
            return str(error)


@torch.inference_mode()
def _probabilities(
    network: nn.Module, images: Sequence[torch.Tensor], batch_size: int, device: torch.device
) -> torch.Tensor:
    """Give the probabilities `(N, classes)` of N pictures `(C, H, W)`, at most a batch, which is filled up."""
    if not images:
        return torch.empty(0)
    stacked = F.pad(torch.stack(list(images)), (0,) * 7 + (batch_size - len(images),))
    logits = network(stacked.to(device).contiguous(memory_format=torch.channels_last))[: len(images)].float()
    probabilities = F.log_softmax(logits, dim=1).cpu().double().exp()
    if not probabilities.isfinite().all():
        raise RunError("the probabilities are not finite: the model's weights, or its mean and std, cannot be used")
    return probabilities
