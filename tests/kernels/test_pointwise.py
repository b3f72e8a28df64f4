"""1x1 convolutions as matrix products compute the same function with the same parameters."""

import timm
import torch
from pytest import mark
from torch import nn

from resnext_hub.kernels.pointwise import PointwiseConv2d, compute_pointwise_as_products


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return small integers, whose sums of products are exact in float32, in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@mark.parametrize(("stride", "bias"), [(1, True), (2, False), ((2, 3), True)])
def test_outputs_and_gradients_are_equal_bit_for_bit_in_exact_arithmetic(
    stride: int | tuple[int, int], bias: bool, layout: torch.memory_format
) -> None:
    conv = nn.Conv2d(6, 8, 1, stride=stride, bias=bias)
    conv.weight = nn.Parameter(whole_numbers(8, 6, 1, 1, seed=1).contiguous(memory_format=layout))
    if conv.bias is not None:
        conv.bias = nn.Parameter(whole_numbers(8, seed=2))
    x = whole_numbers(2, 6, 7, 5).contiguous(memory_format=layout)
    found = []
    for module in (conv, PointwiseConv2d(conv)):
        given = x.clone().requires_grad_()
        out = module(given)
        gradients = torch.autograd.grad((out * whole_numbers(*out.shape, seed=3)).sum(), [given, *module.parameters()])
        found.append((out, *gradients))
    for plain, product in zip(*found, strict=True):
        assert torch.equal(plain, product)


def test_a_model_keeps_its_parameters_and_their_names() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    before = dict(model.state_dict(keep_vars=True))
    compute_pointwise_as_products(model)
    assert any(isinstance(module, PointwiseConv2d) for module in model.modules())
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())


def test_only_plain_1x1_convolutions_are_replaced() -> None:
    class Other(nn.Conv2d):
        """Computes something else."""

    kept = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1), Other(4, 4, 1)]
    model = nn.Sequential(*kept, nn.Conv2d(4, 4, 1))
    compute_pointwise_as_products(model)
    assert list(model)[:4] == kept
    assert type(model[4]) is PointwiseConv2d
