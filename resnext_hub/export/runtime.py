"""Export a model to a self-contained file for another runtime, with preprocessing and labels as metadata.

The file is written only if the runtime reproduces torch's logits; in int8, only if the accuracy on the held-out images
drops by at most `Int8.max_drop` points.
"""

import copy
import importlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from resnext_hub.errors import RequestError, RunError, setting
from resnext_hub.export.int8 import Accuracy, Check, Int8, Quantized, quantize
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

RESIZING = {
    "center": "resize the shorter edge to floor(size / crop_pct) pixels, and crop the center",
    "squash": "resize both edges to floor(size / crop_pct) pixels, and crop the center",
    "border": "resize the longer edge to floor(size / crop_pct) pixels, and crop or pad with mean to size",
}
"""Descriptions of timm's crop modes, for the description inside the file."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""Maps images `(N, C, H, W)`, for any N, to logits `(N, classes)`."""

FormatName = Literal["onnx", "openvino"]


class Format(Protocol):
    """A file format: builds, quantizes, runs and writes files."""

    suffix: str
    runtime: str
    """Name of the runtime that loads such a file."""

    def check(self, model: LoadedModel) -> None:
        """Raise RequestError, before any work, if the format cannot hold the model."""

    def build(self, model: nn.Module, example: torch.Tensor, facts: dict[str, str], text: str) -> Any:
        """Return the content of a file with a dynamic batch size, with facts as its metadata."""

    def quantize(self, content: Any, images: torch.Tensor, check: Check) -> Quantized:
        """Return the content quantized to int8, calibrated on images `(M, C, H, W)`, and good enough for a check."""

    def open(self, content: Any) -> Run:
        """Return a function that runs the content."""

    def write(self, content: Any, path: Path) -> tuple[Path, ...]:
        """Write the content atomically; return the paths of the files."""


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """An exported file, and the largest error of the runtime's logits over all batch sizes."""

    path: Path
    size: int
    """Size of all files of the export, in bytes."""
    runtime: str
    absolute_error: float
    relative_error: float
    """Relative to the largest logit of the same image; measured before quantization to int8."""
    layers: tuple[LayerChoice, ...]
    """Group width of each grouped convolution; empty unless merging was requested."""
    int8: Accuracy | None = None
    """Accuracy on the held-out images before and after quantization."""


def export(
    model: LoadedModel,
    format: FormatName,
    path: Path | None = None,
    *,
    merge: Literal["measure", "off"] | int = "off",
    int8: Int8 | None = None,
    tolerance: float = TOLERANCE,
) -> ExportedFile:
    """Export a model for another runtime, and check the runtime's logits against torch.

    The input `images` is `(N, C, H, W)` float32, normalized, for any N; the output `logits` is `(N, classes)` float32.
    The metadata of the file is `label_names` (a JSON list), `preprocessing` (JSON: input_size, crop_pct, crop_mode,
    interpolation, mean and std in timm's words), `license`, `source` and `architecture`.

    Args:
        model: The model, on the CPU.
        format: `onnx` for one file; `openvino` for an XML file and a BIN file with the weights next to it.
        path: The file to write. By default it is next to the model folder and named after it (`RUN/model.onnx`,
            `RUN/model-int8.onnx`), or for a model from the Hub in the working directory and named after the repository.
        merge: Channels to which neighboring groups of grouped convolutions are merged in the file, or `off`; with
            OpenVINO, `measure` chooses the fastest width on this machine for each layer.
        int8: Images for computing convolutions in int8; float32 if not given.
        tolerance: Largest relative error of the logits.

    Raises:
        RequestError: If the path is not writable, or the format cannot hold the model.
        RunError: If the model cannot be exported, the logits differ by more than the tolerance, or int8 loses more
            accuracy than allowed; no file is left.
    """
    disable_telemetry()
    files: Format = importlib.import_module(f"resnext_hub.export.{format}").FORMAT
    path = _default_path(model, files.suffix if int8 is None else f"-int8{files.suffix}") if path is None else path
    _check_place(path, files.suffix)
    files.check(model)
    require_finite(model.model)
    merged, layers = _merged(model, format, merge, None if int8 is None else int8.calibration)
    if model.tta != "none":
        _logger.info(
            "the file contains the model without test-time augmentation; for the predictions of the run, average the "
            "logits of each image and its mirror image"
        )
    content = files.build(merged, *_example_and_facts(model))
    absolute, relative = _errors(model, files.open(content))
    if not relative <= tolerance:  # written so that NaN fails too
        raise RunError(
            f"the logits of {files.runtime} differ from torch's by {absolute:.1e}, or {relative:.1e} of the largest "
            f"logit (tolerance {tolerance:.0e}); no file was written"
        )
    accuracy = None
    if int8 is not None:
        content, accuracy = quantize(files, content, model.model, int8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = files.write(content, path)
    except OSError as error:
        raise RunError(f"{printable(path)} could not be written: {error.strerror or error}") from error
    return ExportedFile(
        path=path,
        size=sum(file.stat().st_size for file in written),
        runtime=files.runtime,
        absolute_error=absolute,
        relative_error=relative,
        layers=layers,
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
                f"{setting('format', format)} use a number of channels"
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


def _example_and_facts(model: LoadedModel) -> tuple[torch.Tensor, dict[str, str], str]:
    keys = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    facts = {
        "label_names": json.dumps(model.label_names, ensure_ascii=False),
        "preprocessing": json.dumps({key: getattr(model.input, key) for key in keys}),
        "license": model.source.base_license or "unknown",
        "source": str(model.source.base_id),
        "architecture": model.source.architecture,
    }
    if model.thresholds is not None:
        facts["thresholds"] = json.dumps(model.thresholds)
    meaning = (
        "softmax gives the probabilities. "
        if model.thresholds is None
        else "sigmoid gives the probability of each label; those that reach their entry of thresholds are predicted. "
    )
    resizing = RESIZING.get(model.input.crop_mode, RESIZING["center"])
    text = (
        f"images: {resizing}; divide by 255, subtract mean, divide by std, channels first. "
        f"logits: one per entry of label_names; {meaning}"
        "All values are in the metadata properties; size is the height and width of input_size."
    )
    return torch.zeros(2, *model.input.input_size), facts, text


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
