"""The formulas agree with built models and with the paper."""

import re
from collections.abc import Callable

import timm
import torch
from pytest import approx, mark, raises

from resnext_hub.models import VARIANTS, Variant
from resnext_hub.models.complexity import (
    Complexity,
    block_parameters,
    complexity_of,
    grouped_conv_parameters,
    preserving_width,
)

# Million parameters and giga multiply-adds at 224 px and 1000 classes, counted on timm's models of the same setting.
COUNTED = {
    "resnext_g1": (25.557, 4.089),
    "resnext_g2": (25.425, 4.125),
    "resnext_g4": (25.293, 4.160),
    "resnext_g8": (25.603, 4.267),
    "resnext_g32": (25.029, 4.230),
    "resnext101_g1": (44.549, 7.801),
    "resnext101_g2": (44.456, 7.844),
    "resnext101_g4": (44.363, 7.886),
    "resnext101_g8": (45.104, 8.077),
    "resnext101_g32": (44.178, 7.970),
    "resnext101_g1_w100": (85.611, 15.273),
    "resnext101_g2_w64": (84.198, 15.123),
    "resnext101_g64_w4": (83.455, 15.460),
    "resnext101_g32_w8": (88.791, 16.414),
    "resnext200_g1": (64.674, 15.007),
}


def counted(name: str, size: int, **kwargs: int) -> tuple[int, int, int]:
    """Count parameters, multiply-adds and activations of a model on the meta device."""
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
        images = torch.empty(1, model.in_chans, size, size)
    macs = activations = 0

    def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal macs, activations
        places = output.shape[2] * output.shape[3] if output.ndim == 4 else 1
        macs += module.weight.numel() * places
        activations += output.numel()

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    model(images)
    return sum(p.numel() for p in model.parameters()), macs, activations


@mark.parametrize("name", VARIANTS)
@mark.parametrize("size", [64, 224, 225])
def test_formulas_equal_the_counts_of_built_models(name: str, size: int) -> None:
    classes = 10 if VARIANTS[name].small_stem else 1000
    found = complexity_of(VARIANTS[name], size, classes)
    assert (found.parameters, found.macs, found.activations) == counted(name, size)


@mark.parametrize("name", COUNTED)
def test_formulas_equal_the_known_figures_of_timms_models(name: str) -> None:
    found = complexity_of(VARIANTS[name])
    assert (round(found.parameters / 1e6, 3), round(found.macs / 1e9, 3)) == COUNTED[name]


def test_cifar_models_have_the_parameters_of_the_paper() -> None:
    assert round(complexity_of(VARIANTS["resnext29_g8_w64"]).parameters / 1e6, 2) == 34.43
    assert round(complexity_of(VARIANTS["resnext29_g16_w64"]).parameters / 1e6, 2) == 68.16


def test_other_classes_and_channels_are_counted() -> None:
    variant = VARIANTS["resnext_g8"]
    found = complexity_of(variant, 96, num_classes=7, in_chans=1)
    assert (found.parameters, found.macs, found.activations) == counted("resnext_g8", 96, num_classes=7, in_chans=1)


def test_a_grouped_convolution_has_fewer_weights_by_the_number_of_groups() -> None:
    for groups in (1, 2, 32):
        conv = torch.nn.Conv2d(64, 128, 3, groups=groups, bias=False)
        assert grouped_conv_parameters(3, 64, 128, groups) == conv.weight.numel() == 9 * 64 * 128 // groups


def test_equation_4_reproduces_table_2_of_the_paper() -> None:
    settings = {1: 64, 2: 40, 4: 24, 8: 14, 32: 4}
    assert [block_parameters(c, d) for c, d in settings.items()] == [69632, 69760, 69888, 71456, 70144]
    assert {c: preserving_width(c) for c in settings} == settings


@mark.parametrize("preserve", ["parameters", "macs"])
@mark.parametrize("cardinality", [2, 8, 16, 32, 64])
def test_the_preserving_width_is_the_closest_one(cardinality: int, preserve: str) -> None:
    reference = VARIANTS["resnext101_g1"]
    width = preserving_width(cardinality, reference, preserve)

    def distance(base_width: int) -> int:
        candidate = Variant(name="", layers=reference.layers, cardinality=cardinality, base_width=base_width)
        return abs(getattr(complexity_of(candidate), preserve) - getattr(complexity_of(reference), preserve))

    assert distance(width) == min(distance(d) for d in range(1, 65))


def test_a_cardinality_that_costs_too_much_is_refused() -> None:
    with raises(ValueError, match="cardinality=4096 needs"):
        preserving_width(4096)


@mark.parametrize("name", ["resnext_g32", "resnext_g1", "resnext29_g32_w4"])
def test_the_memory_estimate_equals_what_autograd_saves(name: str) -> None:
    size, batch = 64, 8  # enough images to hide the statistics of the norm layers, which do not grow with the batch
    model = timm.create_model(name, num_classes=10).train()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.randn(batch, 3, size, size)).sum()  # noqa: F841 - keeps the graph alive, and so the addresses
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    measured = sum(size for address, size in kept.items() if address not in weights)
    assert batch * complexity_of(VARIANTS[name], size, 10).saved * 4 == approx(measured, rel=0.01)


def test_training_memory_includes_weights_gradients_and_optimizer_states() -> None:
    cost = Complexity(parameters=100, macs=0, activations=0, saved=1000)
    assert cost.training_bytes(batch_size=2, optimizer_states=2) == 4 * 100 * 4 + 2 * 1000 * 4
    assert cost.training_bytes(batch_size=2, optimizer_states=1, element_bytes=2) == 4 * 100 * 3 + 2 * 1000 * 2


def test_info_prints_every_variant_with_its_figures(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("info")
    assert code == 0
    rows = {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in out.splitlines()[1:]}
    assert set(rows) == set(VARIANTS)
    assert rows["resnext_g32"][:6] == ["resnext_g32", "32x4d", "50", "224", "25.029", "4.230"]
    assert "22.2" in rows["resnext_g32"]
    code, out, _ = command("info", "resnext_g8", "--image-size", 160)
    assert len(out.splitlines()) == 2


def test_info_finds_the_width_with_the_same_cost(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("info", "--like", "resnet50", "--cardinality", 16)
    assert code == 0
    assert f"cardinality=16, base_width={preserving_width(16)}" in out
    code, _, err = command("info", "--like", "vgg16", "--cardinality", 16)
    assert code == 2
    assert "--like vgg16" in err
    code, _, err = command("info", "resnext_g9")
    assert code == 2
    assert "resnext_g9 is not a variant; closest matches: resnext_g" in err
