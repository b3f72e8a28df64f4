"""The model is equal to timm's and torchvision's, and registered with timm."""

import timm
import torch
import torchvision
from pytest import mark, raises
from timm.models import get_pretrained_cfg, list_pretrained

from resnext_hub.models import VARIANTS, stock_architecture
from resnext_hub.models.resnext import ResNeXt

STOCK = [name for name, variant in VARIANTS.items() if stock_architecture(variant) is not None]


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Set random weights and statistics of all norm layers, because residual branches are initially zero."""
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
def test_logits_equal_timm_and_torchvision_bit_for_bit_from_one_state_dict() -> None:
    torch.manual_seed(0)
    ours = randomized(timm.create_model("resnext_g32"))
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
def test_dilated_models_equal_timms(output_stride: int) -> None:
    ours = randomized(timm.create_model("resnext_g32", output_stride=output_stride, num_classes=5))
    timms = timm.create_model("resnext50_32x4d", output_stride=output_stride, num_classes=5).eval()
    timms.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), timms(images))


def test_stock_timm_can_build_all_but_the_cifar_models() -> None:
    assert set(VARIANTS) - set(STOCK) == {name for name, variant in VARIANTS.items() if variant.small_stem}


@mark.parametrize("name", STOCK)
def test_stock_timm_builds_a_model_with_the_same_tensors(name: str) -> None:
    stock = stock_architecture(VARIANTS[name])
    assert stock is not None
    with torch.device("meta"):
        ours, timms = timm.create_model(name), timm.create_model(stock.name, **stock.model_args)
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (ours, timms)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    convs = [
        [(m.groups, m.stride) for m in model.modules() if isinstance(m, torch.nn.Conv2d)] for model in (ours, timms)
    ]
    assert convs[0] == convs[1]


@mark.parametrize("name", ["resnext_g1", "resnext_g8", "resnext26_g32", "resnext101_g2_w64"])
@torch.inference_mode()
def test_stock_timm_computes_the_same_logits_from_the_portable_architecture(name: str) -> None:
    stock = stock_architecture(VARIANTS[name])
    assert stock is not None
    ours = randomized(timm.create_model(name, num_classes=5))
    timms = timm.create_model(stock.name, num_classes=5, **stock.model_args).eval()
    timms.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), timms(images))


def test_gradients_equal_timms_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours = randomized(timm.create_model("resnext_g8", num_classes=5)).train()
    timms = timm.create_model("resnext50_32x4d", cardinality=8, base_width=14, num_classes=5).train()
    timms.load_state_dict(ours.state_dict())
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    for model in (ours, timms):
        torch.nn.functional.cross_entropy(model(images), labels).backward()
    for (name, mine), (_, theirs) in zip(ours.named_parameters(), timms.named_parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_released_weights_keep_timms_id_license_and_origin() -> None:
    assert get_pretrained_cfg("resnext_g32").hf_hub_id == "timm/resnext50_32x4d.a1h_in1k"
    for ours, theirs in (
        ("resnext_g32", "resnext50_32x4d"),
        ("resnext_g1", "resnet50"),
        ("resnext101_g1", "resnet101"),
        ("resnext101_g32", "resnext101_32x4d"),
        ("resnext101_g64_w4", "resnext101_64x4d"),
        ("resnext101_g32_w8", "resnext101_32x8d"),
    ):
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


def test_variants_without_released_weights_have_none() -> None:
    assert list_pretrained("resnext_g8*") == []
    with raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("resnext_g8", pretrained=True)


def test_feature_maps_have_the_stated_channels_and_reductions() -> None:
    model = timm.create_model("resnext_g4", features_only=True)
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]


@mark.parametrize(
    "name", ["act_layer", "norm_layer", "aa_layer", "stem_width", "drop_block_rate", "small_stem", "nonsense"]
)
def test_an_argument_of_other_models_is_refused_by_name(name: str) -> None:
    with raises(
        TypeError, match=f"resnext_g32 does not accept {name}; expected layers, num_classes, in_chans, cardinality"
    ):
        timm.create_model("resnext_g32", **{name: "silu"})


@mark.parametrize(
    ("name", "value"),
    [
        ("cardinality", 0),
        ("cardinality", "32"),
        ("cardinality", True),
        ("base_width", -4),
        ("base_width", 2_000_000),
        ("base_width", 4.5),
        ("num_classes", -1),
        ("num_classes", 10**12),
        ("in_chans", 0),
        ("drop_rate", 1.0),
        ("drop_path_rate", float("nan")),
        ("output_stride", 7),
        ("layers", (10**7, 1, 1)),
        ("layers", (1, 0, 1)),
        ("layers", 10**7),
        ("layers", "abc"),
    ],
)
def test_an_argument_outside_its_range_is_refused_by_name_before_allocating(name: str, value: object) -> None:
    arguments = {"layers": (1, 1, 1)} | {name: value}
    with raises(ValueError, match=f"^{name}="):
        ResNeXt(**arguments)  # type: ignore[arg-type]
    with raises(ValueError, match="gives 524,288 channels"):
        ResNeXt((1, 1, 1, 1), cardinality=1024, base_width=64)
