"""The parts of an exported file: preprocessing, model, and the step from logits to answers.

They are built one by one, so that the model can be checked and quantized alone, and then joined by the names of their
inputs and outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resnext_hub.export.preprocess import Preprocess
from resnext_hub.models.lookup import LoadedModel
from resnext_hub.models.ood import OodScore
from resnext_hub.models.views import logits_and_features

_SIZE = (48, 40)
"""Height and width of an example image; those of an image can be any."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module with the names of its inputs and outputs."""

    module: nn.Module
    example: tuple[torch.Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: tuple[dict[int, str], ...] = ()
    """For each input, the names of its dynamic axes; only the batch size if not given."""

    @property
    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """For each input, the names of its dynamic axes."""
        return self.dynamic or tuple({0: "batch"} for _ in self.inputs)


def raw_model(model: nn.Module, input_size: Sequence[int]) -> Part:
    """Return a part that maps normalized `images` `(N, C, H, W)` float32 to `logits` `(N, classes)`."""
    return Part(module=model, example=(torch.zeros(2, *input_size),), inputs=("images",), outputs=("logits",))


def all_parts(classifier: LoadedModel, model: nn.Module) -> list[Part]:
    """Return preprocessing, model and answers of a classifier, which follow one another.

    The input is `images` `(N, H, W, 3)` uint8: RGB, upright, of any size. The outputs are `probabilities`
    `(N, classes)` float32; `label` `(N,)` int64, or `labels` `(N, classes)` bool if an image can have several;
    `embedding` `(N, features)` float32, if the architecture has one; and `ood_score` `(N,)` float32, if the model has
    one.

    Args:
        classifier: The classifier.
        model: Its model, or one that computes the same function.
    """
    views = 1 if classifier.tta == "none" else 2
    pixels = torch.zeros(2 * views, *classifier.input.input_size)
    computed = LogitsAndFeatures(model).eval()
    with torch.inference_mode():
        found = computed(pixels)
    embeds = len(found) == 2
    names = ("logits", "features") if embeds else ("logits",)
    ood = classifier.ood if embeds else None
    answers = ["probabilities", "label" if classifier.thresholds is None else "labels"]
    answers += ["embedding"] * embeds + ["ood_score"] * (ood is not None)
    limits = None
    if classifier.thresholds is not None:
        # the temperature moves a threshold as it moves a probability
        stated = torch.tensor(classifier.thresholds, dtype=torch.float64)
        limits = (stated.logit() / classifier.temperature).sigmoid().float()
    return [
        Part(
            module=Views(Preprocess(classifier.input), views).eval(),
            example=(torch.zeros(2, *_SIZE, 3, dtype=torch.uint8),),
            inputs=("images",),
            outputs=("pixels",),
            dynamic=({0: "batch", 1: "height", 2: "width"},),
        ),
        Part(module=computed, example=(pixels,), inputs=("pixels",), outputs=names),
        Part(
            module=Answers(views, classifier.temperature, limits, ood).eval(),
            example=tuple(tensor.clone() for tensor in found),
            inputs=names,
            outputs=tuple(answers),
        ),
    ]


class Views(nn.Module):
    """Maps images to the pixels of their views: the images, followed by their mirror images if there are two views."""

    def __init__(self, preprocess: Preprocess, views: int) -> None:
        super().__init__()
        self.preprocess, self.views = preprocess, views

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images `(N, H, W, 3)` uint8 to `(views * N, C, height, width)` float32."""
        pixels: torch.Tensor = self.preprocess(images)
        return pixels if self.views == 1 else torch.cat([pixels, pixels.flip(-1)])


class LogitsAndFeatures(nn.Module):
    """Maps pixels `(N, C, H, W)` to logits `(N, classes)` and, if the architecture has them, features `(N, F)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return logits, and features where there are any."""
        if not hasattr(self.model, "forward_head"):
            return (self.model(pixels),)
        return logits_and_features(self.model, pixels)


class Answers(nn.Module):
    """Maps the logits of all views to probabilities and labels.

    Args:
        views: Views of an image, whose logits are averaged.
        temperature: Divides the logits.
        thresholds: Lowest probability at which each label is predicted, `(classes,)`, if an image can have several.
        ood: Score of out-of-distribution images, from the logits and features of the first view.
    """

    def __init__(
        self, views: int, temperature: float, thresholds: torch.Tensor | None, ood: OodScore | None = None
    ) -> None:
        super().__init__()
        self.views, self.temperature, self.ood = views, temperature, ood
        self.thresholds: torch.Tensor | None
        self.register_buffer("thresholds", thresholds)

    def forward(self, logits: torch.Tensor, features: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Map logits `(views * N, classes)` and features `(views * N, F)` to the outputs of the file."""
        own = logits
        if self.views > 1:
            own = logits.unflatten(0, (self.views, -1))[0]
            logits = logits.unflatten(0, (self.views, -1)).mean(dim=0)
            features = None if features is None else features.unflatten(0, (self.views, -1))[0]
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.thresholds is None:
            answers: tuple[torch.Tensor, ...] = logits.softmax(dim=1), logits.argmax(dim=1)
        else:
            probabilities = logits.sigmoid()
            answers = probabilities, probabilities >= self.thresholds
        # a copy, because some runtimes do not allow an output that is an input
        if features is not None:
            answers = (*answers, features.clone())
            if self.ood is not None:
                answers = (*answers, self.ood(own, features))
        return answers
