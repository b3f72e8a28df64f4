"""`resnext-hub similar`: find the most similar images."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_hub.cli.output import json_line, write
from resnext_hub.cli.parser import add_threads, count, existing_path
from resnext_hub.errors import RequestError
from resnext_hub.text import printable

if TYPE_CHECKING:
    from resnext_hub.inference.classifier import Classifier
    from resnext_hub.inference.similar import Embeddings

_logger = logging.getLogger(__name__)

MOST = 1_000_000
"""Greatest allowed number of images to list."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from resnext_hub.training.config import BATCH

    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="run folder, model folder, hf-hub:owner/name, or timm model name"
    )
    parser.add_argument("image", type=existing_path, metavar="IMAGE", help="image to compare with")
    parser.add_argument(
        "--in",
        dest="place",
        type=existing_path,
        required=True,
        metavar="FOLDER|FILE.parquet",
        help="where to search (required): a folder of images, or the embeddings that `predict --embed` wrote with the "
        "same model",
    )
    parser.add_argument(
        "--top", type=count(MOST), default=10, metavar="N", help="number of images to list (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per image, each on its own line")
    parser.add_argument(
        "--batch-size", type=count(BATCH), default=32, metavar="N", help="images per forward pass (default: 32)"
    )
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Print the most similar images, each with the cosine of its embedding and that of the image."""
    import torch

    from resnext_hub.inference.classifier import load
    from resnext_hub.inference.prediction import embeddings
    from resnext_hub.inference.similar import read_embeddings, without_itself
    from resnext_hub.machine import device_type
    from resnext_hub.processes.accelerator import set_threads

    classifier = load(options.model)
    device = torch.device(device_type())
    set_threads(options.threads, device.type)
    how: dict[str, Any] = {"batch_size": options.batch_size, "device": device}
    (own,) = embeddings(classifier, [options.image], **how)
    if isinstance(own, str):
        raise RequestError(f"{printable(options.image)} cannot be decoded: {own}")
    is_folder = options.place.is_dir()
    found = _embed(classifier, options.place, how) if is_folder else read_embeddings(options.place, classifier)
    for match in without_itself(found.nearest(own.numpy(), options.top + 1), options.image, options.top):
        if options.json:
            write(json_line({"path": str(match.image), "similarity": match.similarity}))
        else:
            write(f"{printable(match.image)}\t{match.similarity:.4f}\n")


def _embed(classifier: "Classifier", folder: Path, how: dict[str, Any]) -> "Embeddings":
    """Return the embeddings of all images of a folder; unreadable ones are left out, with a warning."""
    import numpy as np
    from tqdm import tqdm

    from resnext_hub.inference.inputs import find_images
    from resnext_hub.inference.prediction import embeddings
    from resnext_hub.inference.similar import Embeddings

    paths = find_images([folder])
    rows, kept = [], []
    found = embeddings(classifier, paths, **how)
    for path, row in zip(paths, tqdm(found, total=len(paths), unit="image", disable=None), strict=True):
        if isinstance(row, str):
            _logger.warning("%s: cannot be decoded: %s", printable(path), printable(row))
        else:
            rows.append(row.numpy())
            kept.append(path)
    if not rows:
        raise RequestError(f"{printable(folder)} has no image that can be decoded")
    return Embeddings(kept, np.stack(rows))
