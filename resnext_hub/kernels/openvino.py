"""A network computed by OpenVINO, in bfloat16, float32 or, calibrated on images, in int8.

OpenVINO computes a grouped convolution faster in wider groups too, and says of each layer how long it took in its
place in the network, with the layouts that it has there: so widths are measured on whole networks, one for each width.
"""

import contextlib
import copy
import functools
import io
import random
import statistics
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from resnext_hub.kernels.fold import fold_batch_norms
from resnext_hub.kernels.merged import dense_form, merge_factors, replace_module
from resnext_hub.kernels.timing import ROUNDS, Layer
from resnext_hub.machine import disable_telemetry, quiet_compilers

if TYPE_CHECKING:
    import openvino


@functools.cache
def _core() -> "openvino.Core":
    """Give the one core of this process, which stays to its end.

    A core brings a stack for signal handlers. When several end in the order in which they were made, the process is
    left with a stack that is gone, and the next signal that it handles (a reader's end, Ctrl-C) kills it.
    """
    disable_telemetry()
    import openvino

    return openvino.Core()


class OpenVinoNetwork:
    """A compiled network: float32 images `(N, C, H, W)` of the N it was compiled for to float32 logits."""

    def __init__(self, model: "openvino.Model", dtype: torch.dtype, *, timed: bool = False) -> None:
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": timed,
        }
        self._compiled = _core().compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._turn = threading.Lock()  # a request takes one call at a time

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map images to logits."""
        with self._turn:
            found = self._request.infer({0: images.contiguous().numpy()}, share_inputs=True)
            return torch.from_numpy(np.array(found[0]))  # the request uses its own memory again

    def layer_milliseconds(self, names: Sequence[str]) -> dict[str, float]:
        """Give how long the layers of these names, as torch has them, took in the last pass."""
        found: dict[str, float] = {}
        for entry in self._request.profiling_info:
            path = entry.node_name.removeprefix("__module.").partition("/")[0]
            if path in names:
                found[path] = found.get(path, 0.0) + 1000 * entry.real_time.total_seconds()
        return found


class OpenVinoTiming:
    """Times layers in their network, as OpenVINO computes it.

    Args:
        model: The network, in float32.
        example: Images `(N, C, H, W)`.
        dtype: The type that is computed with.
        calibration: Images `(M, C, H, W)`, for int8.
    """

    autocast = None

    def __init__(
        self, model: nn.Module, example: torch.Tensor, dtype: torch.dtype, calibration: torch.Tensor | None
    ) -> None:
        self.model, self.example, self.dtype = copy.deepcopy(model), example, dtype
        fold_batch_norms(self.model)  # OpenVINO does so as well, and then names the layer after neither
        # the times do not depend on what the values are, so a batch of images does for this
        some = torch.arange(len(example)) % (1 if calibration is None else len(calibration))
        self.calibration = None if calibration is None else calibration[some]

    @property
    def key(self) -> str:
        """What tells its figures from those of other ways."""
        import openvino

        return f"OpenVINO {openvino.__version__} {'int8' if self.calibration is not None else self.dtype}"

    def times(self, layers: Sequence[Layer]) -> list[dict[int, float]]:
        """Give the median milliseconds of each layer by width."""
        names = [layer.name for layer in layers]
        possible = {layer.name: {k * layer.width: k for k in merge_factors(layer.conv)} for layer in layers}
        networks = {}
        for width in sorted({width for widths in possible.values() for width in widths}):
            merged = copy.deepcopy(self.model)
            for layer in layers:
                if factor := possible[layer.name].get(width, 1):
                    replace_module(merged, layer.name, dense_form(layer.conv, factor))
            networks[width] = OpenVinoNetwork(convert(merged, self.example, self.calibration), self.dtype, timed=True)
        measured: dict[str, dict[int, list[float]]] = {name: {} for name in names}
        for turn in range(ROUNDS + 1):
            for width, network in networks.items():
                network(self.example)
                for name, milliseconds in network.layer_milliseconds(names).items() if turn else ():
                    if width in possible[name]:
                        measured[name].setdefault(width, []).append(milliseconds)
        return [
            {width: round(statistics.median(values), 4) for width, values in measured[name].items()} for name in names
        ]


def convert(
    model: nn.Module, example: torch.Tensor, calibration: torch.Tensor | None = None, *, dynamic: bool = False
) -> "openvino.Model":
    """Give a network as OpenVINO has it, in int8 if there are images to calibrate it on.

    Args:
        model: The network, in float32 on the CPU.
        example: Images `(N, C, H, W)` as they will come.
        calibration: Normalised images `(M, C, H, W)` from which the ranges of the activations are taken.
        dynamic: Take any N instead of the example's.
    """
    disable_telemetry()
    import openvino

    with quiet_compilers(), contextlib.redirect_stdout(io.StringIO()):
        converted = openvino.convert_model(model, example_input=example[:2])
    converted.reshape([-1 if dynamic else len(example), *example.shape[1:]])
    if calibration is None:
        return converted
    full = len(calibration) // len(example) * len(example)  # a batch of another size would not fit
    return calibrate(converted, [part.numpy() for part in torch.split(calibration[:full], len(example))])


def calibrate(model: Any, inputs: Sequence[Any]) -> Any:
    """Give a network of OpenVINO or ONNX in int8, with the ranges that its activations have on some inputs."""
    state = random.getstate()
    try:
        # NNCF seeds both generators, Python's already when it is imported
        with quiet_compilers(), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            disable_telemetry()
            import nncf

            _core()  # before the one that is made in there
            return nncf.quantize(model, nncf.Dataset(inputs), subset_size=len(inputs))
    finally:
        random.setstate(state)
