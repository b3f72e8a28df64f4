"""`resnext-hub predict`: classify images."""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from resnext_hub.cli.parser import add_threads, count, existing_path, fraction, new_path, value_of
from resnext_hub.errors import RequestError, RunError, setting
from resnext_hub.settings import Range
from resnext_hub.text import printable

if TYPE_CHECKING:
    from resnext_hub.cli.predictions import Writer
    from resnext_hub.data.remote import RemoteImage
    from resnext_hub.inference.classifier import Classifier

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from resnext_hub.data.loaders import PIXELS, LoaderConfig
    from resnext_hub.models.views import TEST_TIME_AUGMENTATIONS
    from resnext_hub.training.config import BATCH

    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="run folder, model folder, hf-hub:owner/name, or timm model name"
    )
    parser.add_argument(
        "path",
        type=_path_or_address,
        nargs="+",
        metavar="PATH",
        help="image, folder of images, pattern such as 'photos/*.jpg', or HTTP(S) URL of an image; - reads paths and "
        "URLs from standard input, one per line",
    )
    parser.add_argument(
        "--top",
        type=count(BATCH),
        metavar="N",
        help="number of most probable classes to list per image (default: 1; if an image can have several labels, all "
        "labels that reach their thresholds)",
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        metavar="P",
        help="list only classes with at least this probability, 0 to 1; if an image can have several labels, this "
        "replaces their thresholds",
    )
    parser.add_argument(
        "--accept-precision",
        type=fraction,
        metavar="P",
        help="mark low-probability answers as unsure, so that at least this fraction (such as 0.95) of the remaining "
        "answers can be expected to be correct; the minimum probability was fitted on the evaluation images of the run",
    )
    parser.add_argument(
        "--tta",
        choices=TEST_TIME_AUGMENTATIONS,
        help="test-time augmentation: flip averages the logits of an image and its mirror image; none uses the image "
        "alone (default: as in the evaluation of the run)",
    )
    _add_output_flags(parser)
    parser.add_argument(
        "--batch-size", type=count(BATCH), default=32, metavar="N", help="images per forward pass (default: 32)"
    )
    parser.add_argument(
        "--decoder",
        choices=("pil", "simplejpeg"),
        default="pil",
        help="JPEG decoder: pil, as in evaluation, or simplejpeg, which is faster and decodes to nearly the same "
        "pixels (default: pil)",
    )
    most = LoaderConfig.max_image_pixels
    parser.add_argument(
        "--max-image-pixels",
        type=count(PIXELS),
        default=most,
        metavar="N",
        help=f"treat images with more pixels than this (according to their header) as unreadable (default: {most:,})",
    )
    parser.add_argument(
        "--timeout",
        type=value_of("timeout", Annotated[float, Range(0, 3600, above=True)]),
        metavar="S",
        help="maximum time to download an image, in seconds (default: 30)",
    )
    add_threads(parser)


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per image, each on its own line; for an unreadable image, the object contains an "
        "error",
    )
    formats.add_argument("--csv", action="store_true", help="print a CSV table with one row per image and class")
    formats.add_argument(
        "--parquet",
        type=new_path,
        metavar="FILE",
        help="instead of printing, write a parquet file with one row per image",
    )
    formats.add_argument(
        "--embed",
        type=new_path,
        metavar="FILE",
        help="instead of classifying the images, write their embeddings (the input of the classifier layer) to a "
        "parquet file",
    )
    parser.add_argument(
        "--explain",
        type=new_path,
        metavar="FOLDER",
        help="also write each image to this folder as a PNG file, with a heat map of the regions that contribute most "
        "to its most probable class (Grad-CAM); the folder is created if necessary. Requires the `report` extra",
    )


def run(options: argparse.Namespace) -> None:
    """Write the classes of each image, and why unreadable ones have none; then overlays if requested.

    Raises:
        RunError: If images cannot be decoded; the results for the others are written.
    """
    import torch
    from tqdm import tqdm

    from resnext_hub.data.remote import RemoteImage
    from resnext_hub.inference.classifier import load
    from resnext_hub.inference.inputs import find_images
    from resnext_hub.machine import device_type
    from resnext_hub.processes.accelerator import set_threads

    for path in filter(None, (options.parquet, options.embed, options.explain)):
        if not path.absolute().parent.is_dir():
            raise RequestError(f"{printable(path)}: the parent folder does not exist; create it first")
    if options.explain and os.path.lexists(options.explain) and not options.explain.is_dir():
        raise RequestError(f"{printable(options.explain)} is not a folder; choose another {setting('explain')}")
    paths: list[Path | RemoteImage] = []
    for path in _with_standard_input(options.path):
        if isinstance(path, RemoteImage):
            paths.append(path if options.timeout is None else dataclasses.replace(path, seconds=options.timeout))
        else:
            paths += find_images([path])
    classifier = load(options.model)
    if options.tta is not None:
        classifier = dataclasses.replace(classifier, tta=options.tta)
    device = torch.device(device_type())
    set_threads(options.threads, device.type)
    reading: dict[str, Any] = dict(
        batch_size=options.batch_size, device=device, decoder=options.decoder, max_pixels=options.max_image_pixels
    )
    overlays = _overlays(classifier, paths, options.explain, reading) if options.explain else ()
    unread = 0
    # on a terminal, the results themselves show the progress
    with tqdm(total=len(paths), unit="image", disable=True if sys.stdout.isatty() else None) as bar:
        for path, failure in (_embed if options.embed else _classify)(classifier, paths, options, reading):
            if failure is not None:
                unread += 1
                what = "" if isinstance(path, RemoteImage) else "cannot be decoded: "
                _logger.warning("%s: %s%s", printable(path), what, printable(failure))
            bar.update()
    for _ in tqdm(overlays, total=len(paths), unit="overlay", disable=None if options.explain else True):
        pass
    if unread == len(paths):
        raise RunError(f"0 of {unread} images could be decoded")
    if unread:
        raise RunError(f"{unread} of {len(paths)} images could not be decoded")


def _path_or_address(text: str) -> "Path | RemoteImage":
    """Return an argument as the address of an image, or else as a path."""
    from resnext_hub.data.remote import RemoteImage, is_remote

    return RemoteImage(text) if is_remote(text) else existing_path(text)


def _with_standard_input(paths: "Iterable[Path | RemoteImage]") -> "Iterator[Path | RemoteImage]":
    """Yield paths, with - replaced by those that are read from standard input.

    Raises:
        RequestError: If standard input is requested but empty.
    """
    from resnext_hub.data.remote import RemoteImage, is_remote

    for path in paths:
        if str(path) != "-":
            yield path
            continue
        lines = [line.rstrip(b"\r") for line in sys.stdin.buffer.read().split(b"\n")]
        names = [os.fsdecode(line) for line in lines if line]
        found = [RemoteImage(name) if is_remote(name) else Path(name) for name in names]
        if not found:
            raise RequestError("standard input contains no paths; expected one per line")
        yield from found


def _classify(
    classifier: "Classifier", paths: "list[Path | RemoteImage]", options: argparse.Namespace, reading: dict[str, Any]
) -> "Iterator[tuple[Path | RemoteImage, str | None]]":
    """Write the classes of images; yield each path, and why it cannot be decoded."""
    from resnext_hub.inference.prediction import Unread, predict

    writer = _writer(options)
    results = predict(
        classifier,
        paths,
        top=options.top,
        threshold=options.threshold,
        accept_precision=options.accept_precision,
        **reading,
    )
    for path, result in zip(paths, results, strict=True):
        writer.add(str(path), result)
        yield path, result.reason if isinstance(result, Unread) else None
    writer.close()


def _overlays(
    classifier: "Classifier", paths: "list[Path | RemoteImage]", folder: Path, reading: dict[str, Any]
) -> Iterator[Path]:
    """Return an iterator that writes the overlay of each readable image and yields its path.

    Raises:
        RequestError: If the model cannot be explained.
    """
    from resnext_hub.inference.explain import explain
    from resnext_hub.plots.overlay import draw_overlay, overlay_names

    explanations = explain(classifier, paths, **reading)

    def write_all() -> Iterator[Path]:
        folder.mkdir(exist_ok=True)
        for name, found in zip(overlay_names([Path(str(path)) for path in paths]), explanations, strict=True):
            if not isinstance(found, str):
                draw_overlay(found.pixels, found.heat).save(folder / name)
            yield folder / name

    return write_all()


def _writer(options: argparse.Namespace) -> "Writer":
    from resnext_hub.cli.predictions import CsvLines, JsonLines, ParquetFile, Table, TextLines

    if options.json:
        return JsonLines()
    if options.csv:
        return CsvLines()
    if options.parquet:
        return ParquetFile(options.parquet)
    return Table() if sys.stdout.isatty() else TextLines()


def _embed(
    classifier: "Classifier", paths: "list[Path | RemoteImage]", options: argparse.Namespace, reading: dict[str, Any]
) -> "Iterator[tuple[Path | RemoteImage, str | None]]":
    """Write the embeddings of images; yield each path, and why it cannot be decoded."""
    import pyarrow

    from resnext_hub.cli.predictions import write_table
    from resnext_hub.inference.prediction import embeddings
    from resnext_hub.inference.similar import IDENTITY, identity_of

    rows: list[Any] = []
    reasons: list[str | None] = []
    for path, row in zip(paths, embeddings(classifier, paths, **reading), strict=True):
        reason = row if isinstance(row, str) else None
        rows.append(None if isinstance(row, str) else row.numpy())
        reasons.append(None if reason is None else printable(reason))
        yield path, reason
    write_table(
        options.embed,
        {IDENTITY: json.dumps(identity_of(classifier))},
        path=pyarrow.array([printable(path) for path in paths], pyarrow.string()),
        embedding=pyarrow.array(rows, pyarrow.list_(pyarrow.float32())),
        error=pyarrow.array(reasons, pyarrow.string()),
    )
