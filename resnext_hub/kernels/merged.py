"""Grouped convolution with neighbouring groups merged into wider ones: the same function, on shapes that run faster.

A convolution of g groups computes, for each group by itself, d outputs from d inputs. Merging k neighbours gives g/k
groups whose weights are block-diagonal: each output still sees its own d inputs and zeros for the others. In exact
arithmetic nothing changes; in floating point the added zeros leave every partial sum as it is, but the order of the
sums may be another one, and an infinite or undefined input spreads over its merged group.

The parameters stay those of the grouped form, so state dicts, optimizers and published files never notice.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def merge_weight(weight: torch.Tensor, groups: int, factor: int) -> torch.Tensor:
    """Lay out the weight of a grouped convolution for fewer, wider groups; differentiable.

    Args:
        weight: `(out_channels, in_channels / groups, kH, kW)`.
        groups: Groups that the weight is for.
        factor: How many neighbouring groups become one.

    Returns:
        `(out_channels, factor * in_channels / groups, kH, kW)`, for `groups / factor` groups.

    Raises:
        ValueError: If the factor does not divide the groups.
    """
    if factor < 1 or groups % factor:
        raise ValueError(f"factor={factor} does not divide groups={groups}")
    if factor == 1:
        return weight
    out_channels, width, *kernel = weight.shape
    blocks = weight.view(groups // factor, factor, out_channels // groups, width, *kernel)
    # (merged group, block row, outputs, block column, inputs, kH, kW): a block stands where row and column are equal
    merged = torch.diag_embed(blocks.movedim(1, -1)).movedim((-2, -1), (1, 3))
    return merged.reshape(out_channels, factor * width, *kernel)


class MergedConv2d(nn.Conv2d):
    """A grouped convolution that computes with merged groups; its parameters are those of the grouped one.

    Args:
        conv: The grouped convolution, whose parameters are shared.
        factor: How many neighbouring groups become one.
    """

    def __init__(self, conv: nn.Conv2d, factor: int) -> None:
        super().__init__(**conv_arguments(conv))
        self.weight, self.bias = conv.weight, conv.bias
        self.merge_factor = factor
        self.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H', W')`."""
        weight = merge_weight(self.weight, self.groups, self.merge_factor)
        groups = self.groups // self.merge_factor
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, groups)


def dense_form(conv: nn.Conv2d, factor: int) -> nn.Conv2d:
    """Give a convolution of its own with merged groups laid out for good: for inference, where weights stay.

    Args:
        conv: The grouped convolution; it is not changed.
        factor: How many neighbouring groups become one.
    """
    weight = merge_weight(conv.weight.detach(), conv.groups, factor)
    merged = nn.Conv2d(**conv_arguments(conv) | {"groups": conv.groups // factor})
    merged.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    merged.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
    return merged.train(conv.training)


def grouped_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Give the convolutions of a network that have groups of more than one channel, by name.

    Depthwise convolutions are left out: they have kernels of their own, which merging would lose. So are subclasses,
    which compute something else, and those with hooks, which stay with the module that they are on.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Conv2d, MergedConv2d)
        and module.groups > 1
        and module.in_channels > module.groups
        and module.padding_mode == "zeros"
        and not (module._forward_hooks or module._forward_pre_hooks)
    }


def merge_factors(conv: nn.Conv2d, widest: int = 64) -> list[int]:
    """Give the factors by which the groups of a convolution can be merged up to a width in input channels, 1 first."""
    width = conv.in_channels // conv.groups
    return [k for k in range(1, conv.groups + 1) if conv.groups % k == 0 and (k == 1 or k * width <= widest)]


def merge_groups(model: nn.Module, factors: Mapping[str, int]) -> nn.Module:
    """Let convolutions of a network compute with merged groups, in place; a factor of 1 takes that back.

    Parameters, their names and their values stay what they are, so that training goes on with them.

    Args:
        model: Any network.
        factors: By the name of a grouped convolution, how many neighbouring groups become one.

    Returns:
        The network.

    Raises:
        ValueError: If there is no such grouped convolution, or a factor does not divide its groups.
    """
    known = grouped_convolutions(model)
    check_factors(known, factors)
    for name, factor in factors.items():
        replace_module(model, name, MergedConv2d(known[name], factor))
    return model


def check_factors(convolutions: Mapping[str, nn.Conv2d], factors: Mapping[str, int]) -> None:
    """Refuse factors for what is no grouped convolution, or that do not divide its groups.

    Raises:
        ValueError: If there are any.
    """
    for name, factor in factors.items():
        if name not in convolutions:
            there = ", ".join(convolutions) or "none"
            raise ValueError(f"{name} is no grouped convolution of the network; there are {there}")
        if factor < 1 or convolutions[name].groups % factor:
            raise ValueError(f"{name}: factor={factor} does not divide groups={convolutions[name].groups}")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, in place."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """Give the arguments that build a convolution of the same shape, on the meta device."""
    return dict(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",  # nothing is allocated: the parameters come from elsewhere
    )
