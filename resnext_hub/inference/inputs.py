"""Images to classify: find them, check them, and turn them into the input of a model."""

import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from resnext_hub.data.decode import MAX_IMAGE_PIXELS, UnreadableImageError, upright
from resnext_hub.data.jpeg import FastTransform
from resnext_hub.data.loaders import read_transformed
from resnext_hub.data.remote import RemoteImage
from resnext_hub.data.sources import IMAGE_SUFFIXES, list_images
from resnext_hub.data.sources.walk import is_run_folder
from resnext_hub.data.transforms import EvalTransform
from resnext_hub.errors import RequestError, one_line
from resnext_hub.models.input_config import IMAGE_MODES
from resnext_hub.text import printable

if TYPE_CHECKING:
    from resnext_hub.inference.classifier import Classifier

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray | RemoteImage"
"""A path, an encoded image, a PIL image, a uint8 array `(H, W)` or `(H, W, C)`, or an image on the web."""


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


def prepare(classifier: "Classifier", images: Sequence[ImageInput]) -> torch.Tensor:
    """Return images as input of the model, `(N, C, H, W)` float32 on the CPU.

    Raises:
        RequestError: If there are none, or one is unreadable.
    """
    if not images:
        raise RequestError("expected at least one image")
    found = []
    for index, entry in enumerate(map(Inputs(classifier, images).__getitem__, range(len(images)))):
        if isinstance(entry, str):
            raise RequestError(f"image {index} is unreadable: {entry}")
        found.append(entry)
    return torch.stack(found)


class Inputs(Dataset[torch.Tensor | str]):
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
