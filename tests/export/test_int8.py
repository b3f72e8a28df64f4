"""An int8 file loses at most as much accuracy as allowed: layers that cost too much go back to float32."""

import ctypes
import importlib
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import torch
from pytest import LogCaptureFixture, approx, fixture, importorskip, mark, raises
from torch import nn

from resnext_hub.errors import RunError
from resnext_hub.export.int8 import Accuracy, Int8, _risk, can_show, largest_difference, quantize
from resnext_hub.export.parts import raw_model
from resnext_hub.inference.classifier import load
from resnext_hub.kernels.openvino import SignalStack, keep_signal_stack
from resnext_hub.runs.calibration import prepare_int8

importorskip("openvino")


class Planted(nn.Module):
    """Classifies images by their brightness; the input of the second layer also has a channel with a huge constant.

    One range for all channels, as in int8, leaves nothing of the others.
    """

    def __init__(self, centers: torch.Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, len(centers))
        with torch.no_grad():
            self.first.weight.fill_(1 / 3)
            self.first.weight[[0, 3]] = 0
            self.first.bias.copy_(torch.tensor([1e4, 2.5, 2.5, 5.0]))  # the last one sets the range of what follows
            self.second.weight.copy_(torch.eye(4)[:, :, None, None])
            self.second.weight[0] = 0
            self.second.bias.zero_()
            # the nearest center has the largest logit
            self.head.weight.copy_(centers[:, None].expand(-1, 4))
            self.head.weight[:, [0, 3]] = 0
            self.head.bias.copy_(-centers.square() - 5 * centers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.second(torch.relu(self.first(images))))
        return self.head(features.mean((2, 3)))


@fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@fixture(scope="module")
def images(vehicles_run: Path) -> Int8:
    return prepare_int8(load(str(vehicles_run)), None, 0.5)


@fixture(scope="module")
def planted(images: Int8) -> nn.Module:
    centers = images.calibration.unflatten(0, (3, -1)).mean((1, 2, 3, 4))  # the images are sorted by class
    return Planted(centers).eval()


@mark.parametrize("format", ["onnx", "openvino"])
def test_the_layer_that_costs_accuracy_goes_back_to_float32(
    format: str, planted: nn.Module, images: Int8, caplog: LogCaptureFixture
) -> None:
    files = importlib.import_module(f"resnext_hub.export.{format}").FORMAT
    content = files.build(raw_model(planted, (3, 32, 32)))
    with caplog.at_level(logging.WARNING, "resnext_hub"):
        quantized, accuracy = quantize(files, content, planted, images)
    (nothing, full), (layers, repaired) = accuracy.steps
    assert (nothing, layers, accuracy.float_layers) == ((), ("second",), ("second",))
    assert full.drop > 30
    assert (accuracy.before, accuracy.after, accuracy.count) == (repaired.before, repaired.after, repaired.count)
    assert accuracy.before > 30
    assert accuracy.drop <= 0.5
    run = files.open(quantized)
    for batch in images.samples.batches(32, 0, 1, 0, False):
        assert run(batch.images).shape == (len(batch.images), 3)
    assert "  all layers in int8: a drop of " in str(accuracy)
    assert "  then second in float32: a drop of 0.00 points, at most " in str(accuracy)
    assert str(accuracy).endswith("\n  layers in float32: second")
    assert "36 held-out images are too few to show that int8 loses at most 0.5 points; they only" in caplog.text


def test_int8_is_refused_if_returning_layers_to_float32_does_not_help(planted: nn.Module, images: Int8) -> None:
    files = importlib.import_module("resnext_hub.export.openvino").FORMAT
    content = files.build(raw_model(planted, (3, 32, 32)))
    with raises(
        RunError,
        match=r"^int8 loses \S+ points of top-1 accuracy, more than max_drop=-50 allows, and keeping layers",
    ):
        quantize(files, content, planted, replace(images, max_drop=-50))


@mark.parametrize("count", [40, 400])
@mark.parametrize("risk", [0.05, 0.025])
def test_the_limit_is_above_the_true_difference_as_often_as_it_says(count: int, risk: float) -> None:
    for changed, difference in ((0.02, 0.0), (0.1, 0.0), (0.1, 0.05), (0.3, 0.1)):
        losing, gaining = (changed + difference) / 2, (changed - difference) / 2
        missed = 0.0
        for lost in range(count + 1):
            for gained in range(count + 1 - lost):
                probability = multinomial(count, lost, gained, losing, gaining)
                if probability > 1e-9 and largest_difference(lost, gained, count, risk) < difference:
                    missed += probability
        assert missed <= 1.4 * risk, (
            changed,
            difference,
        )  # of an approximate method; the usual one misses 2 to 5 times


def multinomial(count: int, lost: int, gained: int, losing: float, gaining: float) -> float:
    if min(losing, gaining) == 0:
        return 0.0
    rest = count - lost - gained
    log = math.lgamma(count + 1) - math.lgamma(lost + 1) - math.lgamma(gained + 1) - math.lgamma(rest + 1)
    log += lost * math.log(losing) + gained * math.log(gaining) + rest * math.log(1 - losing - gaining)
    return math.exp(log)


def test_the_limit_is_zero_where_mcnemars_test_is_significant() -> None:
    risk = 1 - NormalDist().cdf((15 - 5) / math.sqrt(15 + 5))
    assert largest_difference(5, 15, 1000, risk) == approx(0, abs=1e-9)


def test_identical_predictions_leave_a_doubt_that_shrinks_with_the_number_of_images() -> None:
    z = NormalDist().inv_cdf(0.975)
    for count in (10, 100, 10000):
        assert largest_difference(0, 0, count, 0.025) == approx(z**2 / (count + z**2))


def test_any_number_of_tests_takes_a_risk_of_at_most_five_percent() -> None:
    assert 0.0499 < sum(_risk(test) for test in range(1, 1000)) < 0.05


def test_the_limit_decides_only_if_there_are_enough_images_for_it() -> None:
    assert not can_show(0.5, 360)
    assert can_show(0.5, 2000)
    assert can_show(0.3, 10000)
    few = Accuracy(before=330, after=329, lost=2, count=360, relative_error=0.01)
    many = Accuracy(before=9000, after=8973, lost=60, count=10000, relative_error=0.01)
    assert few.within(0.5)
    assert few.largest_drop > 0.5
    assert many.drop < 0.3
    assert not many.within(0.3)


@mark.skipif(sys.platform != "linux", reason="the structure is that of Linux")
def test_the_stack_of_signal_handlers_is_restored() -> None:
    library = ctypes.CDLL(None)
    memory = ctypes.create_string_buffer(1 << 16)
    before, other, after = SignalStack(), SignalStack(ctypes.addressof(memory), 0, len(memory)), SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    with keep_signal_stack():
        assert library.sigaltstack(ctypes.byref(other), None) == 0
    library.sigaltstack(None, ctypes.byref(after))
    assert (after.pointer, after.flags, after.size) == (before.pointer, before.flags, before.size)
