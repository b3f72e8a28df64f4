"""The training loss."""

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

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy for images `(N, C, H, W)` and labels `(N,)` or soft targets `(N, classes)`."""
        return F.cross_entropy(self.model(images).float(), labels, label_smoothing=self.label_smoothing)
