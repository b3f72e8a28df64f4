"""Random initial values that depend on seed, name and shape of a parameter alone."""

import hashlib
import math

import torch
from torch import nn


def initialize(model: nn.Module, seed: int) -> None:
    """Initialize convolutions and classifier of a model, each from a random generator of its own.

    Two models with the same seed get the same values wherever a parameter has the same name and shape, so a comparison
    of architectures can pair its runs by seed. Distributions are those of `ResNeXt.init_weights` and of `nn.Linear`;
    batch norms keep their values.

    Args:
        model: The model, changed in place.
        seed: Seed of all generators.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            generator = _generator(seed, name, module.weight)
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            generator = _generator(seed, name, module.weight)
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)


def _generator(seed: int, name: str, weight: torch.Tensor) -> torch.Generator:
    key = f"{seed}/{name}/{'x'.join(map(str, weight.shape))}".encode()
    digest = hashlib.sha256(key).digest()
    return torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
