"""1x1 convolution computed as a matrix product: the same function, without what the convolution kernels cost around it.

A 1x1 convolution maps each pixel's channels by one matrix. In memory format channels_last its input is that matrix of
pixels already, `(N * H * W, C)`. oneDNN rearranges the weights of a convolution for each pass, forward and twice
backward, which on a CPU takes many times the arithmetic where the weights are large and the images small, as in the
last stages; a matrix product takes them as they are.

The parameters stay those of the convolution, so state dicts, optimizers and published files never notice.
"""

import torch
from torch import nn
from torch.nn import functional as F

from resnext_hub.kernels.merged import conv_arguments, replace_module


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that computes as a matrix product; its parameters are those of the convolution.

    Args:
        conv: A 1x1 convolution without groups and padding, whose parameters are shared.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(**conv_arguments(conv))
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H', W')`, in memory format channels_last."""
        rows, columns = self.stride
        pixels = x[:, :, ::rows, ::columns].permute(0, 2, 3, 1)
        # permuted before it is flattened, so that the gradient comes in channels_last strides, as the weight lies
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(pixels, matrix, self.bias).permute(0, 3, 1, 2)


def compute_pointwise_as_products(model: nn.Module) -> nn.Module:
    """Let the 1x1 convolutions of a network compute as matrix products, in place; give the network.

    Parameters, their names and their values stay what they are. Subclasses are left out: they compute something else.
    """
    for name, conv in list(model.named_modules()):
        plain = type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.groups == 1
        if plain and conv.padding == (0, 0):
            replace_module(model, name, PointwiseConv2d(conv))
    return model
