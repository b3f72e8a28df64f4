"""The training loss and accuracy."""

import torch
from torch import nn
from torch.nn import functional as F

from resnext_hub.training.plan import Plan


class Objective(nn.Module):
    """Model and loss in one module, so that wrappers for autocast and data parallelism do not touch the model itself.

    Args:
        model: The training view of the model.
        label_smoothing: Fraction of the target that is spread over all classes, 0 to 1.
        class_weights: Weights of the classes, `(classes,)`, or None.
        offsets: What to add to the logits, `(classes,)`, or None: logit adjustment (Menon et al., 2021, arXiv
            2007.07314).
    """

    def __init__(
        self,
        model: nn.Module,
        label_smoothing: float,
        class_weights: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.class_weights, self.offsets = class_weights, offsets

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
        adjusted = logits if self.offsets is None else logits + self.offsets
        smoothing = self.label_smoothing
        if self.class_weights is None or total is None:
            loss = F.cross_entropy(adjusted, labels, label_smoothing=smoothing)
        else:
            weights = self.class_weights
            loss = F.cross_entropy(adjusted, labels, weights, label_smoothing=smoothing, reduction="sum") / total
        classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
        return loss, (logits.detach().argmax(dim=1) == classes).float().mean()


def weight_of(labels: torch.Tensor, class_weights: torch.Tensor) -> torch.Tensor:
    """Return the total weight of labels `(N,)` or soft targets `(N, classes)`, a scalar.

    Args:
        labels: The labels.
        class_weights: Weights of the classes, `(classes,)`.
    """
    return class_weights[labels].sum() if labels.ndim == 1 else (labels @ class_weights).sum()


def build_objective(plan: Plan, view: nn.Module, device: torch.device) -> Objective:
    """Return the objective of a run over the training view of its model."""
    balance, strength = plan.balance, plan.config.balance.logit_adjustment
    weights, prior = (
        None if values is None else torch.tensor(values, dtype=torch.float32, device=device)
        for values in (balance.class_weights, balance.log_prior)
    )
    return Objective(view, plan.config.label_smoothing, weights, None if prior is None else strength * prior)
