"""The fast network computes what the given one does, for any number of pictures, and says what it costs."""

import timm
import torch
from pytest import approx, fixture, mark, raises
from torch import nn

from resnext_hub.inference.optimize import OptimizedModel, fold_batch_norms, optimize
from resnext_hub.models.merged import grouped_convolutions


def network(name: str = "resnext26_g32") -> nn.Module:
    """A network whose batch norms have something to fold."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model.eval()


def pictures(count: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@fixture(scope="module")
def compiled() -> tuple[nn.Module, OptimizedModel]:
    model = network()
    return model, optimize(model, pictures(), dtype=torch.float32, merge=8)


def test_the_compiled_network_gives_the_same_logits_for_any_number_of_pictures(
    compiled: tuple[nn.Module, OptimizedModel],
) -> None:
    model, fast = compiled
    assert fast.report is not None
    for count in (1, 3, 4, 9):
        images = pictures(count)
        with torch.no_grad():
            torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)  # other kernels, other sums


def test_compiling_puts_the_global_setting_back(compiled: tuple[nn.Module, OptimizedModel]) -> None:
    from torch._inductor import config

    assert compiled[1].report is not None
    assert not config.freezing


def test_the_report_says_what_was_done_and_measures_the_error(compiled: tuple[nn.Module, OptimizedModel]) -> None:
    model, fast = compiled
    report = fast.report
    assert report is not None
    assert {layer.name: (layer.width, layer.merged_width) for layer in report.layers}["layer1.0.conv2"] == (4, 8)
    assert all(layer.merged_width >= layer.width for layer in report.layers)
    assert len(report.layers) == len(grouped_convolutions(model))
    with torch.no_grad():
        difference = fast(pictures()) - model(pictures())
    assert report.max_error == approx(float(difference.abs().max()))
    assert report.same_predictions == 1.0
    assert report.speedup > 0
    assert report.dtype == "float32"


@mark.parametrize("name", ["resnext26_g32", "seresnext26d_32x4d", "regnety_002"])
def test_merging_and_folding_leave_the_given_network_alone(name: str) -> None:
    model = network(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fast = optimize(model, pictures(2), dtype=torch.float32, merge=16, compile=False)
    assert fast.report is not None
    assert not fast.report.compiled
    assert any(layer.merged_width > layer.width for layer in fast.report.layers)
    assert fast.report.relative_error < 1e-4
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert fast.report.folded_batch_norms > 10


def test_bfloat16_errs_no_more_with_merged_groups_than_without() -> None:
    model = network()
    errors = [
        optimize(model, pictures(), dtype=torch.bfloat16, merge=merge, compile=False).report for merge in ("off", 16)
    ]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[1].relative_error <= 1.2 * errors[0].relative_error


def test_measuring_takes_a_width_that_was_measured_faster() -> None:
    fast = optimize(network(), pictures(2), dtype=torch.float32, compile=False)
    assert fast.report is not None
    for layer in fast.report.layers:
        times = layer.milliseconds
        assert times[layer.merged_width] <= times[layer.width]
        assert min(times, key=times.__getitem__) == layer.merged_width or layer.merged_width == layer.width


def test_every_batch_norm_after_a_convolution_is_folded() -> None:
    model = network()
    with torch.no_grad():
        expected = model(pictures())
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert fold_batch_norms(model) == norms
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        torch.testing.assert_close(model(pictures()), expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_example_is_refused() -> None:
    with raises(ValueError, match=r"example of shape \(3, 64, 64\)"):
        optimize(network(), torch.randn(3, 64, 64))
    with raises(ValueError, match=r"torch.float64: expected"):
        optimize(network(), torch.randn(1, 3, 64, 64, dtype=torch.float64))
