"""Export a classifier to a self-contained file for another runtime: from images of any size to probabilities.

The file is written only if the runtime reproduces torch's logits, and the whole file the answers for timm's
preprocessing; in int8, only if the accuracy on the held-out images drops by at most `Int8.max_drop` points.
"""

import copy
import importlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from resnext_hub.errors import RequestError, RunError, setting
from resnext_hub.export.int8 import Accuracy, Check, Int8, Quantized, quantize
from resnext_hub.export.parts import Answers, Part, all_parts, raw_model
from resnext_hub.kernels.widths import LayerChoice, merge_layers
from resnext_hub.machine import disable_telemetry, resolve_precision
from resnext_hub.models.lookup import LoadedModel
from resnext_hub.models.weights import require_finite
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 7)
"""Batch sizes at which the runtime is compared with torch."""

TOLERANCE = 1e-4
"""Largest relative error; reordered float32 sums cause about 1e-6, and a wrong graph far more than this."""

PROBABILITY_TOLERANCE = 0.01
"""Largest error of a probability of the whole file; pixels may differ by one gray level from Pillow's."""

_SIZES = ((1, 1), (7, 150), (200, 9), (33, 64), (240, 320))
"""Heights and widths of the images with which the whole file is checked."""

RESIZING = {
    "center": "resize the shorter edge to floor(size / crop_pct) pixels, and crop the center",
    "squash": "resize both edges to floor(size / crop_pct) pixels, and crop the center",
    "border": "resize the longer edge to floor(size / crop_pct) pixels, and crop or pad with mean to size",
}
"""Descriptions of timm's crop modes, for the description inside the file."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""Maps the input of a content, for any N, to its first output: pixels `(N, C, H, W)` to logits `(N, classes)`, or
images to probabilities."""

FormatName = Literal["onnx", "openvino", "torch"]


class Format(Protocol):
    """A file format: builds, quantizes, runs and writes files."""

    suffix: str
    runtime: str
    """Name of the runtime that loads such a file."""

    def check(self, model: LoadedModel) -> None:
        """Raise RequestError, before any work, if the format cannot hold the model."""

    def build(self, part: Part) -> Any:
        """Return a part as the content of a file."""

    def join(self, contents: Sequence[Any]) -> Any:
        """Return contents that follow one another as one, joined by the names of their outputs and inputs."""

    def describe(self, content: Any, facts: dict[str, str], text: str) -> None:
        """Set the metadata of a content."""

    def open(self, content: Any) -> Run:
        """Return a function that runs the content, and returns its first output."""

    def write(self, content: Any, path: Path) -> tuple[Path, ...]:
        """Write the content atomically; return the paths of the files."""


@runtime_checkable
class QuantizingFormat(Format, Protocol):
    """A file format that can hold a model in int8."""

    def quantize(self, content: Any, images: torch.Tensor, check: Check) -> Quantized:
        """Return the content of a model quantized to int8, calibrated on images, and good enough for a check."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a file returns, and how it was checked."""

    runtime: str
    absolute_error: float
    """Largest error of the runtime's logits over all batch sizes, before quantization to int8."""
    relative_error: float
    """The same, relative to the largest logit of the same image."""
    probability_error: float | None
    """Largest error of the probabilities of the whole file against the same model fed by timm's transform; None if
    the file contains no preprocessing."""
    outputs: tuple[str, ...]
    """Names of the outputs."""
    int8: Accuracy | None
    """Accuracy on the held-out images before and after quantization."""


@dataclass(frozen=True, kw_only=True)
class ExportedFile(Checked):
    """An exported file."""

    path: Path
    size: int
    """Size of all files of the export, in bytes."""
    layers: tuple[LayerChoice, ...]
    """Group width of each grouped convolution; empty unless merging was requested."""


def export(
    model: LoadedModel,
    format: FormatName,
    path: Path | None = None,
    *,
    merge: Literal["measure", "off"] | int = "off",
    int8: Int8 | None = None,
    raw: bool = False,
    tolerance: float = TOLERANCE,
) -> ExportedFile:
    """Export a classifier for another runtime, and check the file against torch and timm's preprocessing.

    The input `images` is `(N, H, W, 3)` uint8: RGB, upright, of any size. The outputs are `probabilities`
    `(N, classes)` float32; `label` `(N,)` int64, or `labels` `(N, classes)` bool if an image can have several;
    `embedding` `(N, features)` float32, if the architecture has one; and `ood_score` `(N,)` float32, if the model has
    one. Test-time augmentation and temperature are in the file.

    The metadata of the file is `label_names` (a JSON list), `preprocessing` (JSON: input_size, crop_pct, crop_mode,
    interpolation, mean and std in timm's words), `license`, `source`, `architecture`, `thresholds` (JSON) if an image
    can have several labels, and else `accept_thresholds` (JSON) if they were fitted.

    Args:
        model: The classifier, on the CPU.
        format: `onnx` for one file; `openvino` for an XML file and a BIN file with the weights next to it; `torch` for
            a program of `torch.export`.
        path: The file to write. By default it is next to the model folder and named after it (`RUN/model.onnx`,
            `RUN/model-int8.onnx`), or for a model from the Hub in the working directory and named after the repository.
        merge: Channels to which neighboring groups of grouped convolutions are merged in the file, or `off`; with
            OpenVINO, `measure` chooses the fastest width on this machine for each layer.
        int8: Images for computing convolutions in int8; float32 if not given.
        raw: Export the model alone: from `images` `(N, C, H, W)` float32, normalized, to `logits` `(N, classes)`.
        tolerance: Largest relative error of the logits.

    Raises:
        RequestError: If the path is not writable, or the format cannot hold the model.
        RunError: If the model cannot be exported, an error exceeds its tolerance, or int8 loses more accuracy than
            allowed; no file is left.
    """
    disable_telemetry()
    files: Format = importlib.import_module(f"resnext_hub.export.{format}").FORMAT
    path = _default_path(model, files.suffix if int8 is None else f"-int8{files.suffix}") if path is None else path
    _check_place(path, files.suffix)
    files.check(model)
    if int8 is not None and not isinstance(files, QuantizingFormat):
        raise RequestError(f"{setting('int8', True)} needs {setting('format', 'onnx')} or openvino")
    require_finite(model.model)
    merged, layers = _merged(model, format, merge, None if int8 is None else int8.calibration)
    if raw and model.tta != "none":
        _logger.info(
            "the file contains the model without test-time augmentation; to reproduce the predictions of the run, "
            "average the logits of each image and its mirror image"
        )
    content, checked = _checked(files, model, merged, raw=raw, int8=int8, tolerance=tolerance)
    files.describe(content, *_facts(model, raw))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = files.write(content, path)
    except OSError as failure:
        raise RunError(f"{printable(path)} could not be written: {failure.strerror or failure}") from failure
    return ExportedFile(
        path=path,
        size=sum(file.stat().st_size for file in written),
        layers=layers,
        **vars(checked),
    )


def _checked(
    files: Format, model: LoadedModel, computed: nn.Module, *, raw: bool, int8: Int8 | None, tolerance: float
) -> tuple[Any, Checked]:
    """Return the content of a file, after checking it.

    Args:
        files: The format.
        model: The model.
        computed: The module to export, with merged groups if they were requested.
        raw: Whether the file contains the model alone.
        int8: Images for int8.
        tolerance: Largest relative error of the logits.

    Raises:
        RunError: If an error exceeds its tolerance, or int8 loses more accuracy than allowed.
    """
    parts = [raw_model(computed, model.input.input_size)] if raw else all_parts(model, computed)
    content = files.build(parts[0 if raw else 1])
    absolute, relative = _errors(model, files.open(content))
    if not relative <= tolerance:  # written so that NaN fails too
        raise RunError(
            f"the logits of {files.runtime} differ from torch's by {absolute:.1e}, or {relative:.1e} of the largest "
            f"logit (tolerance {tolerance:.0e}); no file was written"
        )
    accuracy, error = None, None
    if int8 is not None and isinstance(files, QuantizingFormat):
        content, accuracy = quantize(files, content, model.model, int8)
    if not raw:
        run = files.open(content)
        content = files.join((files.build(parts[0]), content, files.build(parts[2])))
        error = _probability_error(model, run, files.open(content))
        if not error <= PROBABILITY_TOLERANCE:
            raise RunError(
                f"the probabilities of {files.runtime} differ from those with timm's preprocessing by {error:.3f} "
                f"(tolerance {PROBABILITY_TOLERANCE:g}); no file was written"
            )
    return content, Checked(
        runtime=files.runtime,
        absolute_error=absolute,
        relative_error=relative,
        probability_error=error,
        outputs=parts[-1].outputs,
        int8=accuracy,
    )


def _merged(
    model: LoadedModel, format: FormatName, merge: Literal["measure", "off"] | int, calibration: torch.Tensor | None
) -> tuple[nn.Module, tuple[LayerChoice, ...]]:
    if merge == "off":
        return model.model, ()
    merged = copy.deepcopy(model.model)
    example = torch.zeros(16, *model.input.input_size)
    timing = None
    if merge == "measure":
        if format != "openvino":
            raise RequestError(
                f"{setting('merge_groups', 'auto')} needs {setting('format', 'openvino')}; with "
                f"{setting('format', format)}, use a number of channels"
            )
        from resnext_hub.kernels.openvino import OpenVinoTiming

        # the type that OpenVINO chooses by default on this machine
        dtype = torch.bfloat16 if resolve_precision("auto", "cpu") == "bf16" else torch.float32
        timing = OpenVinoTiming(merged, example, dtype, calibration)
    return merged, merge_layers(merged, example, merge, timing)


def _default_path(model: LoadedModel, suffix: str) -> Path:
    if model.folder is not None:
        return model.folder.with_name(f"{model.folder.name}{suffix}")
    repository = str(model.source.base_id).partition("@")[0]
    return Path(f"{repository.rpartition('/')[2]}{suffix}")


def _check_place(path: Path, suffix: str) -> None:
    """Raise RequestError if the file cannot be written; create nothing yet."""
    if path.is_dir():
        raise RequestError(
            f"{setting('output', path)} is a folder; expected a file such as {printable(path / f'model{suffix}')}"
        )
    if path.suffix != suffix:
        raise RequestError(f"{setting('output', path)}: expected a file name ending in {suffix}")
    nearest = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not nearest.is_dir():
        raise RequestError(f"{setting('output', path)} cannot be created: {printable(nearest)} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"{setting('output', path)} is not writable: permission denied; choose another path")


def _facts(model: LoadedModel, raw: bool) -> tuple[dict[str, str], str]:
    """Return the metadata of a file, and its description."""
    keys = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    facts = {
        "label_names": json.dumps(model.label_names, ensure_ascii=False),
        "preprocessing": json.dumps({key: getattr(model.input, key) for key in keys}),
        "license": model.source.base_license or "unknown",
        "source": str(model.source.base_id),
        "architecture": model.source.architecture,
    }
    several = model.thresholds is not None
    if several:
        facts["thresholds"] = json.dumps(model.thresholds)
    elif model.accept_thresholds:
        accept = {f"{precision:g}": lowest for precision, lowest in model.accept_thresholds.items()}
        facts["accept_thresholds"] = json.dumps(accept)
    if not raw:
        answers = (
            "labels: for each entry of label_names, whether it is predicted. "
            if several
            else "label: index of the most probable entry of label_names. "
        )
        return facts, (
            "images: uint8 RGB, (N, height, width, 3), of any size and upright; preprocessing is part of the model. "
            f"probabilities: one per entry of label_names. {answers}embedding: the features before the classifier. "
            "ood_score: above 0 if the image is unlike the training images. accept_thresholds: for each precision, the "
            "lowest probability at which an answer is accepted; this fraction of the accepted answers can be expected "
            "to be correct."
        )
    meaning = (
        "sigmoid gives the probability of each label; those that reach their entry of thresholds are predicted. "
        if several
        else "softmax gives the probabilities. "
    )
    resizing = RESIZING.get(model.input.crop_mode, RESIZING["center"])
    return facts, (
        f"images: {resizing}; divide by 255, subtract mean, divide by std, channels first. "
        f"logits: one per entry of label_names; {meaning}"
        "All values are in the metadata properties; size is the height and width of input_size."
    )


@torch.inference_mode()
def _probability_error(model: LoadedModel, alone: Run, whole: Run) -> float:
    """Return the largest error of a file's probabilities against its model fed by timm's transform.

    Args:
        model: The classifier.
        alone: Maps pixels to logits.
        whole: Maps images to probabilities.
    """
    generator = np.random.default_rng(0)
    views = 1 if model.tta == "none" else 2
    answers = Answers(views, model.temperature, None if model.thresholds is None else torch.zeros(1))
    transform, errors = create_transform(**model.input.to_timm(), is_training=False), []
    for height, width in _SIZES:
        # smooth images, as photos are: enlarged noise
        coarse = generator.integers(0, 256, (2, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
        images = [Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC) for part in coarse]
        pixels = torch.stack([transform(image.convert(model.input.mode)) for image in images])
        logits = alone(pixels if views == 1 else torch.cat([pixels, pixels.flip(-1)]))
        found = whole(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
        errors.append((answers(logits)[0] - found).abs().max())
    return torch.stack(errors).max().item()


@torch.inference_mode()
def _errors(model: LoadedModel, run: Run) -> tuple[float, float]:
    """Return the largest absolute and relative error of a runtime's logits on seeded Gaussian noise."""
    generator = torch.Generator().manual_seed(0)
    absolute, relative = [], []
    for batch_size in BATCH_SIZES:
        images = torch.randn(batch_size, *model.input.input_size, generator=generator)
        expected = model.model(images)
        if not expected.isfinite().all():
            raise RunError(
                "the model's logits on Gaussian noise are not finite, so they cannot be compared with another runtime's"
            )
        differences = (run(images) - expected).abs().amax(dim=1)
        absolute.append(differences)
        relative.append(differences / expected.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    return torch.cat(absolute).max().item(), torch.cat(relative).max().item()
