"""A network's forward pass, beside its peers: float32 pictures in, float32 logits out, the same for all."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import timm
import torch
from torch import nn

from resnext_hub.benchmark.contest import Contender, Contest, hold_contest, images_per_second
from resnext_hub.errors import RequestError
from resnext_hub.inference.optimize import compile_frozen, optimize
from resnext_hub.machine import device_type, resolve_precision

_logger = logging.getLogger(__name__)

Network = Callable[[torch.Tensor], torch.Tensor]

PASSES = 3
"""Batches that a contender computes in a round."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str = "resnext_g32"
    """A name that timm knows; its weights are drawn from a seed, as no speed depends on them."""
    equal_flops: str = "resnet50"
    """An ordinary network of as many FLOPs, compiled beside it."""
    image_size: int = 224
    """Height and width of the pictures in pixels."""
    batch_size: int = 16
    """Pictures computed at once."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.image_size < 1:
            raise RequestError(f"--batch-size {self.batch_size} --image-size {self.image_size}: expected at least 1")
        for name in (self.model, self.equal_flops):
            if name.partition(".")[0] not in timm.list_models():
                raise RequestError(f"{name}: timm knows no such network")


def measure(settings: Settings, rounds: int) -> Contest:
    """Let all contenders compute the same pictures by turns.

    Raises:
        RequestError: If the network does not take such pictures.
    """
    device = torch.device(device_type())
    torch.backends.cudnn.benchmark = True
    model = drawn_network(settings.model).to(device)
    other = drawn_network(settings.equal_flops).to(device)
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        try:
            expected = model(images)
        except (RuntimeError, AssertionError) as error:
            raise RequestError(f"--model {settings.model} does not take --image-size {settings.image_size}") from error
    low = torch.bfloat16 if resolve_precision("auto", device.type) == "bf16" else torch.float32
    name = str(low).removeprefix("torch.")

    found: list[Contender] = []

    def enter(title: str, network: Network, reference: torch.Tensor | None = expected, ours: bool = False) -> None:
        _logger.info("ready: %s", title)
        found.append(_contender(title, network, images, reference, ours))

    enter("timm, as it comes (eager, float32)", model)
    enter(f"timm, eager, {name}, channels last", _cast(copy.deepcopy(model), low))
    enter(f"timm, torch.compile and freezing, {name}, channels last", _frozen(model, images, low))
    enter(f"{settings.equal_flops}, the same", _frozen(other, images, low), reference=None)
    if twin := _torchvision_twin(settings.model, model):
        enter("torchvision, as it comes (eager, float32)", twin.to(device))
    if device.type == "cpu":
        for title, build in _runtimes(name, low).items():
            enter(title, build(model, images))
    enter(f"resnext_hub.optimize, {name}", optimize(model, images, dtype=low), ours=True)
    if device.type == "cpu" and find_spec("openvino") and find_spec("nncf"):
        enter(
            f"resnext_hub.optimize, OpenVINO, {name}", optimize(model, images, dtype=low, engine="openvino"), ours=True
        )
        fast = optimize(model, images, dtype=low, engine="openvino", calibration=images)
        enter("resnext_hub.optimize, OpenVINO, int8", fast, ours=True)
    notes = (
        f"Error: norm of the difference from timm's float32 logits over the norm of those, on {len(images)} pictures "
        f"of noise. {settings.equal_flops} is another network, so it has none.",
    )
    return hold_contest("inference", vars(settings), found, rounds, device, notes)


def drawn_network(name: str, classes: int = 1000) -> nn.Module:
    """Build a network with weights from a seed, in which every branch counts: fresh ones have branches of zeros."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes)
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


def _cast(network: nn.Module, dtype: torch.dtype) -> Network:
    network = network.to(dtype).to(memory_format=torch.channels_last)
    return lambda images: network(images.to(dtype, memory_format=torch.channels_last)).float()


def _frozen(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Network:
    network = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled, _ = compile_frozen(network, images.to(dtype, memory_format=torch.channels_last))
    return lambda images: compiled(images.to(dtype, memory_format=torch.channels_last)).float()


def _torchvision_twin(name: str, model: nn.Module) -> nn.Module | None:
    """Give torchvision's own network for the variants that it has, with the same weights."""
    twins = {"resnext_g32": "resnext50_32x4d", "resnext101_g32_w8": "resnext101_32x8d", "resnet50": "resnet50"}
    if name not in twins or not find_spec("torchvision"):
        return None
    import torchvision

    twin: nn.Module = torchvision.models.get_model(twins[name])
    twin.load_state_dict(model.state_dict())
    return twin.eval().requires_grad_(False)


def _runtimes(name: str, dtype: torch.dtype) -> dict[str, Callable[[nn.Module, torch.Tensor], Network]]:
    """Give the runtimes that are installed, with the network as it is."""
    runtimes: dict[str, Callable[[nn.Module, torch.Tensor], Network]] = {}
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        runtimes["ONNX Runtime, float32"] = _onnxruntime
    if find_spec("openvino") and find_spec("nncf"):
        from resnext_hub.inference.openvino import OpenVinoNetwork, convert

        runtimes[f"OpenVINO, {name}"] = lambda model, images: OpenVinoNetwork(convert(model, images), dtype)
        runtimes["OpenVINO, int8 (NNCF)"] = lambda model, images: OpenVinoNetwork(convert(model, images, images), dtype)
    return runtimes


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
