"""The network: the paper's block, timm's names, and timm's registry."""

import timm
import torch
import torchvision
from pytest import mark, raises
from timm.models import get_pretrained_cfg, list_pretrained

from resnext_hub.models import VARIANTS, stock_architecture

# Million parameters of the five 50-layer settings (paper, Table 3, counted).
PARAMETERS = {
    "resnext_g1": 25.557,
    "resnext_g2": 25.425,
    "resnext_g4": 25.293,
    "resnext_g8": 25.603,
    "resnext_g32": 25.029,
}


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Give every norm layer weights and statistics that matter: at the start the residual branches are zero."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.2, 0.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.5, 0.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


@torch.inference_mode()
def test_logits_equal_timm_and_torchvision_to_the_bit_from_one_state_dict() -> None:
    torch.manual_seed(0)
    ours = lively(timm.create_model("resnext_g32"))
    timms = timm.create_model("resnext50_32x4d").eval()
    torchvisions = torchvision.models.resnext50_32x4d().eval()
    timms.load_state_dict(ours.state_dict())
    torchvisions.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 96, 96)
    logits = ours(images)
    assert logits.std() > 0.1
    assert torch.equal(logits, timms(images))
    assert torch.equal(logits, torchvisions(images))


@mark.parametrize("output_stride", [8, 16])
@torch.inference_mode()
def test_dilated_networks_equal_timms(output_stride: int) -> None:
    ours = lively(timm.create_model("resnext_g32", output_stride=output_stride, num_classes=5))
    timms = timm.create_model("resnext50_32x4d", output_stride=output_stride, num_classes=5).eval()
    timms.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), timms(images))


@mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_stock_timm_builds_the_same_network_from_the_portable_description(name: str) -> None:
    stock = stock_architecture(VARIANTS[name])
    assert stock is not None
    ours = lively(timm.create_model(name, num_classes=5))
    timms = timm.create_model(stock.name, num_classes=5, **stock.model_args).eval()
    timms.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), timms(images))


@mark.parametrize("name", VARIANTS)
def test_parameters_are_the_papers(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == PARAMETERS[name]


def test_gradients_equal_timms_to_the_bit() -> None:
    torch.manual_seed(0)
    ours = lively(timm.create_model("resnext_g8", num_classes=5)).train()
    timms = timm.create_model("resnext50_32x4d", cardinality=8, base_width=14, num_classes=5).train()
    timms.load_state_dict(ours.state_dict())
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    for model in (ours, timms):
        torch.nn.functional.cross_entropy(model(images), labels).backward()
    for (name, mine), (_, theirs) in zip(ours.named_parameters(), timms.named_parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_variants_are_listed_and_replace_no_name_of_timms() -> None:
    assert set(timm.list_models("resnext_g*")) == set(VARIANTS)
    for name in VARIANTS:
        assert timm.models.model_entrypoint(name).__module__.startswith("resnext_hub.")
        assert timm.models.model_entrypoint(name).__doc__


def test_released_weights_keep_timms_id_licence_and_origin() -> None:
    assert get_pretrained_cfg("resnext_g32").hf_hub_id == "timm/resnext50_32x4d.a1h_in1k"
    for ours, theirs in (("resnext_g32", "resnext50_32x4d"), ("resnext_g1", "resnet50")):
        tags = [name.partition(".")[2] for name in list_pretrained(f"{theirs}.*")]
        assert [name.partition(".")[2] for name in list_pretrained(f"{ours}.*")] == tags
        for tag in tags:
            mine, their = get_pretrained_cfg(f"{ours}.{tag}"), get_pretrained_cfg(f"{theirs}.{tag}")
            assert mine.hf_hub_id == f"timm/{theirs}.{tag}"
            assert mine.url is None
            for key in ("license", "origin_url", "paper_ids", "input_size", "mean", "std", "crop_pct", "interpolation"):
                assert getattr(mine, key) == getattr(their, key), (tag, key)
    assert get_pretrained_cfg("resnext_g32.tv_in1k").license == "bsd-3-clause"
    assert get_pretrained_cfg("resnext_g32.fb_swsl_ig1b_ft_in1k").license == "cc-by-nc-4.0"


def test_settings_without_released_weights_have_none() -> None:
    assert list_pretrained("resnext_g8*") == []
    with raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("resnext_g8", pretrained=True)


def test_feature_maps_have_the_stated_channels_and_reductions() -> None:
    model = timm.create_model("resnext_g4", features_only=True)
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]


def test_impossible_settings_are_refused_with_their_values() -> None:
    with raises(ValueError, match="output_stride=7"):
        timm.create_model("resnext_g32", output_stride=7)
    with raises(ValueError, match=r"cardinality=64 with base_width=0"):
        timm.create_model("resnext_g32", cardinality=64, base_width=0)
    with raises(ValueError, match="cardinality=0"):
        timm.create_model("resnext_g32", cardinality=0)
