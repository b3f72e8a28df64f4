"""A trained network as a file that suffices by itself for another runtime: network, preprocessing and labels.

The file is written only if that runtime gives torch's logits from it; in int8, only if it classifies the held-out
images about as well.
"""

import copy
import importlib
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from resnext_hub.data.loaders import EvaluationSamples
from resnext_hub.data.stream import StreamedEvaluation
from resnext_hub.errors import RequestError, RunError
from resnext_hub.kernels.widths import LayerChoice, merge_layers
from resnext_hub.machine import disable_telemetry, resolve_precision
from resnext_hub.models.lookup import LoadedModel
from resnext_hub.models.weights import require_finite
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 7)
"""Numbers of images at which the file is compared with the network."""

TOLERANCE = 1e-4
"""Greatest relative error; another order of float32 sums makes about 1e-6, and a wrong graph far more than this."""

CALIBRATION_IMAGES = 300
"""Training images from which the ranges of an int8 network's activations are taken, as NNCF has by default."""

MAX_DROP = 0.5
"""Points of top-1 accuracy that int8 may cost."""

RESIZING = {
    "center": "resize so that the shorter edge is floor(size / crop_pct) pixels, and crop the centre",
    "squash": "resize both edges to floor(size / crop_pct) pixels, and crop the centre",
    "border": "resize so that the longer edge is floor(size / crop_pct) pixels, and crop or pad with mean to size",
}
"""What timm's crop modes mean, in words for whoever opens the file."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""Maps images `(N, C, H, W)` of any N to logits."""

FormatName = Literal["onnx", "openvino"]


class Format(Protocol):
    """What writes files of a kind, and computes from them."""

    suffix: str
    runtime: str
    """Name of what computes from such a file."""

    def check(self, model: LoadedModel) -> None:
        """Refuse, before any work, a network that no such file holds."""

    def build(self, network: nn.Module, example: torch.Tensor, facts: dict[str, str], text: str) -> Any:
        """Give the content of a file that takes any number of images, with facts as its metadata."""

    def quantize(self, content: Any, images: torch.Tensor) -> Any:
        """Give the same in int8, calibrated on images `(M, C, H, W)`."""

    def open(self, content: Any) -> Run:
        """Give what computes from a content."""

    def write(self, content: Any, path: Path) -> tuple[Path, ...]:
        """Write a content, whole or not at all; give the files."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Int8:
    """What int8 needs to be made, and to be judged."""

    calibration: torch.Tensor
    """Training images `(M, C, H, W)`, normalised."""
    samples: EvaluationSamples | StreamedEvaluation
    """Held-out images."""
    max_drop: float = MAX_DROP
    """Points of top-1 accuracy that it may cost."""


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A written file, and how far the runtime's logits are from torch's, over all batch sizes."""

    path: Path
    size: int
    """Bytes of it, and of what lies beside it."""
    runtime: str
    absolute_error: float
    relative_error: float
    """Relative to the greatest logit of the same image; before int8, if it is in int8."""
    layers: tuple[LayerChoice, ...]
    """How wide groups are, by grouped convolution; empty if none were to be merged."""
    int8: "Accuracy | None" = None
    """What int8 costs on the held-out images."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Exact counts on the held-out images."""

    before: int
    """Right as torch computes it in float32."""
    after: int
    """Right from the file."""
    count: int
    relative_error: float
    """Norm of the difference of all logits over their norm in float32."""

    @property
    def drop(self) -> float:
        """Points of top-1 that are lost."""
        return 100 * (self.before - self.after) / self.count

    def __str__(self) -> str:
        return (
            f"{self.before} of {self.count} right before, {self.after} after "
            f"({100 * self.before / self.count:.2f} % and {100 * self.after / self.count:.2f} %); "
            f"logits differ by {self.relative_error:.1e} (norm over norm)"
        )


def export(
    model: LoadedModel,
    format: FormatName,
    path: Path | None = None,
    *,
    merge: Literal["measure", "off"] | int = "off",
    int8: Int8 | None = None,
    tolerance: float = TOLERANCE,
) -> ExportedFile:
    """Write a network for another runtime, checked by that runtime against torch.

    The input `images` is `(N, C, H, W)` float32, normalised, with any N; the output `logits` is `(N, classes)` float32.
    The file's metadata are `label_names` (a JSON list), `preprocessing` (JSON: input_size, crop_pct, crop_mode,
    interpolation, mean and std in timm's words), `license`, `source` and `architecture`.

    Args:
        model: The network, on the CPU.
        format: `onnx`, one file; `openvino`, an XML file with its weights in a BIN file beside it.
        path: The file; if not given, it is named after the model folder and stands beside it (`RUN/model.onnx`,
            `RUN/model-int8.onnx`), or after the Hub's repository, in the working directory.
        merge: A width to which neighbouring groups of grouped convolutions are merged, in the file; with OpenVINO
            `measure` takes for each layer what is fastest here.
        int8: Compute convolutions in int8.
        tolerance: Greatest relative error at which the file is written.

    Raises:
        RequestError: If the file cannot be written there, or cannot hold the network.
        RunError: If the network cannot be exported, or the runtime's logits are not torch's, or int8 costs more
            accuracy than it may; no file is left.
    """
    disable_telemetry()
    files: Format = importlib.import_module(f"resnext_hub.export.{format}").FORMAT
    path = _default_path(model, files.suffix if int8 is None else f"-int8{files.suffix}") if path is None else path
    _check_place(path, files.suffix)
    files.check(model)
    require_finite(model.model)
    network, layers = _merged(model, format, merge, None if int8 is None else int8.calibration)
    content = files.build(network, *_example_and_facts(model))
    absolute, relative = _errors(model, files.open(content))
    if not relative <= tolerance:  # NaN is refused as well
        raise RunError(
            f"{files.runtime}'s logits differ from torch's by {absolute:.1e}, which is {relative:.1e} of the greatest "
            f"logit, where {tolerance:.0e} is tolerated; no file was written"
        )
    accuracy = None
    if int8 is not None:
        content = files.quantize(content, int8.calibration)
        accuracy = _compare(model.model, files.open(content), int8)
        if not accuracy.drop <= int8.max_drop:  # NaN is refused as well
            raise RunError(
                f"int8 costs {accuracy.drop:.2f} points of top-1 where --max-drop allows {int8.max_drop:g}: "
                f"{accuracy}; no file was written"
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = files.write(content, path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
    return ExportedFile(
        path=path,
        size=sum(file.stat().st_size for file in written),
        runtime=files.runtime,
        absolute_error=absolute,
        relative_error=relative,
        layers=layers,
        int8=accuracy,
    )


@torch.inference_mode()
def _compare(network: nn.Module, run: Run, int8: Int8) -> Accuracy:
    """Classify the held-out images that can be read as torch does and as a file does."""
    before = after = count = 0
    difference = norm = 0.0
    for batch in int8.samples.batches(32, 0, 1, 0, False):
        broken = {entry.index for entry in batch.unreadable}
        readable = torch.tensor([index not in broken for index in batch.indices.tolist()])
        expected, found = network(batch.images)[readable], run(batch.images)[readable]
        labels = batch.labels[readable]
        before += int((expected.argmax(1) == labels).sum())
        after += int((found.argmax(1) == labels).sum())
        count += len(labels)
        difference += float((found - expected).double().square().sum())
        norm += float(expected.double().square().sum())
    if count == 0:
        raise RunError("none of the held-out images can be read, so nothing says what int8 costs; no file was written")
    return Accuracy(before=before, after=after, count=count, relative_error=math.sqrt(difference / (norm or 1.0)))


def _merged(
    model: LoadedModel, format: FormatName, merge: Literal["measure", "off"] | int, calibration: torch.Tensor | None
) -> tuple[nn.Module, tuple[LayerChoice, ...]]:
    if merge == "off":
        return model.model, ()
    network = copy.deepcopy(model.model)
    example = torch.zeros(16, *model.input.input_size)
    timing = None
    if merge == "measure":
        if format != "openvino":
            raise RequestError(f"--merge-groups auto is measured by OpenVINO; with --format {format} give a width")
        from resnext_hub.kernels.openvino import OpenVinoTiming

        # the types that OpenVINO chooses by itself on this machine
        dtype = torch.bfloat16 if resolve_precision("auto", "cpu") == "bf16" else torch.float32
        timing = OpenVinoTiming(network, example, dtype, calibration)
    return network, merge_layers(network, example, merge, timing)


def _default_path(model: LoadedModel, ending: str) -> Path:
    if model.folder is not None:
        return model.folder.with_name(f"{model.folder.name}{ending}")
    repository = str(model.source.base_id).partition("@")[0]
    return Path(f"{repository.rpartition('/')[2]}{ending}")


def _check_place(path: Path, suffix: str) -> None:
    """Refuse a place where no file can be written; make nothing yet."""
    if path.is_dir():
        raise RequestError(f"--output {path} is a folder: expected a file, such as {path / f'model{suffix}'}")
    if path.suffix != suffix:
        raise RequestError(f"--output {path}: expected a name that ends in {suffix}")
    nearest = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not nearest.is_dir():
        raise RequestError(f"{printable(path)} cannot be made: {printable(nearest)} is a file; choose another --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"{printable(path)} is not writable: permission denied; choose another --output")


def _example_and_facts(model: LoadedModel) -> tuple[torch.Tensor, dict[str, str], str]:
    keys = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    facts = {
        "label_names": json.dumps(model.label_names, ensure_ascii=False),
        "preprocessing": json.dumps({key: getattr(model.input, key) for key in keys}),
        "license": model.source.base_license or "unknown",
        "source": str(model.source.base_id),
        "architecture": model.source.architecture,
    }
    resizing = RESIZING.get(model.input.crop_mode, RESIZING["center"])
    text = (
        f"images: from an image, {resizing}; divide by 255, subtract mean, divide by std, channels first. "
        "logits: one for each of label_names; their softmax is the probabilities. "
        "All is in the metadata properties; size is the height and width of input_size."
    )
    return torch.zeros(2, *model.input.input_size), facts, text


@torch.inference_mode()
def _errors(model: LoadedModel, run: Run) -> tuple[float, float]:
    """Give the greatest absolute and relative error of a runtime's logits, on seeded normal noise."""
    generator = torch.Generator().manual_seed(0)
    absolute, relative = [], []
    for batch_size in BATCH_SIZES:
        images = torch.randn(batch_size, *model.input.input_size, generator=generator)
        expected = model.model(images)
        if not expected.isfinite().all():
            raise RunError("the model's logits of normal noise are not finite, so no runtime can be compared with it")
        differences = (run(images) - expected).abs().amax(dim=1)
        absolute.append(differences)
        relative.append(differences / expected.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny))
    return torch.cat(absolute).max().item(), torch.cat(relative).max().item()
