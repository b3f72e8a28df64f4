"""Grouped convolutions with neighboring groups merged into wider ones, which hardware computes faster.

A convolution with g groups computes d outputs from d inputs in each group. Merging k neighbours yields g/k groups with
block-diagonal weights: each output still depends on its own d inputs, with zero weights for the others. The result is
equal in exact arithmetic. In floating point the order of the sums can differ, and an infinite or NaN input spreads over
its merged group.

The parameters stay those of the grouped convolution, so state dicts, optimizers and published files are unaffected.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def merge_weight(weight: torch.Tensor, groups: int, factor: int) -> torch.Tensor:
    """Return the block-diagonal weight of a grouped convolution for fewer, wider groups; differentiable.

    Args:
        weight: `(out_channels, in_channels / groups, kH, kW)`.
        groups: Number of groups of the weight.
        factor: Number of neighboring groups to merge into one.

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
    # (merged group, block row, outputs, block column, inputs, kH, kW): non-zero where row and column are equal
    merged = torch.diag_embed(blocks.movedim(1, -1)).movedim((-2, -1), (1, 3))
    return merged.reshape(out_channels, factor * width, *kernel)


class MergedConv2d(nn.Conv2d):
    """A grouped convolution that computes with merged groups; it shares the parameters of the original.

    Args:
        conv: The grouped convolution.
        factor: Number of neighboring groups to merge into one.
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


def merge_conv(conv: nn.Conv2d, factor: int) -> nn.Conv2d:
    """Return a new convolution with merged groups and a fixed weight, for inference.

    Args:
        conv: The grouped convolution; it is not changed.
        factor: Number of neighboring groups to merge into one.
    """
    weight = merge_weight(conv.weight.detach(), conv.groups, factor)
    merged = nn.Conv2d(**conv_arguments(conv) | {"groups": conv.groups // factor})
    merged.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    merged.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
    return merged.train(conv.training)


def grouped_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the convolutions of a model with several groups of more than one channel, by name.

    Depthwise convolutions are excluded because merging would bypass their specialized kernels; subclasses because they
    compute something else; and those with hooks because merging would drop the hooks.
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
    """Return the factors by which groups can be merged, up to a width in input channels; 1 comes first."""
    width = conv.in_channels // conv.groups
    return [k for k in range(1, conv.groups + 1) if conv.groups % k == 0 and (k == 1 or k * width <= widest)]


def merge_groups(model: nn.Module, factors: Mapping[str, int]) -> nn.Module:
    """Merge groups of a model's convolutions in place; a factor of 1 undoes it.

    The parameters, their names and their values are unchanged, so training can continue.

    Args:
        model: Any model.
        factors: Number of neighboring groups to merge into one, by the name of a grouped convolution.

    Returns:
        The same model.

    Raises:
        ValueError: If a name is not that of a grouped convolution, or a factor does not divide its groups.
    """
    known = grouped_convolutions(model)
    check_factors(known, factors)
    for name, factor in factors.items():
        replace_module(model, name, MergedConv2d(known[name], factor))
    return model


def check_factors(convolutions: Mapping[str, nn.Conv2d], factors: Mapping[str, int]) -> None:
    """Check that factors name grouped convolutions and divide their groups.

    Raises:
        ValueError: If one does not.
    """
    for name, factor in factors.items():
        if name not in convolutions:
            known = ", ".join(convolutions) or "none"
            raise ValueError(f"{name} is not a grouped convolution of the model; expected one of {known}")
        if factor < 1 or convolutions[name].groups % factor:
            raise ValueError(f"{name}: factor={factor} does not divide groups={convolutions[name].groups}")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule of a model by another module, in place."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """Return the arguments to build a convolution of the same shape on the meta device."""
    return dict(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",  # allocates nothing: the caller sets the parameters
    )
