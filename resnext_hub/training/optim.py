"""The optimizer, built by timm, and the learning rate as a function of the step."""

import dataclasses
import inspect
import json
import math
import os
import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from resnext_hub.errors import RequestError, one_line, setting
from resnext_hub.models.saved import classifier_names
from resnext_hub.settings import Range, check_fields, did_you_mean, shown


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate."""

    optimizer: str = "sgd"
    """Name of a timm optimizer, such as sgd, adamw or lamb."""
    lr: Annotated[float, Range(0, 1000, above=True)] | None = None
    """Peak learning rate; if not given, it is derived from the optimizer, the global batch size and, for SGD, whether
    the weights are pretrained."""
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Momentum, at least 0 and below 1, for optimizers that use it."""
    weight_decay: Annotated[float, Range(0, 1000)] = 1e-4
    """Weight decay; not applied to biases and norm layers."""
    warmup_epochs: Annotated[float, Range(0, 1_000_000)] = 5.0
    """Number of epochs of linear learning rate warmup, capped at half of the run."""
    clip_grad: Annotated[float, Range(0, 1_000_000_000, above=True)] | None = None
    """Clip gradients to this total L2 norm; no clipping if not given."""

    def __post_init__(self) -> None:
        from timm.optim import list_optimizers

        check_fields(self)
        known = list_optimizers()
        if self.optimizer not in known:
            hint = did_you_mean(self.optimizer, known) or "; choose another, such as sgd, adamw or lamb"
            raise RequestError(f"{setting('optimizer', shown(self.optimizer))} is not a timm optimizer{hint}")


def check_optimizer(config: OptimConfig, device: str) -> None:
    """Take a step on a tiny model, to check that the optimizer works here and that its state can be saved.

    Raises:
        RequestError: If it needs a GPU, a library or arguments that are missing, or if its state cannot be saved.
    """
    needs_gpu = device == "cuda" and config.optimizer.startswith(("bnb", "fused"))
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if needs_gpu else torch.device("cpu")
    # kron compiles its step, which takes minutes
    with (
        torch.random.fork_rng(devices=[]),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(action="ignore"),
    ):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)).to(place)
        try:
            optimizer = build_optimizer(model, dataclasses.replace(config, lr=config.lr or 1e-3))
            model(torch.ones(2, 1, 3, 3, device=place)).sum().backward()
            optimizer.step()
        except (AssertionError, ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"{setting('optimizer', config.optimizer)} does not work on this machine ({one_line(error)[:120]}); "
                "choose another, such as sgd, adamw or lamb"
            ) from error
    optimizer_state(optimizer)


def derive_lr(optimizer: str, batch_size: int, pretrained: bool) -> float:
    """Return a default learning rate, proportional to the global batch size.

    SGD uses that of the paper, 0.1 at batch size 256 (section 4), and a tenth of it from pretrained weights. Adaptive
    optimizers use 1e-3 at batch size 512 in both cases.
    """
    if "sgd" in optimizer or optimizer in ("momentum", "nesterov"):
        return 0.1 * batch_size / 256 * (0.1 if pretrained else 1.0)
    return 1e-3 * batch_size / 512


def lr_at(step: int, total_steps: int, warmup_steps: int, lr: float) -> float:
    """Return the learning rate of a step, counted from 0: linear warmup, then cosine decay to 0 at `total_steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    scaled: bool = False,
    layer_decay: float = 1.0,
    head_lr: float | None = None,
) -> torch.optim.Optimizer:
    """Build timm's optimizer for a model; weight decay applies to weights of linear and convolution layers only.

    The fused implementation of torch is used where there is one, except with scaled gradients.

    Args:
        model: The model, on its device.
        config: The optimizer and its settings.
        scaled: Whether gradients are scaled for fp16. A fused optimizer skips a step that overflows internally, so it
            could not be counted.
        layer_decay: Factor of the learning rate from each group of layers to the one before it.
        head_lr: Learning rate of the classifier; that of all other layers if not given.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_class

    fuses = "fused" in inspect.signature(get_optimizer_class(config.optimizer, bind_defaults=False)).parameters
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=layer_decay if layer_decay < 1 else None,
        **({"fused": True} if fuses and not scaled and _can_fuse(model) else {}),
    )
    if head_lr is not None:
        assert config.lr is not None
        _scale_head(optimizer, model, head_lr / config.lr)
    return optimizer


def _scale_head(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """Move the classifier into separate parameter groups with a scaled learning rate."""
    head = classifier_names(model)
    own = {id(parameter) for name, parameter in model.named_parameters() if name in head}
    groups: list[dict[str, Any]] = optimizer.param_groups
    for group in list(groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in own]
        if mine:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            groups.append({**group, "params": mine, "lr_scale": scale})
    groups[:] = [group for group in groups if group["params"]]


def _can_fuse(model: nn.Module) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times the `lr_scale` that timm gave some groups."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors, by key `state.PARAMETER.NAME` or `group.INDEX.NAME`, and JSON values.

    Raises:
        RequestError: If the optimizer keeps state that is neither a tensor nor JSON.
    """
    content = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "group": {}}
    entries = [("state", index, values) for index, values in content["state"].items()]
    entries += [("group", index, values) for index, values in enumerate(content["param_groups"])]
    for kind, index, values in entries:
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{kind}.{index}.{name}"] = value
            elif name not in ("params", "param_names"):
                facts[kind].setdefault(str(index), {})[name] = value
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"the state of {type(optimizer).__name__} cannot be saved in a checkpoint ({one_line(error)}); "
            f"choose another {setting('optimizer')}, such as sgd, adamw or lamb"
        ) from error
    return tensors, facts


def require_same_kind(optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Check that saved facts belong to the same kind of optimizer; other versions of torch may have more options.

    Raises:
        ValueError: If they belong to another kind.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    if len(facts["group"]) != len(groups):
        raise ValueError(f"it has {len(facts['group'])} parameter groups, expected {len(groups)}")
    for index, group in enumerate(groups):
        before, now = set(facts["group"][str(index)]), set(group) - {"params", "param_names"}
        now = {name for name in now if not isinstance(group[name], torch.Tensor)}
        if before - now and now - before:
            name = type(optimizer).__name__
            raise ValueError(f"its optimizer has the option {min(before - now)}, which {name} does not have")


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], facts: dict[str, Any]
) -> None:
    """Load a state that `optimizer_state` split, in the memory format of the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in facts["state"].items()}
    for index, values in facts["group"].items():
        groups[int(index)] |= values
    for key, tensor in tensors.items():
        kind, index, name = key.split(".", 2)
        if kind == "group":
            groups[int(index)][name] = tensor
            continue
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})
