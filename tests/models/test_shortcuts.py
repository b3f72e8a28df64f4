"""Options that studies need, beside the published variants: depth, widths and residual connections."""

import timm
import torch
from pytest import mark, raises

from resnext_hub.models.complexity import complexity_of
from resnext_hub.models.initialize import initialize
from resnext_hub.models.resnext import VARIANTS

NAME = "resnext29_g32_w4"


def small(**arguments: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, layers=[1, 1, 1], channels=[16, 32, 64], **arguments)


@mark.parametrize("name", VARIANTS)
def test_the_option_changes_no_name_count_or_state_dict_of_a_variant(name: str) -> None:
    with torch.device("meta"):
        default, given = timm.create_model(name), timm.create_model(name, shortcuts=True)
    shapes = {key: value.shape for key, value in default.state_dict().items()}
    assert {key: value.shape for key, value in given.state_dict().items()} == shapes
    assert sum(p.numel() for p in default.parameters()) == complexity_of(VARIANTS[name]).parameters
    assert "shortcuts" not in default.default_cfg


def test_without_shortcuts_a_block_returns_its_branch_alone() -> None:
    model = small(shortcuts=False).eval()
    block = model.layer2[0]
    images = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(images)))))
    expected = torch.relu(block.bn3(block.conv3(torch.relu(branch))))
    assert torch.equal(block(images), expected)
    assert all(block.downsample is None for stage in (model.layer1, model.layer2) for block in stage)


def test_without_shortcuts_no_branch_starts_at_zero() -> None:
    assert all(torch.count_nonzero(p) for name, p in small(shortcuts=False).named_parameters() if "bn3.weight" in name)
    assert not any(torch.count_nonzero(p) for name, p in small().named_parameters() if "bn3.weight" in name)


@mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@mark.parametrize("shortcuts", [True, False])
def test_a_model_without_shortcuts_is_scripted_like_one_with_them(shortcuts: bool) -> None:
    model = small(shortcuts=shortcuts).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(torch.jit.script(model)(images), model(images), atol=1e-6)


@mark.parametrize(
    ("arguments", "message"),
    [
        ({"shortcuts": "no"}, "shortcuts='no': expected True or False"),
        ({"group_widths": [1, 2]}, "expected a number of channels for each of the 3 stages"),
        ({"channels": [16, 32, 64, 128]}, "expected a number of channels for each of the 3 stages"),
        ({"layers": [1, 1]}, "expected a number of blocks for each of three or four stages"),
        ({"group_widths": [1, 2, 0]}, "group_widths=0"),
        ({"group_widths": [1, 2, 9000], "cardinality": 32}, "group_widths=.* gives 288,000 channels"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with raises(ValueError, match=message):
        timm.create_model(NAME, **arguments)


def test_four_stages_of_other_widths_are_stock_timms_model() -> None:
    arguments = {"layers": [2, 1, 1, 1], "channels": [16, 32, 64, 128], "cardinality": 8, "base_width": 14}
    ours, stock = timm.create_model("resnext_g32", **arguments), timm.create_model("resnext50_32x4d", **arguments)
    stock.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours.eval()(images), stock.eval()(images), atol=1e-5)


def test_initial_values_depend_on_seed_name_and_shape_alone() -> None:
    narrow, wide = small(cardinality=1, base_width=64), small(cardinality=2, base_width=64)
    for model in (narrow, wide):
        torch.manual_seed(torch.randint(1000, ()).item())
        initialize(model, 7)
    equal = {
        name
        for name, value in narrow.named_parameters()
        if value.shape == wide.get_parameter(name).shape and torch.equal(value, wide.get_parameter(name))
    }
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "fc.weight", "fc.bias"} <= equal
    other = small(cardinality=1, base_width=64)
    initialize(other, 8)
    assert not torch.equal(other.conv1.weight, narrow.conv1.weight)
    assert not torch.equal(narrow.layer2[0].conv3.weight[:, :16], narrow.layer2[0].conv3.weight[:, 16:])


def test_initial_values_have_the_distribution_of_the_model() -> None:
    model = timm.create_model(NAME)
    expected = {name: (p.mean().item(), p.std().item()) for name, p in model.named_parameters() if p.ndim > 1}
    initialize(model, 0)
    for name, parameter in model.named_parameters():
        if name in expected and parameter.numel() > 4000:
            mean, sd = expected[name]
            assert abs(parameter.mean().item() - mean) < 0.1 * sd
            assert abs(parameter.std().item() / sd - 1) < 0.1
