"""The training loss."""

import torch
from torch import nn
from torch.nn import functional as F


class Objective(nn.Module):
    """The loss as a module, so that wrappers (autocast, data parallelism) leave the model itself untouched."""

    def __init__(self, model: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Map images `(N, C, H, W)` and labels `(N,)`, or targets `(N, classes)`, to the mean cross entropy."""
        return F.cross_entropy(self.model(images).float(), labels, label_smoothing=self.label_smoothing)
