"""Load a saved model: check `config.json` and `model.safetensors` of a folder against each other, then read them.

Run folders, model folders, repositories on the Hub and timm's released weights are all loaded here. The config is
compared with the header of the weights on a model without values, so a wrong config allocates nothing. No other file
is read, and weights only by the safetensors library.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import require_regular
from resnext_hub.models.input_config import InputConfig
from resnext_hub.models.ood import OOD, OodScore, read_ood
from resnext_hub.models.saved_config import WAY_OUT, ModelConfig, named_config, parse_config, read_config
from resnext_hub.models.weights import problem_of, strip_wrapper
from resnext_hub.text import printable

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "ModelConfig",
    "SavedModel",
    "check_fit",
    "check_saving",
    "classifier_names",
    "named_config",
    "read_model",
    "without_values",
]

CONFIG = "config.json"

WEIGHTS = "model.safetensors"

_BUILD_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, LookupError, ArithmeticError)
"""Exceptions that architectures raise for arguments that they do not accept."""

_FLOATS = ("F16", "BF16", "F32", "F64")

HEADER_BYTES = 1 << 22
"""Largest header in bytes of a safetensors file; timm's largest model needs 0.3 MB for 3,108 tensors."""

_Shapes = dict[str, tuple[tuple[int, ...], bool]]
"""Shape of each tensor, and whether it has a floating-point type."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model that can be built, and matching weights, if any."""

    where: str
    """How the user named it, printable; messages begin with it."""
    config: ModelConfig
    weights: Path | None = None
    """A safetensors file with a matching header; None for random weights."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names: as stated, ImageNet's for timm's ImageNet weights, else the class indices."""
        if self.config.label_names is not None:
            return self.config.label_names
        classes = self.config.num_classes
        if classes == 1000 and str(self.config.pretrained_cfg.get("tag")).endswith("in1k"):
            return tuple(timm.data.ImageNetInfo().label_descriptions())
        return tuple(map(str, range(classes)))

    @property
    def input(self) -> InputConfig:
        """Size and preprocessing of the model's images."""
        return InputConfig.resolve(self.config.pretrained_cfg)

    def load(self) -> nn.Module:
        """Build the model with its weights, in float32 and evaluation mode, on the CPU.

        Raises:
            RequestError: If the weights hold invalid values.
        """
        model = self.build(self.config.num_classes)
        self._fill(model, frozenset())
        return model.eval()

    def start(self, label_names: Sequence[str], drop_rate: float = 0.0, drop_path_rate: float = 0.0) -> nn.Module:
        """Build the initial model of a training run.

        The classifier is kept if it has the same classes, with its rows in their new order; otherwise it is new.

        Raises:
            RequestError: If the architecture does not accept a rate, or the weights hold invalid values.
        """
        model = self.build(len(label_names), drop_rate, drop_path_rate)
        if self.weights is None:
            return model
        head = classifier_names(model)
        if not self.keeps_classifier(label_names):
            self._fill(model, head)
            return model
        self._fill(model, frozenset())
        old = self.config.label_names
        if old is not None and old != tuple(label_names):
            rows = torch.tensor([old.index(name) for name in label_names])
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    if name in head:
                        tensor.copy_(tensor[rows])
        return model

    def keeps_classifier(self, label_names: Sequence[str]) -> bool:
        """Return whether the weights hold a classifier for these classes; without stated names, their number counts."""
        if self.weights is None or self.config.num_classes != len(label_names):
            return False
        old = self.config.label_names
        if old is None or old == tuple(label_names):
            return True
        return len(set(old)) == len(old) and set(old) == set(label_names)

    def classifier_for(self, label_names: Sequence[str]) -> str:
        """Describe the classifier of a training run on these classes."""
        old = self.config.label_names
        if not self.keeps_classifier(label_names):
            differing = (
                "different class names"
                if self.config.num_classes == len(label_names)
                else "a different number of classes"
            )
            return f"new, because the pretrained model has {differing}"
        if old is None:
            return "kept, because the pretrained model has no class names"
        return "kept" if old == tuple(label_names) else "kept, reordered to match the class names"

    def build(self, num_classes: int, drop_rate: float = 0.0, drop_path_rate: float = 0.0) -> nn.Module:
        """Build the model with random weights and a number of classes.

        Raises:
            RequestError: If the architecture does not accept the arguments.
        """
        rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        extra = {name: rate for name, rate in rates.items() if rate}
        try:
            return _create(self.config, num_classes, **extra)
        except NotImplementedError:  # only on the meta device; see without_values
            raise
        except _BUILD_ERRORS as error:
            stated = {**self.config.model_args, **extra}
            raise RequestError(
                f"{self.where}: {self.config.architecture} cannot be built with {_shown(stated)}: {one_line(error)}"
            ) from error

    def load_ood(self) -> OodScore | None:
        """Load the score of out-of-distribution images, or return None if the model folder does not contain it.

        Raises:
            RequestError: If the file is damaged, or not the one of this model.
        """
        sha256 = self.config.ood_sha256
        path = None if self.weights is None else self.weights.with_name(OOD)
        return None if sha256 is None or path is None or not path.exists() else read_ood(self.where, path, sha256)

    @torch.no_grad()
    def _fill(self, model: nn.Module, skip: frozenset[str]) -> None:
        """Copy the weights into a model, whose own tensors are aligned for fast kernels, unlike those of a file."""
        assert self.weights is not None
        try:
            with safe_open(self.weights, "pt") as file:
                names = strip_wrapper(file.keys())
                for name, target in model.state_dict().items():
                    if name in skip or name not in names:
                        continue
                    target.copy_(file.get_tensor(names[name]))
                    problem = problem_of(name, target)
                    if problem:
                        raise RequestError(f"{self.where}: {name} in {self.weights.name} {problem}; use other weights")
        except (SafetensorError, OSError) as error:
            raise _damaged(self.where, self.weights, error) from error


def read_model(where: str, config: Path, weights: Path | None) -> SavedModel:
    """Read config.json and the header of the weights, and compare them without allocating tensors.

    Args:
        where: How the user named the model, printable; messages begin with it.
        config: The config.json.
        weights: The safetensors file; None for random weights.

    Raises:
        RequestError: If a file is invalid, or they do not match.
    """
    return check_fit(SavedModel(where=where, config=read_config(config, where), weights=weights))


def check_fit(saved: SavedModel) -> SavedModel:
    """Compare a model with the header of its weights, without allocating tensors.

    Raises:
        RequestError: If they do not match; the differing tensors are named.
    """
    config = saved.config
    found = None if saved.weights is None else _header(saved.where, saved.weights)
    if found is not None:
        _bound_arguments(saved.where, config, found)
    expected, head = _expected(saved)
    _bound_memory(saved, expected)
    if found is not None:
        _compare(saved, found, expected, head)
    return saved


def check_saving(where: str, config: dict[str, Any], model: nn.Module) -> None:
    """Raise RequestError unless a model, with or without values, can be loaded again from this config.json."""
    saved = SavedModel(where=where, config=parse_config(config, where))
    expected, head = _expected(saved)
    _compare(saved, _shapes_of(model), expected, head)


def _compare(saved: SavedModel, found: _Shapes, expected: _Shapes, head: frozenset[str]) -> None:
    config = saved.config
    for name in sorted(head & found.keys()):
        rows = found[name][0][:1]
        if rows not in ((), (config.num_classes,)) and found[name][0][1:] == expected[name][0][1:]:
            raise RequestError(
                f"{saved.where}: {CONFIG} has num_classes {config.num_classes}: expected {rows[0]}, the number of rows "
                f"of {name} in {WEIGHTS}; {WAY_OUT}"
            )
    problems = _differences(found, expected)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        stated = f" with {_shown(config.model_args)}" if config.model_args else ""
        raise RequestError(
            f"{saved.where}: {WEIGHTS} does not match the architecture in {CONFIG} ({config.architecture}{stated}): "
            f"{'; '.join(problems[:3])}{more}"
        )


def classifier_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the classifier's tensors."""
    head: Any = model.get_classifier()  # type: ignore[operator] # a method of every timm model
    heads = head if isinstance(head, (tuple, list, nn.ModuleList)) else [head]
    prefixes = [name for name, module in model.named_modules() if any(module is part for part in heads)]
    return frozenset(
        name for name in model.state_dict() if any(name.startswith(f"{prefix}.") for prefix in prefixes if prefix)
    )


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the meta device: with shapes, without values."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # some versions of timm compute widths of some architectures with torch
        return build().to("meta")


def _create(config: ModelConfig, num_classes: int, **rates: float) -> nn.Module:
    model: nn.Module = timm.create_model(
        config.architecture,
        pretrained=False,
        pretrained_cfg=dict(config.pretrained_cfg),
        num_classes=num_classes,
        **{**config.model_args, **rates},
    )
    return model


def _header(where: str, weights: Path) -> _Shapes:
    """Return the tensors in the header of a safetensors file; the library checks it against the size of the file."""
    try:
        _bound_header(weights)
        with safe_open(weights, "pt") as file:
            found = {}
            for name, key in strip_wrapper(file.keys()).items():
                part = file.get_slice(key)
                dtype = part.get_dtype()
                if dtype not in (*_FLOATS, "I64"):
                    raise RequestError(
                        f"{where}: {printable(name)} in {weights.name} is of type {dtype}: expected "
                        f"{', '.join(_FLOATS)}; use weights that are not quantized"
                    )
                found[name] = (tuple(part.get_shape()), dtype != "I64")
            return found
    except (SafetensorError, OSError) as error:
        raise _damaged(where, weights, error) from error


def _bound_header(weights: Path) -> None:
    """Raise SafetensorError if a header is longer than that of any model; comparing a million tensors takes minutes."""
    require_regular(weights)
    with open(weights, "rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) == 8 and length > HEADER_BYTES:  # safetensors reports a shorter file itself
        raise SafetensorError(f"it declares a header of {length:,} bytes; expected at most {HEADER_BYTES:,}")


def _damaged(where: str, weights: Path, error: Exception) -> RequestError:
    reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
    return RequestError(f"{where}: {weights.name} cannot be read ({reason}): expected a complete safetensors file")


def _bound_arguments(where: str, config: ModelConfig, found: _Shapes) -> None:
    """Raise RequestError for arguments larger than the weights allow, before building even a model without values.

    Integers are numbers of layers or channels. Both show in the shapes, and each layer has at least one tensor.
    """
    largest = max([1024, len(found), *(max(shape, default=1) for shape, _ in found.values())])
    for key, value in config.model_args.items():
        total = sum(value) if key == "layers" else 0
        numbers = value if isinstance(value, list) else [value]
        if total > len(found) or any(isinstance(number, int) and number > largest for number in numbers):
            raise RequestError(
                f"{where}: {CONFIG} has model_args.{printable(key)} {value}: too large for the {len(found)} tensors "
                f"of {WEIGHTS}; {WAY_OUT}"
            )


def _bound_memory(saved: SavedModel, expected: _Shapes) -> None:
    needed = 4 * sum(math.prod(shape) for shape, _ in expected.values())
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise RequestError(
            f"{saved.where}: a {saved.config.architecture} with {_shown(saved.config.model_args)} needs "
            f"{needed / 1e9:.0f} GB of memory, but this machine has only {present / 1e9:.0f} GB; use a smaller model"
        )


def _expected(saved: SavedModel) -> tuple[_Shapes, frozenset[str]]:
    """Return the shapes of a model's tensors, and the names of the classifier's tensors.

    Raises:
        RequestError: If the model cannot be built.
    """
    config = saved.config
    size = list(config.pretrained_cfg["input_size"])
    fixed = config.pretrained_cfg.get("fixed_input_size", False)
    try:
        return _outline(config.architecture, config.num_classes, json.dumps([config.model_args, size, fixed]))
    except _BUILD_ERRORS as error:
        raise RequestError(
            f"{saved.where}: {config.architecture} cannot be built with {_shown(config.model_args)} and input_size "
            f"{size} from {CONFIG}: {one_line(error)}; {WAY_OUT}"
        ) from error


@lru_cache(maxsize=64)
def _outline(architecture: str, num_classes: int, arguments: str) -> tuple[_Shapes, frozenset[str]]:
    model_args, size, fixed = json.loads(arguments)
    config = ModelConfig(
        architecture=architecture,
        model_args=model_args,
        num_classes=num_classes,
        label_names=None,
        pretrained_cfg={"input_size": tuple(size), "fixed_input_size": fixed},
    )
    model = without_values(lambda: _create(config, num_classes)).eval()
    _check_input(model, size, num_classes)
    return _shapes_of(model), classifier_names(model)


def _shapes_of(model: nn.Module) -> _Shapes:
    return {name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _check_input(model: nn.Module, input_size: Sequence[int], num_classes: int) -> None:
    """Raise AssertionError if a model does not map images of this size to one logit per class."""
    try:
        output = model(torch.empty(1, *input_size, device="meta"))
    except RuntimeError:  # some architectures cannot run on the meta device
        return
    shape = tuple(getattr(output, "shape", ()))
    assert not num_classes or shape == (1, num_classes), f"its output is {list(shape)}, not {[1, num_classes]}"


def _differences(found: _Shapes, expected: _Shapes) -> list[str]:
    """Describe tensors that differ; old files may lack the counters of batch norm, which evaluation does not use."""
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{printable(name)[:80]} is unexpected" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        (shape, floating), (expected_shape, expected_floating) = found[name], expected[name]
        if shape != expected_shape:
            problems.append(f"{name} is {list(shape)}, expected {list(expected_shape)}")
        elif floating != expected_floating:
            problems.append(f"{name} is {'not ' if expected_floating else ''}of a floating-point type")
    return problems


def _shown(model_args: dict[str, Any]) -> str:
    return printable(", ".join(f"{key}={value}" for key, value in model_args.items()))[:200] or "no arguments"
