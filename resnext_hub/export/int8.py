"""Quantize an exported model to int8, with as many layers in float32 as accuracy on the held-out images requires.

NNCF returns the worst layers to float32, one after the other, until a test shows that the loss is within the limit. The
test is that of a paired comparison (McNemar's): the upper confidence limit of the drop has to be within `max_drop`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resnext_hub.data.loaders import EvaluationSamples
from resnext_hub.data.stream import StreamedEvaluation
from resnext_hub.errors import RunError, setting
from resnext_hub.kernels.openvino import Repaired

if TYPE_CHECKING:
    from resnext_hub.export.runtime import QuantizingFormat, Run

_logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 300
"""Training images for calibrating the activation ranges in int8; NNCF's default."""

MAX_DROP = 0.5
"""Default of the largest drop of top-1 accuracy in int8, in points."""

CONFIDENCE = 0.95
"""Probability that no file whose true drop exceeds the limit passes any of the tests."""

TYPICAL_CHANGES = 0.01
"""Share of images for which a good int8 file is wrong where float32 is right, or the reverse; 0.3 to 1 % are common."""

Check = Callable[["Run", Sequence[int]], tuple[float, list[float]]]
"""Given a quantized model and indices of calibration images, returns a score, which is 0 if the model is good enough
and otherwise less, and a score for each of the images."""


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
class Quantized:
    """A quantized model, and the layers that went back to float32."""

    content: Any
    steps: tuple[tuple[str, ...], ...]
    """Layers returned to float32 before each test but the first."""
    float_layers: tuple[str, ...]
    """Layers that are in float32 at the end."""
    is_int8: bool
    """Whether any layer is still quantized."""
    is_mostly_float: bool
    """Whether more than half of the operations went back to float32."""

    @classmethod
    def of(cls, repaired: Repaired, names: Mapping[str, str]) -> "Quantized":
        """Return what was repaired, with the names of layers instead of those of operations."""

        def layers(operations: Iterable[str]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(names.get(name, name) for name in operations))

        return cls(
            content=repaired.model,
            steps=tuple(map(layers, repaired.steps)),
            float_layers=layers(repaired.restored),
            is_int8=repaired.is_int8,
            is_mostly_float=len(repaired.restored) > repaired.operations / 2,
        )


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Exact counts on the held-out images, before and after quantization."""

    before: int
    """Correct predictions of torch in float32."""
    after: int
    """Correct predictions of the int8 file."""
    lost: int
    """Images that only float32 classifies correctly."""
    count: int
    relative_error: float
    """Norm of the difference of all logits, relative to their norm in float32."""
    test: int = 1
    """Which of the tests this is, from 1; the later ones are stricter, so that all together hold with 95 %."""
    float_layers: tuple[str, ...] = ()
    """Layers that are computed in float32."""
    steps: "tuple[tuple[tuple[str, ...], Accuracy], ...]" = ()
    """The tests before the accepted one, if any, each with the layers that were returned to float32 before it."""

    @property
    def drop(self) -> float:
        """Drop of top-1 accuracy, in points."""
        return 100 * (self.before - self.after) / self.count

    @property
    def largest_drop(self) -> float:
        """Upper confidence limit of the drop, in points."""
        gained = self.lost - (self.before - self.after)
        return 100 * largest_difference(self.lost, gained, self.count, _risk(self.test))

    def within(self, max_drop: float) -> bool:
        """Return whether the drop is within a limit: with confidence, if there are enough images to show it."""
        return (self.largest_drop if can_show(max_drop, self.count) else self.drop) <= max_drop

    def __str__(self) -> str:
        lines = [
            f"accuracy {100 * self.before / self.count:.2f} % ({self.before}/{self.count}) before and "
            f"{100 * self.after / self.count:.2f} % ({self.after}/{self.count}) after quantization, a drop of "
            f"{self.drop:.2f} points, at most {self.largest_drop:.2f} with {CONFIDENCE:.0%} confidence; "
            f"relative error of the logits {self.relative_error:.1e}"
        ]
        for index, (layers, tested) in enumerate(self.steps):
            what = f"then {', '.join(layers)} in float32" if index else "all layers in int8"
            lines.append(f"  {what}: a drop of {tested.drop:.2f} points, at most {tested.largest_drop:.2f}")
        if self.float_layers:
            lines.append(f"  layers in float32: {', '.join(self.float_layers)}")
        return "\n".join(lines)


def quantize(files: "QuantizingFormat", content: Any, model: nn.Module, int8: Int8) -> tuple[Any, Accuracy]:
    """Return the content of a file quantized to int8, and its accuracy.

    Args:
        files: The format of the content.
        content: Maps normalized images to logits, in float32.
        model: The same function in torch, in float32.
        int8: Images for calibration and for measuring accuracy.

    Raises:
        RunError: If int8 loses more accuracy than allowed, whichever layers are in float32.
    """
    tests: list[Accuracy] = []
    quantized = files.quantize(content, int8.calibration, _check(model, int8, tests))
    last, limit = tests[-1], setting("max_drop", f"{int8.max_drop:g}")
    if not quantized.is_int8 or not last.within(int8.max_drop):
        confident = can_show(int8.max_drop, last.count)
        loss = f"up to {tests[0].largest_drop:.2f}" if confident else f"{tests[0].drop:.2f}"
        raise RunError(
            f"int8 loses {loss} points of top-1 accuracy, more than {limit} allows, and keeping layers in float32 does "
            f"not help: {replace(tests[0], steps=())}; no file was written"
        )
    if not can_show(int8.max_drop, last.count):
        _logger.warning(
            "%d held-out images are too few to show that int8 loses at most %g points; they only show that it loses at "
            "most %.1f (%.0f %% confidence). The file is accepted because the measured drop is %.2f",
            last.count,
            int8.max_drop,
            last.largest_drop,
            100 * CONFIDENCE,
            last.drop,
        )
    if quantized.is_mostly_float:
        _logger.warning("most layers of the int8 file are in float32, so it may not be faster than a float32 file")
    steps = tuple(zip(((), *quantized.steps), tests, strict=True)) if quantized.steps else ()
    return quantized.content, replace(last, float_layers=quantized.float_layers, steps=steps)


def can_show(max_drop: float, count: int) -> bool:
    """Return whether a number of images can show that the drop is within a limit, if int8 changes as many as usual."""
    changed = TYPICAL_CHANGES * count / 2
    return 100 * largest_difference(changed, changed, count, _risk(1)) <= max_drop


def largest_difference(lost: float, gained: float, count: int, risk: float) -> float:
    """Return the upper confidence limit of the difference between two proportions of the same samples.

    This inverts McNemar's test, as in Tango, "Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design" (1998).

    Args:
        lost: Samples that are correct only before.
        gained: Samples that are correct only after.
        count: All samples.
        risk: Probability that the true difference is larger than the limit.
    """
    z = NormalDist().inv_cdf(1 - risk)

    def excess(difference: float) -> float:
        # the likeliest share of gained samples if that were the true difference
        a = 2 * count
        b = (a - lost + gained) * difference - lost - gained
        c = -gained * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = max(2 * share + difference * (1 - difference), 0.0)
        return count * difference - (lost - gained) - z * math.sqrt(count * variance)

    low, high = (lost - gained) / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return high


def _risk(test: int) -> float:
    """Return the risk that a test may take: those of any number of tests add up to less than 5 %."""
    return (1 - CONFIDENCE) / (test * (test + 1))


def _check(model: nn.Module, int8: Int8, tests: list[Accuracy]) -> Check:
    """Return a function that scores a model: by its logits for some calibration images, else by a test of accuracy.

    NNCF ranks layers by the former, and returns them to float32 until the score in the latter is 0. The accuracy of
    each test is appended to `tests`. The held-out images are only used in the tests, so that the choice of layers does
    not depend on them.
    """
    with torch.inference_mode():
        expected = torch.cat([model(part) for part in torch.split(int8.calibration, 32)])

    def check(run: "Run", indices: Sequence[int]) -> tuple[float, list[float]]:
        scores = [-_squared_error(run(int8.calibration[i : i + 1]), expected[i : i + 1]) for i in indices]
        if len(indices) < len(expected):
            return sum(scores) / len(scores), scores
        if not tests and min(scores) > -1e-8:  # the file before quantization
            return 0.0, scores
        found = replace(_compare(model, run, int8), test=len(tests) + 1)
        tests.append(found)
        _logger.info(
            "int8 test %d: accuracy drops by %.2f points (upper confidence limit: %.2f)",
            found.test,
            found.drop,
            found.largest_drop,
        )
        if found.within(int8.max_drop):
            return 0.0, scores
        drop = found.largest_drop if can_show(int8.max_drop, found.count) else found.drop
        return int8.max_drop - drop, scores

    return check


def _squared_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).double().square().sum() / expected.double().square().sum().clamp_min(1e-30))


@torch.inference_mode()
def _compare(model: nn.Module, run: "Run", int8: Int8) -> Accuracy:
    """Classify the readable held-out images with torch and with the exported file."""
    before = after = lost = count = 0
    difference = norm = 0.0
    for batch in int8.samples.batches(32, 0, 1, 0, False):
        unreadable = {entry.index for entry in batch.unreadable}
        readable = torch.tensor([index not in unreadable for index in batch.indices.tolist()])
        expected, logits = model(batch.images)[readable], run(batch.images)[readable]
        labels = batch.labels[readable]
        correct, still_correct = expected.argmax(1) == labels, logits.argmax(1) == labels
        before += int(correct.sum())
        after += int(still_correct.sum())
        lost += int((correct & ~still_correct).sum())
        count += len(labels)
        difference += float((logits - expected).double().square().sum())
        norm += float(expected.double().square().sum())
    if count == 0:
        raise RunError(
            "all held-out images are unreadable, so the accuracy in int8 cannot be measured; no file was written"
        )
    error = math.sqrt(difference / (norm or 1.0))
    return Accuracy(before=before, after=after, lost=lost, count=count, relative_error=error)
