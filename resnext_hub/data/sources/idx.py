"""Folders of IDX files, the format of MNIST, Fashion-MNIST and KMNIST; see http://yann.lecun.com/exdb/mnist/."""

import gzip
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa

from resnext_hub.data.sources.source import OpenDataset
from resnext_hub.errors import RequestError
from resnext_hub.files import require_regular
from resnext_hub.text import printable

if TYPE_CHECKING:
    import datasets

    from resnext_hub.data.sources.request import Request

_NAME = re.compile(r"(?P<split>.+)-(?P<kind>images|labels)[-.]idx[13]-ubyte(?P<packed>\.gz)?", re.IGNORECASE)

_SPLITS = {"t10k": "test"}
"""Names of splits that say nothing about their use; MNIST's `t10k` has ten thousand images for testing."""

_UNSIGNED_BYTES = 8
"""Code of the element type in the header; every MNIST-like dataset has this one."""

_MOST_BYTES = (1 << 31) - 1
"""Most bytes of a split's images, which one Arrow array can hold: over two million images of 28x28 pixels."""

_REMEDY = "download it again"


@dataclass
class _Pair:
    """The files of a split."""

    images: Path | None = None
    labels: Path | None = None


def is_idx(name: str) -> bool:
    """Return whether a file has the name of an IDX file with images or labels."""
    return _NAME.fullmatch(name) is not None


class IdxFiles:
    """A folder with files such as `train-images-idx3-ubyte.gz` and `train-labels-idx1-ubyte.gz`."""

    def matches(self, request: "Request") -> bool:
        """Return whether the folder contains images in an IDX file."""
        return any(pair.images for pair in _pairs(request.root).values())

    def open(self, request: "Request") -> OpenDataset:
        """Open the splits, with the numbers of the labels as class names.

        Raises:
            RequestError: If a file is missing or damaged, or images and labels differ in number.
        """
        request.require_no_streaming()
        root = request.root
        pixels, labels, files = {}, {}, list[tuple[str, int]]()
        for split, pair in sorted(_pairs(root).items()):
            if pair.images is None or pair.labels is None:
                missing = "images" if pair.images is None else "labels"
                raise RequestError(
                    f"{printable(root)} has no IDX file with the {missing} of the {printable(split)} split"
                )
            pixels[split], labels[split] = _read(pair.images, 3), _read(pair.labels, 1)
            if len(pixels[split]) != len(labels[split]):
                raise RequestError(
                    f"{printable(pair.images)} has {len(pixels[split])} images, but {printable(pair.labels.name)} has "
                    f"{len(labels[split])} labels"
                )
            files += [(path.name, path.stat().st_size) for path in (pair.images, pair.labels)]
        classes = 1 + max((int(values.max()) for values in labels.values() if values.size), default=0)
        return OpenDataset(
            tables={split: _table(pixels[split], labels[split], classes) for split in pixels},
            files=tuple(files),
            notes=(f"{printable(root.name)} has IDX files, in the format of MNIST",),
        )


def _pairs(root: Path) -> dict[str, _Pair]:
    """Return the files of each split; an unpacked file is preferred to the packed one of the same name.

    Raises:
        RequestError: If different files belong to one split.
    """
    found: dict[str, _Pair] = {}
    for name in sorted(os.listdir(root), reverse=True):  # packed before unpacked
        if match := _NAME.fullmatch(name):
            split, kind = match["split"].lower(), match["kind"].lower()
            pair = found.setdefault(_SPLITS.get(split, split), _Pair())
            other = getattr(pair, kind)
            if other is not None and other.name != f"{name}.gz":
                raise RequestError(
                    f"{printable(root)} has two files for the same split, {printable(other.name)} and "
                    f"{printable(name)}; remove one"
                )
            setattr(pair, kind, root / name)
    return found


def _read(path: Path, dimensions: int) -> np.ndarray:
    """Return the array in a file.

    Raises:
        RequestError: If the file is damaged, or is not an array of bytes with that many dimensions.
    """
    try:
        require_regular(path)
        with cast("IO[bytes]", gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")) as file:
            header = file.read(4 + 4 * dimensions)
            shape = tuple(int(length) for length in np.frombuffer(header[4:], ">u4"))
            if header[:4] != bytes([0, 0, _UNSIGNED_BYTES, dimensions]) or len(shape) != dimensions:
                raise RequestError(f"{printable(path)} is not an IDX file with {dimensions} dimensions; {_REMEDY}")
            count = int(np.prod(shape, dtype=object))
            if count + shape[0] * len(_header(shape)) > _MOST_BYTES:
                raise RequestError(f"{printable(path)} declares {' x '.join(map(str, shape))} bytes, which is too many")
            data = file.read(count)
            more = file.read(1)
    except (OSError, EOFError, zlib.error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise RequestError(f"{printable(path)} cannot be read: {reason[:1].lower()}{reason[1:]}") from error
    if len(data) < count or more:
        found = "more" if more else f"only {len(data)}"
        raise RequestError(
            f"{printable(path)} is damaged: its header declares {count} bytes, but it contains {found}; {_REMEDY}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _table(pixels: np.ndarray, labels: np.ndarray, classes: int) -> "datasets.Dataset":
    """Return a split as grayscale Netpbm images, which are the pixels with a header."""
    import datasets

    count = len(pixels)
    header = np.frombuffer(_header(pixels.shape), np.uint8)
    encoded = np.concatenate([np.broadcast_to(header, (count, len(header))), pixels.reshape(count, -1)], axis=1)
    ends = np.arange(count + 1, dtype=np.int64) * encoded.shape[1]
    values = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), count, [None, pa.py_buffer(ends), pa.py_buffer(encoded)]
    )
    images = pa.StructArray.from_arrays([values, pa.nulls(count, pa.string())], ["bytes", "path"])
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=[str(number) for number in range(classes)]),
        }
    )
    table = pa.table({"image": images, "label": labels.astype(np.int64)})
    return datasets.Dataset(table.cast(features.arrow_schema), info=datasets.DatasetInfo(features=features))


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the Netpbm header of each image in an array of (images, height, width)."""
    return "P5 {1} {0} 255\n".format(*shape[1:]).encode() if len(shape) == 3 else b""
