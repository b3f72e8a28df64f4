"""Run a model with OpenVINO, in bfloat16, float32, or int8 calibrated on images.

Wider groups are faster with OpenVINO as well. It reports the time of each layer within the model, with the memory
layouts used there, so widths are measured on whole models: one for each width.
"""

import contextlib
import copy
import ctypes
import functools
import gc
import io
import logging
import random
import statistics
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from resnext_hub.kernels.fold import fold_batch_norms
from resnext_hub.kernels.merged import merge_conv, merge_factors, replace_module
from resnext_hub.kernels.timing import ROUNDS, Layer
from resnext_hub.machine import disable_telemetry, quiet_compilers

if TYPE_CHECKING:
    import openvino


RANKING_INPUTS = 100
"""Inputs by which operations are ranked: those with the largest errors in int8."""


@functools.cache
def _core() -> "openvino.Core":
    """Return the only core of this process, which lives as long as the process.

    A core sets an alternate stack for signal handlers. Destroying several in the order of their creation leaves a
    freed stack behind, and the next handled signal (such as SIGCHLD from a worker, or Ctrl-C) crashes the process.
    """
    disable_telemetry()
    import openvino

    return openvino.Core()


class OpenVinoModel:
    """A compiled model: maps float32 images `(N, C, H, W)` to float32 logits, for the N that it was compiled for."""

    def __init__(self, model: "openvino.Model", dtype: torch.dtype, *, timed: bool = False) -> None:
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": timed,
        }
        self._compiled = _core().compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._lock = threading.Lock()  # a request runs one call at a time

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map images to logits."""
        with self._lock:
            found = self._request.infer({0: images.contiguous().numpy()}, share_inputs=True)
            return torch.from_numpy(np.array(found[0]))  # the request reuses its output memory

    def layer_milliseconds(self, names: Sequence[str]) -> dict[str, float]:
        """Return the milliseconds of layers in the last pass, by their names in torch."""
        found: dict[str, float] = {}
        for entry in self._request.profiling_info:
            path = entry.node_name.removeprefix("__module.").partition("/")[0]
            if path in names:
                found[path] = found.get(path, 0.0) + 1000 * entry.real_time.total_seconds()
        return found


def runner(compiled: "openvino.CompiledModel") -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that runs a compiled model on images `(N, C, H, W)`, for any N that it accepts."""
    request = compiled.create_infer_request()

    def run(images: torch.Tensor) -> torch.Tensor:
        found = request.infer({0: images.contiguous().numpy()}, share_inputs=True)
        return torch.from_numpy(np.array(found[0]))  # the request reuses its output memory

    return run


class OpenVinoTiming:
    """Times layers within a model that OpenVINO runs.

    Args:
        model: The model, in float32.
        example: Images `(N, C, H, W)`.
        dtype: Compute type.
        calibration: Images `(M, C, H, W)`, for int8.
    """

    autocast = None

    def __init__(
        self, model: nn.Module, example: torch.Tensor, dtype: torch.dtype, calibration: torch.Tensor | None
    ) -> None:
        self.model, self.example, self.dtype = copy.deepcopy(model), example, dtype
        fold_batch_norms(self.model)  # OpenVINO folds them as well, but then the layer has neither name
        # times do not depend on the values, so one batch of images suffices
        batch = torch.arange(len(example)) % (1 if calibration is None else len(calibration))
        self.calibration = None if calibration is None else calibration[batch]

    @property
    def key(self) -> str:
        """Identifies the way of timing in the cache."""
        import openvino

        return f"OpenVINO {openvino.__version__} {'int8' if self.calibration is not None else self.dtype}"

    def times(self, layers: Sequence[Layer]) -> list[dict[int, float]]:
        """Return the median milliseconds of each layer by width."""
        names = [layer.name for layer in layers]
        possible = {layer.name: {k * layer.width: k for k in merge_factors(layer.conv)} for layer in layers}
        models = {}
        for width in sorted({width for widths in possible.values() for width in widths}):
            merged = copy.deepcopy(self.model)
            for layer in layers:
                if factor := possible[layer.name].get(width, 1):
                    replace_module(merged, layer.name, merge_conv(layer.conv, factor))
            models[width] = OpenVinoModel(convert(merged, self.example, self.calibration), self.dtype, timed=True)
        measured: dict[str, dict[int, list[float]]] = {name: {} for name in names}
        for turn in range(ROUNDS + 1):
            for width, model in models.items():
                model(self.example)
                for name, milliseconds in model.layer_milliseconds(names).items() if turn else ():
                    if width in possible[name]:
                        measured[name].setdefault(width, []).append(milliseconds)
        return [
            {width: round(statistics.median(values), 4) for width, values in measured[name].items()} for name in names
        ]


def convert(
    model: nn.Module, example: torch.Tensor, calibration: torch.Tensor | None = None, *, dynamic: bool = False
) -> "openvino.Model":
    """Convert a model to OpenVINO, in int8 if there are calibration images.

    Args:
        model: The model, in float32 on the CPU.
        example: Representative images `(N, C, H, W)`.
        calibration: Normalized images `(M, C, H, W)` that determine the ranges of the activations.
        dynamic: Accept any N instead of only the example's.
    """
    disable_telemetry()
    import openvino

    with quiet_compilers(), contextlib.redirect_stdout(io.StringIO()):
        converted = openvino.convert_model(model, example_input=example[:2])
    converted.reshape([-1 if dynamic else len(example), *example.shape[1:]])
    if calibration is None:
        return converted
    full = len(calibration) // len(example) * len(example)  # the model takes whole batches only
    return calibrate(converted, [part.numpy() for part in torch.split(calibration[:full], len(example))])


def calibrate(model: Any, inputs: Sequence[Any]) -> Any:
    """Quantize an OpenVINO or ONNX model to int8, with activation ranges from the inputs."""
    with _nncf() as nncf:
        return nncf.quantize(model, nncf.Dataset(inputs), subset_size=len(inputs))


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """A quantized model, and the operations that went back to float32, by their names in the model."""

    model: Any
    steps: tuple[tuple[str, ...], ...]
    """Operations returned to float32 in each step."""
    restored: tuple[str, ...]
    """Operations that are in float32 at the end; NNCF may take back a step that made it worse."""
    operations: int
    """Number of operations that full int8 quantizes."""
    is_int8: bool
    """Whether any operation is still quantized."""


def calibrate_within(
    model: Any, inputs: Sequence[Any], score: Callable[[Any, Sequence[int]], tuple[float, list[float]]]
) -> Repaired:
    """Quantize like `calibrate`; then return operations to float32, the worst first, until the score is 0.

    Args:
        model: An OpenVINO or ONNX model.
        inputs: Inputs that determine the ranges of the activations.
        score: Maps a compiled OpenVINO model or an ONNX model and indices of inputs to a score, at most 0, and a score
            for each of these inputs. If it is called with a part of the inputs, it is to rank operations.
    """

    def validate(model: Any, indices: Iterable[int]) -> tuple[float, list[float]]:
        total, scores = score(model, list(indices))
        return 1 + total, scores  # NNCF divides by the score of the original model

    with _nncf() as nncf, _Messages() as messages:
        from nncf.quantization.advanced_parameters import AdvancedAccuracyRestorerParameters

        repaired = nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(inputs),
            nncf.Dataset(range(len(inputs))),
            validate,
            max_drop=0.0,
            subset_size=len(inputs),
            advanced_accuracy_restorer_parameters=AdvancedAccuracyRestorerParameters(
                ranking_subset_size=min(RANKING_INPUTS, len(inputs) - 1) or 1, num_ranking_workers=1
            ),
        )
    steps = tuple(messages.listed("Reverted "))
    final = messages.listed(" were reverted back ")
    restored = final[-1] if final else tuple(name for step in steps for name in step)
    operations = messages.number("Total number of quantized operations in the model: ")
    # after returning the last operation, NNCF lists none
    is_int8 = bool(final) or not steps
    return Repaired(model=repaired, steps=steps, restored=restored, operations=operations, is_int8=is_int8)


class _Messages(logging.Handler):
    """Collects what NNCF logs, which is the only place where it names the operations that it returns to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of a message."""
        self.texts.append(record.getMessage())

    def listed(self, part: str) -> list[tuple[str, ...]]:
        """Return the names that are listed in each message that contains a text."""
        return [tuple(text.split("\n\t")[1:]) for text in self.texts if part in text.partition("\n")[0]]

    def number(self, start: str) -> int:
        """Return the number at the end of the message that starts with a text, or 0."""
        return next((int(text.removeprefix(start)) for text in self.texts if text.startswith(start)), 0)

    def __enter__(self) -> "_Messages":
        logger = logging.getLogger("nncf")
        self._before = (logger.handlers, logger.level)
        logger.handlers = [self]
        logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        logger = logging.getLogger("nncf")
        logger.handlers = self._before[0]
        logger.setLevel(self._before[1])


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def keep_signal_stack() -> Iterator[None]:
    """Restore the alternate stack of signal handlers afterwards; cores that were destroyed may leave a freed one."""
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        gc.collect()
        library.sigaltstack(ctypes.byref(before), None)


@contextlib.contextmanager
def _nncf() -> Iterator[Any]:
    """Import NNCF; keep it quiet, and the random numbers as they were."""
    state = random.getstate()
    try:
        # NNCF seeds both generators, Python's on import
        with quiet_compilers(), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            disable_telemetry()
            import nncf

            _core()  # before NNCF creates its own
            with keep_signal_stack():
                yield nncf
    finally:
        random.setstate(state)
