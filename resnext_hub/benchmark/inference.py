"""Throughput and latency of a model against baselines: every entry maps float32 images to float32 logits."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import timm
import torch
from torch import nn

from resnext_hub.benchmark.comparison import (
    Comparison,
    Entry,
    compare,
    equal_flops_model,
    images_per_second,
    in_own_process,
)
from resnext_hub.data.transforms import IMAGE_SIZE
from resnext_hub.errors import RequestError, setting
from resnext_hub.inference.engines import Objective, compile_frozen
from resnext_hub.inference.optimize import optimize
from resnext_hub.kernels.timing import call_seconds
from resnext_hub.machine import device_type, resolve_precision
from resnext_hub.settings import Range, check_fields

_logger = logging.getLogger(__name__)

Forward = Callable[[torch.Tensor], torch.Tensor]

PASSES = 3
"""Forward passes per round."""

TWINS = {"resnext_g32": "resnext50_32x4d", "resnext101_g32_w8": "resnext101_32x8d", "resnet50": "resnet50"}
"""torchvision's names of models, by our or timm's name of the same architecture."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Inference benchmark."""

    model: str = "resnext_g32"
    """timm model name; it is measured with random weights, since throughput does not depend on them."""
    equal_flops: str | None = None
    """Model without grouped convolutions to measure as well, with torch.compile (default: one with about the same
    FLOPs, if there is one)."""
    image_size: Annotated[int, Range(1, IMAGE_SIZE)] = 224
    """Height and width of the images, in pixels."""
    batch_size: Annotated[int, Range(1, 1 << 20)] = 16
    """Images per forward pass."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in filter(None, (self.model, self.equal_flops)):
            if name.partition(".")[0] not in timm.list_models():
                raise RequestError(f"{name} is not a timm model; `timm.list_models()` lists all of them")


def measure(settings: Settings, rounds: int) -> Comparison:
    """Measure all entries on the same images, each in its own process.

    Raises:
        RequestError: If the model does not take images of that size.
    """
    device = torch.device(device_type())
    settings = replace(settings, equal_flops=settings.equal_flops or equal_flops_model(settings.model))
    with contextlib.ExitStack() as stack:
        entries = []
        for title in _candidates(settings, device.type):
            entries.append(stack.enter_context(in_own_process(title, build_entry, settings, title)))
            _logger.info("ready: %s", title)
        notes = (
            "Error: norm of the difference from timm's float32 logits, relative to their norm, on "
            f"{settings.batch_size} images of noise"
            + (f"; none for {settings.equal_flops}, which is a different model" if settings.equal_flops else "")
            + ". Each entry runs in its own process.",
        )
        return compare("inference", vars(settings), entries, rounds, device, notes)


def build_entry(settings: Settings, title: str) -> Entry:
    """Build the entry with a title, in the process that measures it.

    Raises:
        RequestError: If the model does not take images of that size.
    """
    device = torch.device(device_type())
    torch.backends.cudnn.benchmark = True
    candidate = _candidates(settings, device.type)[title]
    model, same_model = (seeded_model(settings.model).to(device) for _ in range(2))
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        try:
            expected = model(images)
        except (RuntimeError, AssertionError) as error:
            raise RequestError(
                f"{settings.model} does not accept {setting('image_size', settings.image_size)}; use a larger size"
            ) from error
    reference = None if candidate.other_model else expected
    one_image = candidate.latency_build or candidate.build
    forwards = candidate.build(model, images), one_image(same_model, images[:1])
    return _entry(title, *forwards, images, reference, candidate.ours)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    build: Callable[[nn.Module, torch.Tensor], Forward]
    """Returns the forward pass to measure, for a float32 model in evaluation mode and example images."""
    latency_build: Callable[[nn.Module, torch.Tensor], Forward] | None = None
    """The same for a single image; `build` if not given."""
    ours: bool = False
    other_model: bool = False
    """Whether it ignores the model and runs another one."""


def _candidates(settings: Settings, device: str) -> dict[str, _Candidate]:
    """Return the candidates for a device type that the installed packages support, by title."""
    low = torch.bfloat16 if resolve_precision("auto", device) == "bf16" else torch.float32
    name = str(low).removeprefix("torch.")
    openvino = device == "cpu" and find_spec("openvino") and find_spec("nncf")
    frozen = partial(_frozen, dtype=low)

    def other(model: nn.Module, images: torch.Tensor) -> Forward:
        assert settings.equal_flops is not None
        return frozen(seeded_model(settings.equal_flops).to(images.device), images)

    candidates = {
        "timm, eager, float32": _Candidate(build=lambda model, images: model),
        f"timm, eager, {name}, channels last": _Candidate(build=partial(_cast, dtype=low)),
        f"timm, torch.compile with freezing, {name}, channels last": _Candidate(build=frozen),
    }
    if settings.equal_flops is not None:
        candidates[f"{settings.equal_flops}, torch.compile with freezing, {name}, channels last"] = _Candidate(
            build=other, other_model=True
        )
    if settings.model in TWINS and find_spec("torchvision"):
        twin = partial(_torchvision_twin, TWINS[settings.model])
        candidates["torchvision, eager, float32"] = _Candidate(build=twin)
    if device == "cpu" and find_spec("onnxruntime") and find_spec("onnxscript"):
        candidates["ONNX Runtime, float32"] = _Candidate(build=_onnxruntime)
    if openvino:
        candidates[f"OpenVINO, {name}"] = _Candidate(build=partial(_openvino, dtype=low, int8=False))
        candidates["OpenVINO, int8 (NNCF)"] = _Candidate(build=partial(_openvino, dtype=low, int8=True))

    def ours(**settings: Any) -> _Candidate:
        build = partial(_optimized, dtype=low, **settings)
        return _Candidate(build=build, latency_build=partial(build, objective="latency"), ours=True)

    candidates[f"resnext_hub.optimize, {name}"] = ours()
    if openvino:
        candidates[f"resnext_hub.optimize, OpenVINO, {name}"] = ours(engine="openvino")
        candidates["resnext_hub.optimize, OpenVINO, int8"] = ours(engine="openvino", int8=True)
    return candidates


def seeded_model(name: str) -> nn.Module:
    """Build a model with seeded random weights and batch norms, since a fresh one has zero-initialized branches."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.eval().requires_grad_(False)
    assert isinstance(model, nn.Module)
    return model


def _entry(
    title: str,
    forward: Forward,
    forward_one: Forward,
    images: torch.Tensor,
    expected: torch.Tensor | None,
    ours: bool,
) -> Entry:
    device = images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        logits = forward(images).float()
    facts = []
    if expected is not None:
        facts.append(f"error {float((logits - expected).norm() / expected.norm()):.1e}")
    if device.type == "cuda":
        facts.append(f"peak {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB")

    def run() -> float:
        def work(passes: int = PASSES) -> None:
            with torch.no_grad():
                for _ in range(passes):
                    forward(images)

        work(1)  # warmup: the entry before used the caches and threads
        return images_per_second(work, PASSES * len(images), device)

    def one_image() -> list[float]:
        image = images[:1].clone()
        with torch.no_grad():
            return call_seconds(lambda: forward_one(image), device)

    return Entry(name=title, run=run, quality=", ".join(facts), ours=ours, one_image=one_image)


def _cast(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Forward:
    model = model.to(dtype).to(memory_format=torch.channels_last)
    return lambda images: model(images.to(dtype, memory_format=torch.channels_last)).float()


def _frozen(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Forward:
    model = model.to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled, _ = compile_frozen(model, images.to(dtype, memory_format=torch.channels_last))
    return lambda images: compiled(images.to(dtype, memory_format=torch.channels_last)).float()


def _torchvision_twin(name: str, model: nn.Module, images: torch.Tensor) -> Forward:
    """Return torchvision's own model with the same weights."""
    import torchvision

    twin: nn.Module = torchvision.models.get_model(name)
    twin.load_state_dict(model.state_dict())
    return twin.eval().requires_grad_(False).to(images.device)


def _openvino(model: nn.Module, images: torch.Tensor, dtype: torch.dtype, int8: bool) -> Forward:
    """Return the unmodified model, compiled by OpenVINO."""
    from resnext_hub.kernels.openvino import OpenVinoModel, convert

    return OpenVinoModel(convert(model, images, images if int8 else None), dtype)


def _onnxruntime(model: nn.Module, images: torch.Tensor) -> Forward:
    import onnxruntime

    program = torch.onnx.export(model, (images,), dynamo=True, input_names=["images"], verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _optimized(
    model: nn.Module,
    images: torch.Tensor,
    dtype: torch.dtype,
    engine: Literal["torch", "openvino"] = "torch",
    int8: bool = False,
    objective: Objective = "throughput",
) -> Forward:
    calibration = images if int8 else None
    return optimize(model, images, dtype=dtype, engine=engine, calibration=calibration, objective=objective)
