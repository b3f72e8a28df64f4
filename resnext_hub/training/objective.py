"""The training loss and accuracy."""

import torch
from torch import nn
from torch.nn import functional as F


class Objective(nn.Module):
    """Model and loss in one module, so that wrappers for autocast and data parallelism do not touch the model itself.

    Args:
        model: The training view of the model.
        label_smoothing: Fraction of the target that is spread over all classes, 0 to 1.
    """

    def __init__(self, model: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean cross entropy and the top-1 accuracy, both scalars.

        Args:
            images: Images `(N, C, H, W)`.
            labels: Labels `(N,)`, or soft targets `(N, classes)`, of which the largest one is the label.
        """
        logits = self.model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
        return loss, (logits.detach().argmax(dim=1) == classes).float().mean()
