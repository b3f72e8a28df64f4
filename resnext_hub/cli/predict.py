"""`resnext-hub predict`: classify images."""

import argparse
import dataclasses
import logging

from resnext_hub.cli.output import json_line, write
from resnext_hub.cli.parser import add_threads, count, existing_path
from resnext_hub.errors import RunError
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from resnext_hub.data.loaders import PIXELS, LoaderConfig
    from resnext_hub.training.config import BATCH

    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="run folder, model folder, hf-hub:owner/name, or timm model name"
    )
    parser.add_argument("path", type=existing_path, nargs="+", metavar="PATH", help="image, or folder of images")
    parser.add_argument(
        "--top",
        type=count(BATCH),
        metavar="N",
        help="number of most likely classes per image (default: 1, or if an image can have several labels, all that "
        "reach their thresholds)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per image, one per line; for an unreadable image, the object contains an error",
    )
    parser.add_argument(
        "--batch-size", type=count(BATCH), default=32, metavar="N", help="images per forward pass (default: 32)"
    )
    parser.add_argument(
        "--decoder",
        choices=("pil", "simplejpeg"),
        default="pil",
        help="JPEG decoder: pil, as in evaluation, or simplejpeg, faster with nearly equal pixels (default: pil)",
    )
    most = LoaderConfig.max_image_pixels
    parser.add_argument(
        "--max-image-pixels",
        type=count(PIXELS),
        default=most,
        metavar="N",
        help=f"treat images with more pixels than this (according to their header) as unreadable (default: {most:,})",
    )
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Print the classes of each image, and why unreadable ones have none.

    Raises:
        RunError: If no image can be decoded.
    """
    import torch

    from resnext_hub.inference.classifier import load
    from resnext_hub.inference.prediction import Unread, find_images, predict
    from resnext_hub.machine import device_type
    from resnext_hub.processes.accelerator import set_threads

    paths = find_images(options.path)
    classifier = load(options.model)
    device = torch.device(device_type())
    set_threads(options.threads, device.type)
    unread = 0
    results = predict(
        classifier,
        paths,
        batch_size=options.batch_size,
        device=device,
        top=options.top,
        decoder=options.decoder,
        max_pixels=options.max_image_pixels,
    )
    for result in results:
        path = str(result.image)
        if isinstance(result, Unread):
            unread += 1
            _logger.warning("%s: cannot be decoded: %s", printable(path), printable(result.reason))
            if options.json:
                write(json_line({"path": path, "error": result.reason}))
        elif options.json:
            guesses = [dataclasses.asdict(guess) for guess in result.guesses]
            write(json_line({"path": path, "predictions": guesses}))
        else:
            # escaped, a tab or newline in a name cannot break the columns
            columns = (f"\t{printable(guess.label)}\t{guess.probability:.4f}" for guess in result.guesses)
            write(f"{printable(path)}{''.join(columns)}\n")
    if unread == len(paths):
        raise RunError(f"0 of {unread} images could be decoded")
    if unread:
        _logger.warning("%d of %d images could not be decoded", unread, len(paths))
