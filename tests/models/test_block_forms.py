"""The three equivalent blocks of the paper (Figure 3): `Bottleneck` implements the third."""

import torch
from pytest import mark
from torch import nn
from torch.nn import functional as F

from resnext_hub.models import Bottleneck

IN, STAGE, D = 256, 64, 4


def grouped(block: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    """Compute Figure 3(c), the implemented block."""
    return block(x)


def paths(block: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    """Compute Figure 3(a): a sum of C paths of 1x1, 3x3 and 1x1 at width d, then the last norm and the shortcut.

    Batch norm treats channels independently, so the norm of a path is a slice of the block's.
    """
    groups, stride = block.conv2.groups, block.conv2.stride
    total = torch.zeros(())
    for c in range(groups):
        part = slice(c * D, (c + 1) * D)
        y = F.relu(norm(block.bn1, part, F.conv2d(x, block.conv1.weight[part])))
        y = F.relu(norm(block.bn2, part, F.conv2d(y, block.conv2.weight[part], stride=stride, padding=1)))
        total = total + F.conv2d(y, block.conv3.weight[:, part])
    return finish(block, x, total)


def early_concatenation(block: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    """Compute Figure 3(b): C paths of 1x1 and 3x3, concatenated before a 1x1."""
    groups, stride = block.conv2.groups, block.conv2.stride
    outputs = []
    for c in range(groups):
        part = slice(c * D, (c + 1) * D)
        y = F.relu(norm(block.bn1, part, F.conv2d(x, block.conv1.weight[part])))
        outputs.append(F.relu(norm(block.bn2, part, F.conv2d(y, block.conv2.weight[part], stride=stride, padding=1))))
    return finish(block, x, F.conv2d(torch.cat(outputs, dim=1), block.conv3.weight))


def norm(layer: nn.BatchNorm2d, part: slice, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, None, None, layer.weight[part], layer.bias[part], training=True, eps=layer.eps)


def finish(block: Bottleneck, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    shortcut = x if block.downsample is None else block.downsample(x)
    return F.relu(block.bn3(residual) + shortcut)


@mark.parametrize("variant", [paths, early_concatenation])
@mark.parametrize(("stride", "project"), [(1, False), (2, True)])
def test_the_three_blocks_have_the_same_outputs_and_gradients(variant: object, stride: int, project: bool) -> None:
    torch.manual_seed(0)
    block = Bottleneck(IN, STAGE, stride=stride, cardinality=32, base_width=D, project=project, dtype=torch.float64)
    for layer in (block.bn1, block.bn2, block.bn3):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    results = []
    for compute in (grouped, variant):
        x = torch.randn(
            2, IN, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
        )
        block.zero_grad()
        output = compute(block, x)
        (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
        results.append((output, x.grad, {name: p.grad.clone() for name, p in block.named_parameters()}))
    (output, of_input, of_weights), (other, other_of_input, other_of_weights) = results
    assert output.std() > 0.1
    # the same sums in another order, in float64
    torch.testing.assert_close(other, output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other_of_input, of_input, rtol=1e-9, atol=1e-11)
    for name, gradient in of_weights.items():
        torch.testing.assert_close(other_of_weights[name], gradient, rtol=1e-9, atol=1e-10, msg=name)
