"""The training loss and accuracy."""

import torch
from torch import nn
from torch.nn import functional as F

from resnext_hub.training.plan import Plan


class BinaryObjective(nn.Module):
    """Model and binary cross-entropy in one module, as `Objective`: each class is a question of its own.

    For images that can have several labels, and for mutually exclusive classes as in Wightman et al. (2021, arXiv
    2110.00476).

    Args:
        model: The training view of the model.
        label_smoothing: How far targets are moved from 0 and 1 towards `baseline`, 0 to 1.
        baseline: What smoothing moves targets towards: 1 / 2, or 1 / classes if each image has exactly one.
        exclusive: Whether each image has exactly one class.
    """

    def __init__(
        self, model: nn.Module, label_smoothing: float, baseline: float = 0.5, exclusive: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing, self.baseline, self.exclusive = label_smoothing, baseline, exclusive

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, total: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss over images and classes, and how many images are right, a fraction; both are scalars.

        An image is right if its class has the largest logit, or if all of its labels are right.

        Args:
            images: Images `(N, C, H, W)`.
            labels: Labels `(N,)`, or targets `(N, classes)`, 0 to 1.
            total: Not used, since classes are not weighted.
        """
        logits = self.model(images).float()
        targets = F.one_hot(labels, logits.shape[1]).float() if labels.ndim == 1 else labels
        smoothed = (1 - self.label_smoothing) * targets + self.label_smoothing * self.baseline
        loss = F.binary_cross_entropy_with_logits(logits, smoothed)
        found = logits.detach()
        if self.exclusive:
            right = found.argmax(dim=1) == targets.argmax(dim=1)
        else:
            right = ((found > 0) == (targets > 0.5)).all(dim=1)
        return loss, right.float().mean()


class Objective(nn.Module):
    """Model and loss in one module, so that wrappers for autocast and data parallelism do not touch the model itself.

    Args:
        model: The training view of the model.
        label_smoothing: Fraction of the target that is spread over all classes, 0 to 1.
        class_weights: Weights of the classes, `(classes,)`, or None.
        log_prior: Logarithms of the frequencies of the classes, `(classes,)`, for logit adjustment (Menon et al., 2021,
            arXiv 2007.07314), or None.
        adjustment: The multiple of them that is added to the logits.
    """

    def __init__(
        self,
        model: nn.Module,
        label_smoothing: float,
        class_weights: torch.Tensor | None = None,
        log_prior: torch.Tensor | None = None,
        adjustment: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.class_weights, self.log_prior = class_weights, log_prior
        self.offsets = None if log_prior is None else adjustment * log_prior

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, total: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean cross entropy and the top-1 accuracy, both scalars.

        Args:
            images: Images `(N, C, H, W)`.
            labels: Labels `(N,)`, or soft targets `(N, classes)`, of which the largest one is the label.
            total: The weight to divide the sum of the weighted losses by, a scalar; needed with class weights.
        """
        logits = self.model(images).float()
        if self.class_weights is not None and total is not None:
            # by the true class of an image: torch would also weight the smoothed part, in favor of rare classes
            losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
            loss = (losses * weights_of(labels, self.class_weights)).sum() / total
        elif self.offsets is not None and self.log_prior is not None:
            loss = F.cross_entropy(logits + self.offsets, self._smoothed(labels, self.log_prior.exp()))
        else:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
        return loss, (logits.detach().argmax(dim=1) == classes).float().mean()

    def _smoothed(self, labels: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        """Return targets `(N, classes)` that are smoothed by the frequencies of the classes.

        After the adjustment this is uniform smoothing. If the targets themselves were smoothed uniformly, the bounded
        margin that smoothing leaves would be smaller than the adjustment, and rare classes would always win.
        """
        targets = F.one_hot(labels, len(prior)).float() if labels.ndim == 1 else labels
        return (1 - self.label_smoothing) * targets + self.label_smoothing * prior / prior.sum()


def weights_of(labels: torch.Tensor, class_weights: torch.Tensor) -> torch.Tensor:
    """Return the weight of each label `(N,)` or soft target `(N, classes)`, `(N,)`.

    Args:
        labels: The labels.
        class_weights: Weights of the classes, `(classes,)`.
    """
    return class_weights[labels] if labels.ndim == 1 else labels @ class_weights


def build_objective(plan: Plan, view: nn.Module, device: torch.device) -> Objective | BinaryObjective:
    """Return the objective of a run over the training view of its model."""
    balance, strength = plan.balance, plan.config.balance.logit_adjustment
    smoothing = plan.config.label_smoothing
    assert smoothing is not None
    if plan.splits.is_multi_label:
        return BinaryObjective(view, smoothing)
    if plan.config.loss == "bce":
        return BinaryObjective(view, smoothing, 1 / len(plan.splits.label_names), exclusive=True)
    weights, prior = (
        None if values is None else torch.tensor(values, dtype=torch.float32, device=device)
        for values in (balance.class_weights, balance.log_prior)
    )
    return Objective(view, smoothing, weights, prior, strength)
