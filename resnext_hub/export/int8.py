"""Quantize an exported model to int8, and check its accuracy on the held-out images."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resnext_hub.data.loaders import EvaluationSamples
from resnext_hub.data.stream import StreamedEvaluation
from resnext_hub.errors import RunError, setting

if TYPE_CHECKING:
    from resnext_hub.export.runtime import Format, Run

CALIBRATION_IMAGES = 300
"""Training images for calibrating the activation ranges in int8; NNCF's default."""

MAX_DROP = 0.5
"""Default of the largest drop of top-1 accuracy in int8, in points."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Int8:
    """Images for quantizing to int8 and for checking its accuracy."""

    calibration: torch.Tensor
    """Normalized training images `(M, C, H, W)`."""
    samples: EvaluationSamples | StreamedEvaluation
    """Held-out images."""
    max_drop: float = MAX_DROP
    """Largest allowed drop of top-1 accuracy, in points."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Exact counts on the held-out images, before and after quantization."""

    before: int
    """Correct predictions of torch in float32."""
    after: int
    """Correct predictions of the int8 file."""
    count: int
    relative_error: float
    """Norm of the difference of all logits, relative to their norm in float32."""

    @property
    def drop(self) -> float:
        """Drop of top-1 accuracy, in points."""
        return 100 * (self.before - self.after) / self.count

    def __str__(self) -> str:
        return (
            f"accuracy {100 * self.before / self.count:.2f} % ({self.before}/{self.count}) before and "
            f"{100 * self.after / self.count:.2f} % ({self.after}/{self.count}) after quantization; "
            f"relative error of the logits {self.relative_error:.1e}"
        )


def quantize(files: "Format", content: Any, model: nn.Module, int8: Int8) -> tuple[Any, Accuracy]:
    """Return the content of a file quantized to int8, and its accuracy.

    Args:
        files: The format of the content.
        content: Maps normalized images to logits, in float32.
        model: The same function in torch, in float32.
        int8: Images for calibration and for measuring accuracy.

    Raises:
        RunError: If int8 loses more accuracy than allowed.
    """
    content = files.quantize(content, int8.calibration)
    accuracy = _compare(model, files.open(content), int8)
    if not accuracy.drop <= int8.max_drop:  # written so that NaN fails too
        allowed = setting("max_drop", f"{int8.max_drop:g}")
        raise RunError(
            f"int8 loses {accuracy.drop:.2f} points of top-1 accuracy, more than {allowed} allows: {accuracy}; "
            "no file was written"
        )
    return content, accuracy


@torch.inference_mode()
def _compare(model: nn.Module, run: "Run", int8: Int8) -> Accuracy:
    """Classify the readable held-out images with torch and with the exported file."""
    before = after = count = 0
    difference = norm = 0.0
    for batch in int8.samples.batches(32, 0, 1, 0, False):
        unreadable = {entry.index for entry in batch.unreadable}
        readable = torch.tensor([index not in unreadable for index in batch.indices.tolist()])
        expected, logits = model(batch.images)[readable], run(batch.images)[readable]
        labels = batch.labels[readable]
        before += int((expected.argmax(1) == labels).sum())
        after += int((logits.argmax(1) == labels).sum())
        count += len(labels)
        difference += float((logits - expected).double().square().sum())
        norm += float(expected.double().square().sum())
    if count == 0:
        raise RunError(
            "all held-out images are unreadable, so the accuracy in int8 cannot be measured; no file was written"
        )
    return Accuracy(before=before, after=after, count=count, relative_error=math.sqrt(difference / (norm or 1.0)))
