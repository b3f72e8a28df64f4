"""Fine-tuning: which parameters are trained, from when on, and with which learning rates."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnext_hub.errors import RequestError, setting
from resnext_hub.models.saved import classifier_names
from resnext_hub.settings import FREE, Range, check_fields, shown


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning."""

    freeze: str = "none"
    """Parameters to freeze: none; head (all except the classifier, as in linear probing); bn (the batch norm layers);
    or a number of stages, counting the stem as the first. Frozen batch norm layers use their running statistics."""
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Layer-wise learning rate decay, above 0 and at most 1: the learning rate of each group of layers (as defined by
    timm) is this multiple of the learning rate of the next group, and the classifier has the full rate. With 1, all
    groups have the same rate."""
    head_lr: Annotated[float, Range(0, 1000, above=True)] | None = None
    """Peak learning rate of the classifier; if not given, the same as for the other layers (--lr)."""
    head_epochs: Annotated[float, Range(0, 1_000_000)] = 0.0
    """Number of epochs at the beginning of the run in which only the classifier is trained (LP-FT; Kumar et al., 2022).
    These epochs and the rest of the run each have their own warmup and cosine decay."""
    fit_head: bool = False
    """Before the first step, fit the classifier by logistic regression on the features of the training images, which
    are computed once; with --epochs 0, nothing else is trained. The resulting model is evaluated, and it is published
    if training does not improve on it."""
    average_with_start: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Coefficient of the initial weights in a weighted average with the trained weights, at least 0 and below 1
    (WiSE-FT; Wortsman et al., 2022). The average is evaluated and published. The initial weights include the classifier
    that was fitted by --fit-head or trained during --head-epochs."""
    early_stopping: Annotated[int, Range(1, 1_000_000)] | None = field(default=None, metadata=FREE)
    """Stop the run after this many consecutive evaluations without an improvement in the --best-by metric; never if not
    given."""
    early_stopping_delta: Annotated[float, Range(0, 1_000_000)] = field(default=0.0, metadata=FREE)
    """With --early-stopping: smallest difference that counts as an improvement, in the unit of the metric (accuracy is
    a fraction from 0 to 1)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not re.fullmatch(r"none|head|bn|[1-9]\d{0,2}", self.freeze):
            raise RequestError(
                f"{setting('freeze', shown(self.freeze))}: expected none, head, bn or a number of stages, such as 2"
            )
        if self.freeze == "head" and self.head_epochs:
            raise RequestError(
                f"{setting('head_epochs', self.head_epochs)} has no effect with {setting('freeze', 'head')}, which "
                "trains only the classifier throughout the run; omit one of them"
            )
        if self.fit_head and self.head_epochs:
            raise RequestError(
                f"{setting('fit_head', True)} and {setting('head_epochs', self.head_epochs)} both train the classifier "
                "first; omit one of them"
            )

    def check_model(self, model: nn.Module, pretrained: bool) -> None:
        """Check that a model has the parts that are named here.

        Args:
            model: The model, with or without values.
            pretrained: Whether it starts from pretrained weights.

        Raises:
            RequestError: If it has no such parts, or they would be kept at random values.
        """
        used: list[tuple[str, Any]] = [("freeze", self.freeze)] if self.freeze != "none" else []
        used += [("head_epochs", self.head_epochs)] if self.head_epochs else []
        used += [("fit_head", True)] if self.fit_head else []
        freezes = len(used) > 0
        name, value = used[0] if used else ("freeze", self.freeze)
        if freezes and not pretrained:
            raise RequestError(
                f"{setting(name, value)} freezes layers at their initial values, which are random here; add "
                f"{setting('pretrained', True)}, or omit {setting(name)}"
            )
        if freezes and not classifier_names(model):
            raise RequestError(f"{setting(name, value)}: the model has no separate classifier layer to train")
        if self.fit_head and not has_linear_classifier(model):
            raise RequestError(f"{setting('fit_head', True)} needs a model with a single linear classifier; omit it")
        if self.average_with_start and not pretrained:
            raise RequestError(
                f"{setting('average_with_start', self.average_with_start)} averages with initial weights, which are "
                f"random here; add {setting('pretrained', True)}, or omit {setting('average_with_start')}"
            )
        if self.freeze == "bn" and not _batch_norms(model):
            raise RequestError(f"{setting('freeze', 'bn')}: the model has no batch norm layers; omit it")
        if self.freeze.isdigit() and int(self.freeze) > len(_stages(model)):
            raise RequestError(
                f"{setting('freeze', self.freeze)}: the model has only {len(_stages(model))} stages before its "
                "classifier; use fewer, or head"
            )

    def frozen(self, model: nn.Module, head_only: bool) -> frozenset[str]:
        """Return the names of the parameters that are not trained.

        Args:
            model: The model.
            head_only: Whether only the classifier is trained at this step, see `head_epochs`.
        """
        names = frozenset(name for name, _ in model.named_parameters())
        if head_only or self.freeze == "head":
            return names - classifier_names(model)
        if self.freeze == "bn":
            return frozenset(_batch_norms(model))
        stages = _stages(model)[: int(self.freeze)] if self.freeze.isdigit() else []
        return frozenset(name for stage in stages for name in stage)


def has_linear_classifier(model: nn.Module) -> bool:
    """Return whether the classifier is a weight and at most one bias, applied to features."""
    shapes = sorted(tuple(model.state_dict()[name].shape) for name in classifier_names(model))
    if not 1 <= len(shapes) <= 2 or not hasattr(model, "forward_head"):
        return False
    weight = shapes[-1]
    return len(weight) in (2, 4) and set(weight[2:]) <= {1} and all(len(other) == 1 for other in shapes[:-1])


def _batch_norms(model: nn.Module) -> list[str]:
    """Return the names of the parameters of batch norm layers."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm))
    return [f"{name}.{own}" for name, layer in layers for own, _ in layer.named_parameters(recurse=False)]


def _stages(model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters of each stage before the classifier, by timm's coarse groups of layers."""
    from timm.models import group_parameters

    matcher: Any = model.group_matcher
    groups: dict[int, list[str]] = group_parameters(model, matcher(coarse=True))
    head = classifier_names(model)
    return [names for _, names in sorted(groups.items()) if not head & set(names)]


def freeze(model: nn.Module, frozen: Iterable[str]) -> None:
    """Set which parameters of a model need gradients."""
    frozen = set(frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def set_training(model: nn.Module) -> None:
    """Put a model into training mode, except for layers none of whose parameters needs gradients.

    These compute as in evaluation, so their batch norm uses, and keeps, its stored statistics.
    """
    model.train()
    for layer in model.children():
        _set_layer(layer)


def _set_layer(layer: nn.Module) -> None:
    parameters = list(layer.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        layer.eval()
        return
    for child in layer.children():
        _set_layer(child)
