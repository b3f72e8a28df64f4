"""A network's forward pass, beside its peers: float32 images in, float32 logits out, the same for all."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Literal

import timm
import torch
from torch import nn

from resnext_hub.benchmark.contest import (
    Contender,
    Contest,
    equal_in_flops,
    hold_contest,
    images_per_second,
    in_its_own_process,
)
from resnext_hub.data.transforms import IMAGE_SIZE
from resnext_hub.errors import RequestError
from resnext_hub.inference.optimize import compile_frozen, optimize
from resnext_hub.machine import device_type, resolve_precision
from resnext_hub.settings import Range, check_fields

_logger = logging.getLogger(__name__)

Network = Callable[[torch.Tensor], torch.Tensor]

PASSES = 3
"""Batches that a contender computes in a round."""

TWINS = {"resnext_g32": "resnext50_32x4d", "resnext101_g32_w8": "resnext101_32x8d", "resnet50": "resnet50"}
"""torchvision's own networks, by timm's names of the same."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str = "resnext_g32"
    """A name that timm knows; its weights are drawn from a seed, as no speed depends on them."""
    equal_flops: str | None = None
    """A network without groups, compiled beside it; if not given, one with about as many FLOPs, where there is one."""
    image_size: Annotated[int, Range(1, IMAGE_SIZE)] = 224
    """Height and width of the images in pixels."""
    batch_size: Annotated[int, Range(1, 1 << 20)] = 16
    """Images computed at once."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in filter(None, (self.model, self.equal_flops)):
            if name.partition(".")[0] not in timm.list_models():
                raise RequestError(f"{name}: timm knows no such network")


def measure(settings: Settings, rounds: int) -> Contest:
    """Let all contenders compute the same images by turns, each in a process of its own.

    Raises:
        RequestError: If the network does not take such images.
    """
    device = torch.device(device_type())
    settings = replace(settings, equal_flops=settings.equal_flops or equal_in_flops(settings.model))
    with contextlib.ExitStack() as stack:
        found = []
        for title in _entries(settings, device.type):
            found.append(stack.enter_context(in_its_own_process(title, build_contender, settings, title)))
            _logger.info("ready: %s", title)
        notes = (
            "Error: norm of the difference from timm's float32 logits over the norm of those, on "
            f"{settings.batch_size} images of noise"
            + (f". {settings.equal_flops} is another network, so it has none" if settings.equal_flops else "")
            + ". Each computes in a process of its own.",
        )
        return hold_contest("inference", vars(settings), found, rounds, device, notes)


def build_contender(settings: Settings, title: str) -> Contender:
    """Build one of the contenders.

    Raises:
        RequestError: If the network does not take such images.
    """
    device = torch.device(device_type())
    torch.backends.cudnn.benchmark = True
    entry = _entries(settings, device.type)[title]
    model = drawn_network(settings.model).to(device)
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        try:
            expected = model(images)
        except (RuntimeError, AssertionError) as error:
            raise RequestError(f"--model {settings.model} does not take --image-size {settings.image_size}") from error
    return _contender(title, entry.build(model, images), images, None if entry.another else expected, entry.ours)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    build: Callable[[nn.Module, torch.Tensor], Network]
    """Gives what computes images as a network, in float32 in evaluation mode, does."""
    ours: bool = False
    another: bool = False
    """Whether it computes another network than the one that it is given."""


def _entries(settings: Settings, device: str) -> dict[str, _Entry]:
    """Give what can take part on a kind of device, with what is installed."""
    low = torch.bfloat16 if resolve_precision("auto", device) == "bf16" else torch.float32
    name = str(low).removeprefix("torch.")
    openvino = device == "cpu" and find_spec("openvino") and find_spec("nncf")
    frozen = partial(_frozen, dtype=low)

    def other(model: nn.Module, images: torch.Tensor) -> Network:
        assert settings.equal_flops is not None
        return frozen(drawn_network(settings.equal_flops).to(images.device), images)

    entries = {
        "timm, as it comes (eager, float32)": _Entry(build=lambda model, images: model),
        f"timm, eager, {name}, channels last": _Entry(build=partial(_cast, dtype=low)),
        f"timm, torch.compile and freezing, {name}, channels last": _Entry(build=frozen),
    }
    if settings.equal_flops is not None:
        entries[f"{settings.equal_flops}, the same"] = _Entry(build=other, another=True)
    if settings.model in TWINS and find_spec("torchvision"):
        twin = partial(_torchvision_twin, TWINS[settings.model])
        entries["torchvision, as it comes (eager, float32)"] = _Entry(build=twin)
    if device == "cpu" and find_spec("onnxruntime") and find_spec("onnxscript"):
        entries["ONNX Runtime, float32"] = _Entry(build=_onnxruntime)
    if openvino:
        entries[f"OpenVINO, {name}"] = _Entry(build=partial(_openvino, dtype=low, int8=False))
        entries["OpenVINO, int8 (NNCF)"] = _Entry(build=partial(_openvino, dtype=low, int8=True))
    entries[f"resnext_hub.optimize, {name}"] = _Entry(build=partial(_optimized, dtype=low), ours=True)
    if openvino:
        entries[f"resnext_hub.optimize, OpenVINO, {name}"] = _Entry(
            build=partial(_optimized, dtype=low, engine="openvino"), ours=True
        )
        entries["resnext_hub.optimize, OpenVINO, int8"] = _Entry(
            build=partial(_optimized, dtype=low, engine="openvino", int8=True), ours=True
        )
    return entries


def drawn_network(name: str) -> nn.Module:
    """Build a network with weights from a seed, in which every branch counts: fresh ones have branches of zeros."""
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


def _contender(
    title: str, network: Network, images: torch.Tensor, expected: torch.Tensor | None, ours: bool
) -> Contender:
    device = images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        found = network(images).float()
    facts = []
    if expected is not None:
        facts.append(f"error {float((found - expected).norm() / expected.norm()):.1e}")
    if device.type == "cuda":
        facts.append(f"peak {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB")

    def run() -> float:
        def work(passes: int = PASSES) -> None:
            with torch.no_grad():
                for _ in range(passes):
                    network(images)

        work(1)  # the one before has left caches and its threads in a state of its own
        return images_per_second(work, PASSES * len(images), device)

    return Contender(name=title, run=run, quality=", ".join(facts), ours=ours)


def _cast(network: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Network:
    network = network.to(dtype).to(memory_format=torch.channels_last)
    return lambda images: network(images.to(dtype, memory_format=torch.channels_last)).float()


def _frozen(network: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Network:
    network = network.to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled, _ = compile_frozen(network, images.to(dtype, memory_format=torch.channels_last))
    return lambda images: compiled(images.to(dtype, memory_format=torch.channels_last)).float()


def _torchvision_twin(name: str, model: nn.Module, images: torch.Tensor) -> Network:
    """Give torchvision's own network with the same weights."""
    import torchvision

    twin: nn.Module = torchvision.models.get_model(name)
    twin.load_state_dict(model.state_dict())
    return twin.eval().requires_grad_(False).to(images.device)


def _openvino(model: nn.Module, images: torch.Tensor, dtype: torch.dtype, int8: bool) -> Network:
    """Give OpenVINO with the network as it is."""
    from resnext_hub.kernels.openvino import OpenVinoModel, convert

    return OpenVinoModel(convert(model, images, images if int8 else None), dtype)


def _onnxruntime(model: nn.Module, images: torch.Tensor) -> Network:
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
) -> Network:
    return optimize(model, images, dtype=dtype, engine=engine, calibration=images if int8 else None)
