"""Weight averaging with the start of a run (WiSE-FT; Wortsman et al., 2022, arXiv 2109.01903)."""

import copy

import torch
from torch import nn


class StartAverage:
    """The average of trained weights and those at the start, batch norm statistics included.

    Args:
        fraction: Fraction of the start, at least 0 and below 1.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.start: dict[str, torch.Tensor] | None = None
        """The weights at the start, on the CPU; None until they are kept."""
        self._averaged: nn.Module | None = None

    def keep_start(self, model: nn.Module) -> None:
        """Keep the current weights of a model as the start, unless there is one already."""
        if self.start is None:
            self.start = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def of(self, model: nn.Module) -> nn.Module:
        """Return a model with the average of a model's weights and those at the start; counters are the model's.

        The same module is returned, and changed, by the next call. Before there is a start, it is the model itself.
        """
        if self.start is None:
            return model
        if self._averaged is None:
            self._averaged = copy.deepcopy(model)
        for name, tensor in self._averaged.state_dict().items():
            tensor.copy_(model.state_dict()[name])
            if tensor.is_floating_point():
                tensor.lerp_(self.start[name].to(tensor.device), self.fraction)
        return self._averaged
