"""1x1 convolutions as matrix products, without the overhead of convolution kernels.

A 1x1 convolution multiplies the channels of each pixel by a matrix. In channels_last memory format the input already is
a matrix of pixels, `(N * H * W, C)`. oneDNN reorders the weights of a convolution in each pass, once forward and twice
backward. With large weights and small feature maps, as in the last stages, that takes many times longer than the
arithmetic on a CPU. A matrix product uses the weights as they are.

The parameters stay those of the convolution, so state dicts, optimizers and published files are unaffected.
"""

import torch
from torch import nn
from torch.nn import functional as F

from resnext_hub.kernels.merged import conv_arguments, replace_module


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution computed as a matrix product; it shares the parameters of the original.

    Args:
        conv: A 1x1 convolution without groups or padding.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(**conv_arguments(conv))
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H', W')` in channels_last memory format."""
        rows, columns = self.stride
        pixels = x[:, :, ::rows, ::columns].permute(0, 2, 3, 1)
        # permute before flattening, so the gradient has channels_last strides like the weight
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(pixels, matrix, self.bias).permute(0, 3, 1, 2)


def compute_pointwise_as_products(model: nn.Module) -> nn.Module:
    """Replace the 1x1 convolutions of a model by matrix products, in place; return the model.

    The parameters, their names and their values are unchanged. Subclasses are skipped: they compute something else.
    """
    for name, conv in list(model.named_modules()):
        plain = type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.groups == 1
        if plain and conv.padding == (0, 0):
            replace_module(model, name, PointwiseConv2d(conv))
    return model
