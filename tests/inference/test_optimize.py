"""An optimized model computes the function of the original, for any number of images, and reports its error."""

import copy
import json
import logging
import os
import pickle
import platform
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from pytest import LogCaptureFixture, MonkeyPatch, approx, fixture, importorskip, mark, raises, skip
from support.processes import run_process
from torch import nn

from resnext_hub.errors import RequestError
from resnext_hub.inference.optimize import OptimizedModel, optimize
from resnext_hub.kernels.fold import fold_batch_norms
from resnext_hub.kernels.merged import grouped_convolutions
from resnext_hub.kernels.timing import Packed, TrainingTiming, latency_of
from resnext_hub.kernels.widths import _read_cache, _update_cache, cache_file, choose_widths


def small_model(name: str = "resnext26_g32") -> nn.Module:
    """Return a model whose batch norms change their input."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model.eval()


def some_images(count: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@fixture(scope="module")
def compiled() -> tuple[nn.Module, OptimizedModel]:
    model = small_model()
    return model, optimize(model, some_images(), dtype=torch.float32, merge=8)


def test_a_compiled_model_computes_the_same_logits_for_any_number_of_images(
    compiled: tuple[nn.Module, OptimizedModel],
) -> None:
    model, fast = compiled
    assert fast.report is not None
    for count in (1, 3, 4, 9):
        images = some_images(count)
        with torch.no_grad():
            torch.testing.assert_close(
                fast(images), model(images), rtol=1e-4, atol=1e-5
            )  # other kernels, another order of sums


def test_compiling_restores_the_global_setting(compiled: tuple[nn.Module, OptimizedModel]) -> None:
    from torch._inductor import config

    assert compiled[1].report is not None
    assert not config.freezing


def test_the_report_has_the_widths_and_the_measured_error(compiled: tuple[nn.Module, OptimizedModel]) -> None:
    model, fast = compiled
    report = fast.report
    assert report is not None
    assert {layer.name: (layer.width, layer.merged_width) for layer in report.layers}["layer1.0.conv2"] == (4, 8)
    assert all(layer.merged_width >= layer.width for layer in report.layers)
    assert len(report.layers) == len(grouped_convolutions(model))
    with torch.no_grad():
        difference = fast(some_images()) - model(some_images())
    assert report.max_error == approx(float(difference.abs().max()))
    assert report.same_predictions == 1.0
    assert report.speedup > 0
    assert report.dtype == "float32"


@mark.slow
def test_the_fastest_batch_size_is_chosen_by_measurement() -> None:
    model, images = small_model("test_resnet"), some_images(12, 32)
    with torch.no_grad():
        expected = model(images)
    for engine in ("torch", "openvino") if find_spec("openvino") else ("torch",):
        fast = optimize(model, images, dtype=torch.float32, engine=engine)
        report = fast.report
        assert report is not None
        times = report.milliseconds_at_once
        assert list(times) == [12, 6, 3, 2]
        assert report.at_once == 12 or times[report.at_once] == min(times.values()) < times[12]
        torch.testing.assert_close(fast(images), expected, rtol=1e-3, atol=1e-4)  # other kernels, another order of sums
        fixed = optimize(model, images, dtype=torch.float32, engine=engine, at_once=5)
        assert fixed.report is not None
        assert (fixed.report.at_once, fixed.report.milliseconds_at_once) == (5, {})
        torch.testing.assert_close(fixed(images), expected, rtol=1e-3, atol=1e-4)


@mark.parametrize("engine", ["torch", "openvino"])
def test_latency_is_optimized_for_one_image_with_the_faster_number_of_threads(engine: str) -> None:
    if engine == "openvino":
        importorskip("openvino")
    model, images = small_model("test_resnet"), some_images(3, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fast = quick(model, images, objective="latency", engine=engine, merge="measure")
        assert torch.get_num_threads() == 2
        with torch.no_grad():  # fewer and more images than the one that it was optimized for
            torch.testing.assert_close(fast(images), model(images), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(fast(images[:1]), model(images[:1]), rtol=1e-3, atol=1e-4)
    finally:
        torch.set_num_threads(before)
    report = fast.report
    assert report is not None
    assert (report.at_once, report.milliseconds_at_once) == (1, {})
    times = report.milliseconds_by_threads
    assert list(times) == [1, 2]
    assert times[report.threads] == min(times.values())
    assert report.latency is not None
    assert all(0 < latency.p50 <= latency.p99 for latency in report.latency)
    assert report.speedup == approx(report.latency[0].p50 / report.latency[1].p50)
    assert re.search(rf"one image: p50 \S+ ms, p99 \S+ ms with {report.threads} threads, p50 \S+ ms", str(report))
    assert all(layer.input_shape[0] == 1 for layer in report.layers)


def test_the_99th_percentile_is_reached_by_one_call_in_a_hundred() -> None:
    latency = latency_of([0.002] * 98 + [0.005, 0.1])
    assert (latency.p50, latency.p99) == (2.0, 5.0)


@mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_convolutions_compute_the_same_function(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        skip("this CPU does not pack bfloat16 weights")
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, stride=2, padding=1, groups=16).to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(3, 64, 14, 14).to(dtype, memory_format=torch.channels_last)
    error = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        torch.testing.assert_close(Packed(conv, x)(x), conv(x), rtol=error, atol=error)


def test_a_convolution_with_same_padding_is_merged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding="same", groups=8), nn.Flatten()).eval()
    report = optimize(model, some_images(2, 16), dtype=torch.float32).report
    assert report is not None
    assert [sorted(layer.milliseconds) for layer in report.layers] == [[4, 8, 16, 32]]
    assert report.relative_error < 1e-5


@mark.parametrize("name", ["resnext26_g32", "seresnext26d_32x4d", "regnety_002"])
def test_merging_and_folding_leave_the_original_model_unchanged(name: str) -> None:
    model = small_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fast = optimize(model, some_images(2), dtype=torch.float32, merge=16, compile=False)
    assert fast.report is not None
    assert not fast.report.compiled
    assert any(layer.merged_width > layer.width for layer in fast.report.layers)
    assert fast.report.relative_error < 1e-4
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert fast.report.folded_batch_norms > 10


@mark.slow
def test_merged_groups_do_not_increase_the_error_of_bfloat16() -> None:
    model = small_model()
    errors = [
        optimize(model, some_images(), dtype=torch.bfloat16, merge=merge, compile=False).report for merge in ("off", 16)
    ]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[1].relative_error <= 1.2 * errors[0].relative_error


def test_measuring_chooses_a_faster_width() -> None:
    fast = optimize(small_model(), some_images(2), dtype=torch.float32, compile=False)
    assert fast.report is not None
    for layer in fast.report.layers:
        times = layer.milliseconds
        assert times[layer.merged_width] <= times[layer.width]
        assert min(times, key=times.__getitem__) == layer.merged_width or layer.merged_width == layer.width


def test_measured_times_are_cached_and_lead_to_the_same_choice(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "cache"))
    first, again = (choose_widths(small_model(), some_images(2), "measure") for _ in range(2))
    assert {choice.source for choice in first} == {"measured"}
    assert [replace(choice, source="measured") for choice in again] == list(first)
    assert {choice.source for choice in again} == {"remembered"}
    (file,) = (tmp_path / "cache").glob("*.json")
    content = json.loads(file.read_text())
    invalid = (
        {kind: {"3": 0.1} for kind in content},
        {kind: times | {"4096": 0.01} for kind, times in content.items()},
    )
    for text in ("no JSON", *map(json.dumps, invalid)):
        file.write_text(text)
        assert {choice.source for choice in choose_widths(small_model(), some_images(2), "measure")} == {"measured"}


def test_concurrent_cache_updates_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "widths.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: _update_cache(path, {f"kind {number}": {4: float(number)}}), range(40)))
    assert len(_read_cache(path)) == 40


def test_widths_are_measured_without_a_home_folder(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RESNEXT_HUB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file(torch.device("cpu")).parent == tmp_path / ".cache" / "resnext_hub"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # its result for a user without a home
    monkeypatch.chdir(tmp_path)
    assert {choice.source for choice in choose_widths(small_model(), some_images(2), "measure")} == {"measured"}


def test_widths_are_measured_if_the_cache_cannot_be_written(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("RESNEXT_HUB_CACHE", str(tmp_path / "cache"))
    assert {choice.source for choice in choose_widths(small_model(), some_images(2), "measure")} == {"measured"}


def test_the_table_replaces_measuring() -> None:
    choices = choose_widths(small_model().bfloat16(), some_images(2).bfloat16(), "table")
    assert {choice.width: choice.merged_width for choice in choices} == {4: 32, 8: 32, 16: 32, 32: 32}
    assert {choice.source for choice in choices} == {"table"}
    assert not any(choice.milliseconds for choice in choices)


@mark.slow
def test_choosing_widths_changes_neither_the_model_nor_random_numbers() -> None:
    model = small_model().train()
    model.bn1.eval()  # frozen
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    choose_widths(model, some_images(2, 32), "measure", timing=TrainingTiming(torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, module in model.named_modules() if not module.training] == ["bn1"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_layer_or_factor_is_refused() -> None:
    with raises(ValueError, match="layer9 is not a grouped convolution"):
        optimize(small_model(), some_images(2), merge={"layer9": 2}, compile=False)
    with raises(ValueError, match="factor=5 does not divide groups=32"):
        optimize(small_model(), some_images(2), merge={"layer1.0.conv2": 5}, compile=False)


@fixture(scope="module")
def openvino_model() -> tuple[nn.Module, OptimizedModel]:
    importorskip("openvino")
    model = small_model()
    return model, optimize(model, some_images(), engine="openvino", dtype=torch.float32)


@mark.slow
def test_openvino_computes_the_same_logits_for_any_number_of_images(
    openvino_model: tuple[nn.Module, OptimizedModel],
) -> None:
    model, fast = openvino_model
    for count in (1, 4, 9):
        images = some_images(count)
        with torch.no_grad():
            torch.testing.assert_close(
                fast(images), model(images), rtol=1e-3, atol=1e-4
            )  # other kernels, another order of sums


@mark.slow
def test_openvino_times_each_layer_within_the_model(openvino_model: tuple[nn.Module, OptimizedModel]) -> None:
    model, fast = openvino_model
    assert fast.report is not None
    assert fast.report.engine == "OpenVINO"
    assert [layer.name for layer in fast.report.layers] == list(grouped_convolutions(model))
    for layer in fast.report.layers:
        assert layer.milliseconds.keys() >= {layer.width, 2 * layer.width}
        assert layer.milliseconds[layer.merged_width] <= layer.milliseconds[layer.width]


@mark.slow
def test_int8_is_calibrated_and_its_error_reported() -> None:
    importorskip("openvino")
    model = small_model()
    report = optimize(model, some_images(), engine="openvino", calibration=some_images(16), merge=16).report
    assert report is not None
    assert report.dtype == "int8"
    assert 1e-4 < report.relative_error < 0.3


@mark.slow
def test_openvino_can_be_called_from_several_threads(openvino_model: tuple[nn.Module, OptimizedModel]) -> None:
    model, fast = openvino_model
    batches = [some_images(4) + number for number in range(4)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(fast, 10 * batches)):
            torch.testing.assert_close(found, expected[number % 4], rtol=1e-3, atol=1e-4)


def test_calibrating_does_not_change_random_numbers() -> None:
    importorskip("openvino")
    model = small_model("test_resnet")
    before = random.getstate(), torch.get_rng_state().tolist()
    optimize(model, some_images(), engine="openvino", calibration=some_images(8))
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def test_arguments_of_the_other_engine_are_refused() -> None:
    with raises(ValueError, match="calibration requires engine='openvino'"):
        optimize(small_model(), some_images(), calibration=some_images())
    with raises(ValueError, match="expected at least 4 images"):
        optimize(small_model(), some_images(), engine="openvino", calibration=some_images(2))


@mark.slow
def test_the_tenth_model_is_compiled_like_the_first() -> None:
    torch.manual_seed(0)
    for classes in range(2, 12):  # the compiler silently stops after eight models with the same code object
        model = timm.create_model("test_resnet", num_classes=classes).eval()
        fast = optimize(model, some_images(2, 32), dtype=torch.float32, merge="off")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast(some_images(2, 32))
    assert any("Torch-Compiled Region" in entry.key for entry in profile.key_averages())


def test_inference_mode_does_not_recompile(compiled: tuple[nn.Module, OptimizedModel]) -> None:
    from torch._dynamo.utils import counters

    _, fast = compiled
    expected = fast(some_images())
    before = counters["frames"]["total"]
    with torch.inference_mode():
        torch.testing.assert_close(fast(some_images().clone()), expected, rtol=0, atol=0)
    assert counters["frames"]["total"] == before


def test_every_batch_norm_after_a_convolution_is_folded() -> None:
    model = small_model()
    with torch.no_grad():
        expected = model(some_images())
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert fold_batch_norms(model) == norms
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        torch.testing.assert_close(model(some_images()), expected, rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """Models in which the batch norm after a convolution cannot be folded, or not like a plain one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm = Doubled(8) if kind == "a subclass" else nn.BatchNorm2d(8)
        self.alias = self.conv
        for norm in (self.norm, self.other):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        if kind == "a hook":
            self.norm.register_forward_hook(lambda module, arguments, output: 3 * output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "a convolution with two norms":
            return self.norm(self.conv(x)) + self.other(self.conv(2 * x))
        if self.kind == "a norm used again":
            return self.norm(self.norm(self.conv(x)).relu())
        if self.kind == "a weight that is read":
            return self.norm(self.conv(x)) + self.conv.weight.sum()
        return self.norm((self.alias if self.kind == "another name" else self.conv)(x))


class Doubled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@mark.parametrize(
    "kind",
    [
        "a convolution with two norms",
        "a norm used again",
        "a weight that is read",
        "another name",
        "a subclass",
        "a hook",
    ],
)
def test_a_batch_norm_that_cannot_be_folded_is_kept(kind: str) -> None:
    torch.manual_seed(0)
    model = Odd(kind).eval()
    with torch.no_grad():
        expected = model(some_images())
        assert fold_batch_norms(model) == 0
        torch.testing.assert_close(model(some_images()), expected, rtol=0, atol=0)


def test_hooks_are_only_called_with_tensors() -> None:
    model, seen = small_model("test_resnet"), []
    model.layer1.register_forward_hook(lambda module, arguments, output: seen.append(type(output)))
    assert fold_batch_norms(model) > 0
    assert seen == []
    model(some_images())
    assert seen == [torch.Tensor]


def test_the_compute_type_does_not_depend_on_the_models_type_or_autocast() -> None:
    model, images = small_model("test_resnet"), some_images(2)
    with torch.no_grad():
        expected = model(images)
    half = optimize(small_model("test_resnet").bfloat16(), images, dtype=torch.float32, compile=False)
    assert half.report is not None
    assert half.report.relative_error < 1e-5  # from the rounded weights, in float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = optimize(model, images, dtype=torch.float32, compile=False)
        torch.testing.assert_close(fast(images), expected, rtol=1e-4, atol=1e-5)
    assert fast.report is not None
    assert fast.report.relative_error < 1e-5


def test_a_model_that_returns_several_tensors_is_refused() -> None:
    with raises(ValueError, match="the model returns a list: expected one tensor"):
        optimize(timm.create_model("test_resnet", features_only=True), some_images())


FAULTS = """
import resource
import timm, torch
import resnext_hub

model, images = timm.create_model("test_resnet").eval(), torch.zeros(8, 3, 512, 512)
for keep in (False, True):
    fast = resnext_hub.optimize(
        model, images, dtype=torch.float32, compile=False, at_once=8, keep_memory=keep
    )
    fast(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fast(images)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc supports it")
@mark.slow
def test_kept_memory_causes_no_page_faults() -> None:
    done = run_process("-c", FAULTS)
    assert done.returncode == 0, done.stderr
    without, kept = map(int, done.stdout.split())
    assert without > 9000  # pages of 4 kB: by default glibc returns the largest activations to the system
    assert kept < 1000


def test_an_invalid_example_is_refused() -> None:
    with raises(ValueError, match=r"example of shape \(3, 64, 64\)"):
        optimize(small_model(), torch.randn(3, 64, 64))
    for at_once in (0, 3):
        with raises(ValueError, match=f"at_once={at_once}: expected an int from 1 to 2"):
            optimize(small_model(), some_images(2), at_once=at_once)
    with raises(ValueError, match=r"torch.float64: expected"):
        optimize(small_model(), torch.randn(1, 3, 64, 64, dtype=torch.float64))
    with raises(ValueError, match=r"example of shape \(0, 3, 64, 64\)"):
        optimize(small_model(), some_images(0))


def test_an_unknown_choice_is_refused() -> None:
    for arguments, part in (
        ({"engine": "onnx"}, "engine='onnx': expected 'torch' or 'openvino'"),
        ({"dtype": "bf16"}, "dtype='bf16': expected torch.bfloat16"),
        ({"dtype": torch.float16}, "dtype=torch.float16: expected torch.bfloat16"),
        ({"merge": "auto"}, "merge='auto': expected 'measure', 'table', 'off'"),
    ):
        with raises(ValueError, match=part):
            optimize(small_model(), some_images(), **arguments)


def test_images_of_another_shape_or_type_are_refused(compiled: tuple[nn.Module, OptimizedModel]) -> None:
    for images in (some_images(2, 96), some_images()[:, :1], some_images().double(), some_images()[0]):
        with raises(ValueError, match=r"expected \(N, 3, 64, 64\), float32, as in the example"):
            compiled[1](images)
    assert compiled[1](some_images(0)).shape == (0, 7)


def test_the_report_is_readable(compiled: tuple[nn.Module, OptimizedModel]) -> None:
    text = str(compiled[1].report)
    # the batch size is measured
    assert re.match(r"torch.compile, float32, batch size [124]: \S+ ms, speedup \S+x over the original model", text)
    assert "groups of 4 -> 8 channels at (4, 128, 16, 16) (asked): layer1.0.conv2, layer1.1.conv2\n" in text


DELETED_IN_ORDER_OF_CREATION = """
import signal
import timm, torch
import resnext_hub

handled = []
signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
model, images = timm.create_model("test_resnet").eval(), torch.zeros(1, 3, 32, 32)
first, second = (resnext_hub.optimize(model, images, engine="openvino") for _ in range(2))
del first
del second
signal.raise_signal(signal.SIGUSR1)
print(len(handled))
"""


def test_a_signal_after_deleting_openvino_models_does_not_crash() -> None:
    importorskip("openvino")
    # faulthandler runs signal handlers on an alternate stack
    done = run_process("-X", "faulthandler", "-c", DELETED_IN_ORDER_OF_CREATION)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def quick(model: nn.Module, images: torch.Tensor, **settings: Any) -> OptimizedModel:
    return optimize(model, images, **{"compile": False, "merge": "off", "dtype": torch.float32} | settings)


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


@mark.parametrize("wrong", [[1, 2], "image", np.zeros((2, 3, 16, 16), np.float32), [torch.zeros(3, 16, 16)], None])
def test_an_input_that_is_not_a_batch_is_refused_in_one_line(wrong: Any) -> None:
    fast = quick(classifier(), some_images(2, 16))
    for call in (lambda: fast(wrong), lambda: quick(classifier(), wrong)):
        with raises(RequestError, match=r"^[^\n]+: expected a [^\n]*tensor \(N, C, H, W\)"):
            call()
    for images in (torch.zeros(2, 3, 16, 17), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(3, 16, 16)):
        with raises(RequestError, match=r"expected \(N, 3, 16, 16\), float32"):
            fast(images)


@mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = classifier()
    with raises(RequestError, match="example contains NaN or infinity"):
        quick(model, torch.full((2, 3, 16, 16), value))
    with torch.no_grad():
        model[4].weight[1, 2] = value
    with raises(RequestError, match=r"the weights of the model are not finite: 4\.weight contains NaN or infinity"):
        quick(model, some_images(2, 16))


def test_an_optimized_model_is_neither_pickled_nor_copied() -> None:
    fast = quick(classifier(), some_images(2, 16))
    for call in (copy.deepcopy, copy.copy, pickle.dumps):
        with raises(
            TypeError, match="cannot be pickled or copied, because it is compiled for this process; save the original"
        ):
            call(fast)


class OfTheBatch(nn.Module):
    """A classifier whose logits depend on the other images of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * x.flatten(1).norm(dim=1).min()


class OfABranch(nn.Module):
    """A classifier that branches on its data, which tracing treats as constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else -self.inner(x)


@mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_output_depends_on_the_batch_causes_a_warning(
    dtype: torch.dtype, caplog: LogCaptureFixture, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("resnext_hub"), "propagate", True)
    fast = quick(OfTheBatch(), some_images(4, 16), dtype=dtype)
    assert fast.report is not None
    assert f"{fast.report.second_error:.1e} on a second batch, more than rounding in" in caplog.text
    assert "the optimized model computes a different function" in caplog.text


def test_a_traced_branch_on_data_causes_a_warning(caplog: LogCaptureFixture, monkeypatch: MonkeyPatch) -> None:
    importorskip("openvino")
    monkeypatch.setattr(logging.getLogger("resnext_hub"), "propagate", True)
    fast = quick(OfABranch(), some_images(4, 16).abs(), engine="openvino")
    assert fast.report is not None
    assert fast.report.relative_error < 1e-3 < fast.report.second_error
    assert "the optimized model computes a different function" in caplog.text


def test_a_hook_on_a_grouped_convolution_keeps_its_effect() -> None:
    torch.manual_seed(0)
    grouped = nn.Conv2d(8, 8, 3, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), grouped, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    grouped.register_forward_hook(lambda module, inputs, output: 2 * output)
    fast = quick(model, some_images(2, 16), merge=8)
    assert fast.report is not None
    assert fast.report.layers == ()
    assert max(fast.report.relative_error, fast.report.second_error) < 1e-5


@mark.parametrize(
    "merge",
    [0, -4, 3.5, 8.0, True, None, "8", [4], {"1": 0}, {"1": -1}, {"1": 2.0}, {"1": "2"}, {"1": True}, "\x1b[31m"],
)
def test_an_invalid_width_or_factor_is_refused(merge: Any) -> None:
    with raises(
        RequestError, match=r"^merge=.*: expected 'measure', 'table', 'off', a width .* of at least 1"
    ) as found:
        quick(classifier(), some_images(2, 16), merge=merge)
    assert str(found.value).isprintable()


@mark.parametrize("at_once", [0, -1, 3, 1.5, 2.0, True, None, "all", "2", [1]])
def test_an_invalid_batch_size_is_refused(at_once: Any) -> None:
    with raises(RequestError, match=r"^at_once=[^\n]*: expected an int from 1 to 2 \(the number of example images\)"):
        quick(classifier(), some_images(2, 16), at_once=at_once)


@mark.parametrize("objective", ["speed", None, 1, True])
def test_an_unknown_objective_is_refused(objective: Any) -> None:
    with raises(RequestError, match=r"^objective=[^\n]*: expected 'throughput' or 'latency'$"):
        quick(classifier(), some_images(2, 16), objective=objective)


def test_a_batch_size_is_refused_if_latency_is_optimized() -> None:
    with raises(RequestError, match=r"^at_once=2 needs objective='throughput'; with 'latency', it is always 1$"):
        quick(classifier(), some_images(2, 16), objective="latency", at_once=2)


def traced() -> nn.Module:
    return torch.jit.trace(classifier(), some_images(2, 16))


def with_old_weight_norm() -> nn.Module:
    model = classifier()
    nn.utils.weight_norm(model[4])
    return model


def with_a_lock() -> nn.Module:
    model = classifier()
    model.lock = threading.Lock()
    return model


def with_a_fixed_size() -> nn.Module:
    return timm.create_model("test_vit", img_size=32, dynamic_img_size=False).eval()


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(classifier(), {nn.Linear}, dtype=torch.qint8)


@mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@mark.parametrize(
    ("make", "part"),
    [
        (traced, "which is already compiled: expected the original model"),
        (lambda: quick(classifier(), some_images(2, 16)), "which is already compiled"),
        (quantized, "is not a plain tensor, so the model may be quantized; expected the original model"),
        (lambda: classifier().to("meta"), r"weights are not materialized \(0\.weight is on the meta device\)"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten()), r"not materialized \(0\.weight is uninitialized\)"),
        (with_old_weight_norm, r"cannot be copied .*torch\.nn\.utils\.parametrizations\.weight_norm instead of"),
        (with_a_lock, "the model cannot be copied"),
        (lambda: nn.Bilinear(16, 16, 4), "missing 1 required positional argument"),
        (with_a_fixed_size, "does not accept an example"),
        (lambda: nn.Linear, "model is a type: expected an nn.Module"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_optimized_is_refused_in_one_line(make: Callable[[], Any], part: str) -> None:
    with raises(RequestError, match=part) as found:
        quick(make(), some_images(2, 16))
    assert str(found.value).isprintable()


@mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_any_floating_point_type_is_computed_in_the_requested_type(dtype: torch.dtype) -> None:
    report = quick(classifier().to(dtype), some_images(2, 16)).report
    assert report is not None
    assert report.relative_error < 1e-5


@mark.parametrize(
    ("change", "part"),
    [
        (lambda images: images[:, :1], r"the model does not accept an example of shape \(2, 1, 16, 16\)"),
        (lambda images: torch.cat([images, images], 1), r"example of shape \(2, 6, 16, 16\)"),
        (lambda images: images[..., :1, :1], r"example of shape \(2, 3, 1, 1\)"),
        (lambda images: images[..., :0], r"example of shape \(2, 3, 16, 0\) and dtype torch.float32: expected \(N, C"),
        (lambda images: images.to("meta"), "example is a tensor on device meta"),
        (lambda images: images.to_sparse(), "with layout torch.sparse_coo: expected a dense, materialized"),
        (lambda images: images.byte(), r"and dtype torch.uint8: expected \(N, C, H, W\), float32"),
    ],
)  # fmt: skip
def test_an_example_that_a_model_does_not_accept_is_refused_in_one_line(change: Callable[..., Any], part: str) -> None:
    with raises(RequestError, match=part) as found:
        quick(classifier(), change(some_images(2, 16)))
    assert str(found.value).isprintable()


@mark.parametrize("images", [3, some_images(4, 16).double(), some_images(4, 16)[0], some_images(4, 16) / 0])
def test_a_calibration_that_is_not_a_batch_of_images_is_refused(images: Any) -> None:
    with raises(RequestError, match=r"^calibration "):
        quick(classifier(), some_images(2, 16), calibration=images, engine="openvino")
