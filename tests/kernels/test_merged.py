"""Merged groups compute the same function with the same parameters."""

import timm
import torch
from pytest import mark, raises
from torch import nn

from resnext_hub.kernels.merged import (
    MergedConv2d,
    grouped_convolutions,
    merge_conv,
    merge_factors,
    merge_groups,
    merge_weight,
)

FACTORS = [1, 2, 4, 8]


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return small integers, whose sums of products are exact in float32, in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def grouped(bias: bool = True, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(32, 64, 3, stride=stride, padding=dilation, dilation=dilation, groups=8, bias=bias)
    conv.weight = nn.Parameter(whole_numbers(64, 4, 3, 3, seed=1))
    if conv.bias is not None:
        conv.bias = nn.Parameter(whole_numbers(64, seed=2))
    return conv


@mark.parametrize("factor", FACTORS)
@mark.parametrize(("bias", "stride", "dilation"), [(True, 1, 1), (False, 2, 1), (True, 1, 2)])
def test_outputs_are_equal_bit_for_bit_in_exact_arithmetic(factor: int, bias: bool, stride: int, dilation: int) -> None:
    conv, x = grouped(bias, stride, dilation), whole_numbers(2, 32, 9, 11)
    with torch.no_grad():
        assert torch.equal(MergedConv2d(conv, factor)(x), conv(x))
        assert torch.equal(merge_conv(conv, factor)(x), conv(x))


@mark.parametrize("factor", FACTORS)
def test_gradients_equal_those_of_the_grouped_convolution(factor: int) -> None:
    conv = grouped()
    x, out = whole_numbers(2, 32, 6, 6), whole_numbers(2, 64, 6, 6, seed=5)
    found = []
    for module in (conv, MergedConv2d(conv, factor)):
        given = x.clone().requires_grad_()
        found.append(torch.autograd.grad((module(given) * out).sum(), [given, module.weight, module.bias]))
    for plain, merged in zip(*found, strict=True):
        assert torch.equal(plain, merged)


def test_the_merged_weight_is_block_diagonal() -> None:
    weight = whole_numbers(8, 1, 1, 1) + 10  # four groups of two outputs and one input
    merged = merge_weight(weight, groups=4, factor=2)[:, :, 0, 0]
    w = weight[:, 0, 0, 0]
    zero = torch.tensor(0.0)
    rows = [
        (w[0], zero),
        (w[1], zero),
        (zero, w[2]),
        (zero, w[3]),
        (w[4], zero),
        (w[5], zero),
        (zero, w[6]),
        (zero, w[7]),
    ]
    assert merged.tolist() == [[float(a), float(b)] for a, b in rows]
    with raises(ValueError, match="factor=3 does not divide groups=4"):
        merge_weight(weight, 4, 3)


@mark.parametrize("name", ["resnext26_g32", "seresnext26d_32x4d", "regnety_002"])
def test_a_merged_model_keeps_parameters_and_state_and_computes_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval().double()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    factors = {key: merge_factors(conv)[-1] for key, conv in grouped_convolutions(model).items()}
    assert factors
    assert any(factor > 1 for factor in factors.values())
    assert merge_groups(model, factors) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)  # float64, another order of sums
        merge_groups(model, dict.fromkeys(factors, 1))
        assert torch.equal(model(x), expected)


def test_a_model_trains_the_same_with_merged_groups() -> None:
    found = []
    for factor in (1, 4):
        torch.manual_seed(0)
        model = timm.create_model("resnext26_g32", num_classes=5).double().train()
        merge_groups(model, dict.fromkeys(grouped_convolutions(model), factor))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))
            loss.backward()
            optimizer.step()
        found.append((loss.detach(), model.layer1[0].conv2.weight.detach()))
    for plain, merged in zip(*found, strict=True):
        torch.testing.assert_close(merged, plain, rtol=1e-8, atol=1e-8)  # float64, another order of sums


def test_depthwise_and_plain_convolutions_are_not_merged() -> None:
    model = timm.create_model("mobilenetv3_small_050")
    assert grouped_convolutions(model) == {}
    assert merge_factors(nn.Conv2d(128, 128, 3, groups=32)) == [1, 2, 4, 8, 16]
    with raises(ValueError, match=r"conv1 is not a grouped convolution of the model; expected one of layer1.0.conv2"):
        merge_groups(timm.create_model("resnext26_g32"), {"conv1": 2})
    with raises(ValueError, match=r"layer1.0.conv2: factor=3 does not divide groups=32"):
        merge_groups(timm.create_model("resnext26_g32"), {"layer1.0.conv2": 3})
