"""timm's model interface, beyond the checks of timm's own test suite."""

from pathlib import Path

import timm
import torch
from pytest import fixture, importorskip, mark, raises
from safetensors.torch import save_file
from timm.models import group_parameters

from resnext_hub.models import VARIANTS, resnext

SMALL = ("resnext26_g32", "resnext29_g32_w4")
"""A model with each stem, for checks that are too slow on all variants."""


@fixture(params=SMALL)
def name(request) -> str:
    return request.param


def some_images(name: str, count: int = 2) -> torch.Tensor:
    return torch.randn(
        count, 3, *[32 if VARIANTS[name].small_stem else 64] * 2, generator=torch.Generator().manual_seed(0)
    )


@mark.parametrize("variant", VARIANTS)
def test_every_entrypoint_has_a_name_a_docstring_and_this_module(variant: str) -> None:
    entrypoint = timm.models.model_entrypoint(variant)
    assert entrypoint.__name__ == variant
    assert entrypoint.__module__ == "resnext_hub.models.resnext"
    assert f"ResNeXt-{VARIANTS[variant].depth} ({VARIANTS[variant].template})" in entrypoint.__doc__


def test_timm_lists_the_whole_table() -> None:
    assert set(timm.list_models("resnext*_g*")) == set(VARIANTS)
    assert set(timm.list_models(module="resnext")) == set(VARIANTS)


@mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_function_of_the_module(variant: str) -> None:
    assert getattr(resnext, variant) is timm.models.model_entrypoint(variant)
    assert resnext.__all__.count(variant) == 1


def test_a_variant_can_be_imported_and_called() -> None:
    from resnext_hub.models.resnext import resnext29_g32_w4

    model = resnext29_g32_w4(num_classes=3)
    assert isinstance(model, resnext.ResNeXt)
    assert model.fc.out_features == 3
    with raises(ImportError):
        from resnext_hub.models.resnext import resnext_g3  # noqa: F401


@mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_depth_of_its_name(variant: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(variant)
    counted = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len([n for n in counted if "downsample" not in n]) == VARIANTS[variant].depth
    groups = {m.groups for n, m in model.named_modules() if n.endswith("conv2")}
    assert groups == {VARIANTS[variant].cardinality}


def test_other_settings_are_built_by_arguments() -> None:
    model = timm.create_model("resnext_g32", cardinality=16, base_width=8, num_classes=3)
    assert model.layer1[0].conv2.groups == 16
    assert model.layer1[0].conv2.out_channels == 128
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_feature_maps_of_cifar_models_have_reductions_1_1_2_4() -> None:
    model = timm.create_model("resnext29_g32_w4", features_only=True)
    maps = model(torch.randn(1, 3, 32, 32))
    assert model.feature_info.reduction() == [1, 1, 2, 4]
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8)]


@mark.parametrize("indices", [(0,), (1, 3), (2, 3)])
def test_single_feature_maps_can_be_selected(name: str, indices: tuple[int, ...]) -> None:
    whole = timm.create_model(name, features_only=True).eval()
    some = timm.create_model(name, features_only=True, out_indices=indices).eval()
    some.load_state_dict({k: v for k, v in whole.state_dict().items() if k in some.state_dict()})
    images = some_images(name)
    with torch.inference_mode():
        for index, found in zip(indices, some(images), strict=True):
            assert torch.equal(found, whole(images)[index])


@mark.parametrize("output_stride", [8, 16])
def test_dilated_features_keep_their_resolution(output_stride: int) -> None:
    model = timm.create_model("resnext26_g32", features_only=True, output_stride=output_stride)
    maps = model(torch.randn(1, 3, 64, 64))
    assert model.feature_info.reduction()[-1] == output_stride
    assert [64 // m.shape[-1] for m in maps] == model.feature_info.reduction()


def test_gradient_checkpointing_has_the_same_gradients(name: str) -> None:
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3, zero_init_last=False).train()
        model.set_grad_checkpointing(enable)
        model(some_images(name)).square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in results[0].items():
        assert torch.equal(results[1][parameter], gradient), parameter


def test_layer_wise_decay_goes_from_the_classifier_down_to_the_stem(name: str) -> None:
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name, num_classes=3)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["conv1.weight"] == groups["bn1.weight"] == 0
    order = [groups[f"layer{s}.{b}.conv1.weight"] for s, d in enumerate(VARIANTS[name].layers, 1) for b in range(d)]
    assert order == list(range(1, len(order) + 1))
    scales = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    assert (
        scales[id(model.conv1.weight)] < scales[id(model.layer2[0].conv1.weight)] < scales[id(model.fc.weight)] == 1.0
    )


def test_stochastic_depth_grows_with_depth_and_acts_in_training_alone(name: str) -> None:
    model = timm.create_model(name, drop_path_rate=0.4, num_classes=3)
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "drop_path")]
    assert rates[0] == 0.0
    assert abs(rates[-1] - 0.4) < 1e-6
    assert rates == sorted(rates)
    images = some_images(name)
    model.eval()
    assert torch.equal(model(images), model(images))


def test_an_exported_program_returns_the_same_logits_at_another_batch_size(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(model, (some_images(name),), dynamic_shapes={"x": {0: batch}})
    images = some_images(name, 5)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-6)


def test_compile_captures_one_graph(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    with torch.inference_mode():
        explained = torch._dynamo.explain(model)(some_images(name))
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


def test_a_model_is_built_on_the_meta_device(name: str) -> None:
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@mark.parametrize("in_chans", [1, 4])
def test_pretrained_weights_adapt_to_other_channels_and_classes(tmp_path: Path, in_chans: int) -> None:
    source = timm.create_model("resnext_g32")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    model = timm.create_model(
        "resnext_g32",
        pretrained=True,
        pretrained_cfg_overlay={"file": file, "hf_hub_id": None},
        in_chans=in_chans,
        num_classes=5,
    )
    assert model.conv1.in_channels == in_chans
    if in_chans == 1:  # timm sums the colors
        torch.testing.assert_close(model.conv1.weight, source.conv1.weight.sum(dim=1, keepdim=True))
    assert torch.equal(model.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    assert model.eval()(torch.randn(1, in_chans, 32, 32)).shape == (1, 5)


def test_impossible_settings_are_refused_with_their_values(name: str) -> None:
    with raises(ValueError, match="output_stride=7"):
        timm.create_model(name, output_stride=7)
    with raises(ValueError, match="base_width=0: expected a whole number from 1"):
        timm.create_model(name, cardinality=64, base_width=0)
    with raises(ValueError, match="cardinality=0"):
        timm.create_model(name, cardinality=0)
    model = timm.create_model(name).eval()
    size = model.stride - 1
    with raises(AssertionError, match=f"an image of height {size} is smaller than the stride {model.stride}"):
        model(torch.randn(1, 3, size, 64))
    with raises(AssertionError, match=f"width {size} is smaller than the stride {model.stride}"):
        model.forward_intermediates(torch.randn(1, 3, 64, size))
    with raises(ValueError, match="output_fmt='NLC' is not supported"):
        model.forward_intermediates(some_images(name), output_fmt="NLC")


def test_the_backbone_works_in_torchvisions_detector() -> None:
    """Run the example of docs/how-to/backbone.md."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    scope: dict[str, object] = {}
    exec(_example("FasterRCNN"), scope)
    detector = scope["detector"]
    assert isinstance(detector, FasterRCNN)
    assert isinstance(detector.backbone.fpn, type(BackboneWithFPN(torch.nn.Sequential(), {}, [8], 8).fpn))
    found = detector.eval()([torch.rand(3, 96, 128)])
    assert set(found[0]) == {"boxes", "labels", "scores"}
    losses = detector.train()(
        [torch.rand(3, 96, 128)], [{"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([1])}]
    )
    sum(losses.values()).backward()
    assert all(p.grad is not None for n, p in detector.backbone.named_parameters() if ".layer" in n)


def test_the_backbone_works_in_segmentation_models_pytorch() -> None:
    """Run the example of docs/how-to/backbone.md."""
    importorskip("segmentation_models_pytorch", reason="not a dependency; the test runs if it is installed")
    scope: dict[str, object] = {}
    exec(_example("segmentation_models_pytorch"), scope)
    assert scope["segmenter"].eval()(torch.randn(1, 3, 64, 64)).shape == (1, 21, 64, 64)


def _example(word: str) -> str:
    import re

    text = (Path(__file__).parents[2] / "docs" / "how-to" / "backbone.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in block]
    return block
