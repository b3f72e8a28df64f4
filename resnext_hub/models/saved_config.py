"""Read and validate the `config.json` of a saved model.

The layout is timm's. Keys that would make timm load other weights are refused; unknown top-level keys are ignored, as
in timm. Weights always come from the one file beside `config.json`.
"""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import timm
from msgspec import Meta, Struct
from timm.models import build_model_with_cfg, get_pretrained_cfg, model_entrypoint
from timm.models._pretrained import PretrainedCfg

from resnext_hub.errors import RequestError
from resnext_hub.files import read_json
from resnext_hub.models.resnext import VARIANTS
from resnext_hub.models.views import TestTimeAugmentation
from resnext_hub.text import printable

CONFIG_BYTES = 1 << 24
"""Largest config.json in bytes; the names of 21,841 classes take less than 1 MB."""

MAX_SIDE = 4096
"""Largest input size in pixels; timm's largest is 1,024."""

MAX_RESIZED = 8192
"""Longest side in pixels to which an image may be resized before the center crop: input size / crop_pct."""

CROP = (0.05, 1.25)
MEAN = (-1.0, 1.0)
STD = (1e-4, 1.0)
"""Ranges of crop_pct, mean and std, here and in the settings of a run. Mean and std are for pixels from 0 to 1, as in
timm's transforms; 123.675 is for pixels from 0 to 255."""

WAY_OUT = "correct config.json or use another model"

MULTI_LABEL = "multi_label_classification"
"""Value of `problem_type`, a key of transformers, if an image can have several labels."""

_STEERING = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset")
"""Keys of pretrained_cfg that make timm load other weights than those beside config.json, or only a part of them."""

_Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
_Channels = Annotated[int, Meta(ge=1, le=64)]
_Size = tuple[_Channels, _Side, _Side]
_Crop = Annotated[float, Meta(ge=CROP[0], le=CROP[1])]
_Mean = Annotated[float, Meta(ge=MEAN[0], le=MEAN[1])]
_Std = Annotated[float, Meta(ge=STD[0], le=STD[1])]
_Classes = Annotated[int, Meta(ge=0, le=10_000_000)]
_Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
_Rate = Annotated[float, Meta(ge=0.0, lt=1.0)]
_Width = Annotated[int, Meta(ge=1, le=1024)]
_Blocks = Annotated[int, Meta(ge=1, le=200)]
_Pool = Literal["avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"]
_LayerName = Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,32}$")]


class _PretrainedCfg(Struct):
    input_size: _Size = (3, 224, 224)
    test_input_size: _Size | None = None
    min_input_size: _Size | None = None
    fixed_input_size: bool = False
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bicubic"
    crop_pct: _Crop = 0.875
    test_crop_pct: _Crop | None = None
    crop_mode: Literal["center", "squash", "border"] = "center"
    mean: tuple[_Mean, ...] = (0.485, 0.456, 0.406)
    std: tuple[_Std, ...] = (0.229, 0.224, 0.225)
    num_classes: _Classes | None = None
    label_names: list[str] | dict[str, str] | None = None
    tag: str | None = None
    license: str | None = None


class _Config(Struct):
    architecture: str
    pretrained_cfg: dict[str, Any]
    num_classes: _Classes | None = None
    label_names: list[str] | dict[str, str] | None = None
    model_args: dict[str, Any] | None = None
    problem_type: str | None = None
    resnext_hub: dict[str, Any] | None = None


class _PluginFacts(Struct):
    tta: TestTimeAugmentation = "none"
    ood_sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    accept_thresholds: dict[Annotated[str, Meta(pattern=r"^0\.\d{1,4}$")], _Probability] | None = None


class _CommonArgs(Struct):
    num_classes: _Classes | None = None
    in_chans: _Channels | None = None
    global_pool: _Pool | None = None
    drop_rate: _Rate | None = None
    drop_path_rate: _Rate | None = None
    output_stride: Literal[8, 16, 32] | None = None
    cardinality: _Width | None = None
    base_width: _Width | None = None
    zero_init_last: bool | None = None


class _VariantArgs(_CommonArgs):
    layers: Annotated[list[_Blocks], Meta(min_length=3, max_length=4)] | None = None
    channels: Annotated[list[Annotated[int, Meta(ge=1, le=8192)]], Meta(min_length=3, max_length=4)] | None = None
    group_widths: Annotated[list[_Width], Meta(min_length=3, max_length=4)] | None = None
    shortcuts: bool | None = None


class _ResNetArgs(_CommonArgs):
    layers: Annotated[list[_Blocks], Meta(min_length=4, max_length=4)] | None = None
    channels: Annotated[list[Annotated[int, Meta(ge=1, le=8192)]], Meta(min_length=4, max_length=4)] | None = None
    stem_width: _Width | None = None
    stem_type: Literal["", "deep", "deep_tiered"] | None = None
    replace_stem_pool: bool | None = None
    block_reduce_first: Annotated[int, Meta(ge=1, le=16)] | None = None
    down_kernel_size: Literal[1, 3] | None = None
    avg_down: bool | None = None
    act_layer: _LayerName | None = None
    norm_layer: _LayerName | None = None
    aa_layer: _LayerName | None = None
    drop_block_rate: _Rate | None = None


_TRAINING_ARGS = ("drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last")
"""Arguments that do not affect inference; a new training run has its own."""

_RESERVED = (
    {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    | {"block", "block_args", "cfg", "device", "dtype", "feature_cls", "features_only", "out_indices", "pruned"}
) - {"kwargs"}
"""Arguments reserved for timm: the source of the weights, and what is built and how."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The configuration of a model."""

    architecture: str
    """timm architecture, or a variant of this package."""
    model_args: dict[str, Any]
    """Arguments by which the model differs from its architecture, except the number of classes."""
    num_classes: int
    """0 for no classifier."""
    label_names: tuple[str, ...] | None
    """A name per class, in order; None if not stated."""
    pretrained_cfg: dict[str, Any]
    """By timm's keys: input size and preprocessing, tag and license."""
    thresholds: tuple[float, ...] | None = None
    """Lowest probability at which each label is predicted, if an image can have several; None if it has exactly one."""
    tta: TestTimeAugmentation = "none"
    """Test-time augmentation with which it was evaluated."""
    accept: Mapping[float, float] = field(default_factory=dict)
    """For each precision, the lowest probability of an answer such that so many of the answers are right."""
    ood_sha256: str | None = None
    """SHA-256 of the file with the score of out-of-distribution images; None if there is none."""


def named_config(architecture: str, cfg: PretrainedCfg | None) -> ModelConfig:
    """Return the configuration of a model in timm's registry."""
    facts = {key: value for key, value in (cfg or PretrainedCfg()).to_dict().items() if key != "state_dict"}
    return ModelConfig(
        architecture=architecture,
        model_args={},
        num_classes=facts["num_classes"],
        label_names=None,
        pretrained_cfg=facts,
    )


def read_config(path: Path, where: str) -> ModelConfig:
    """Read and validate a config.json.

    Args:
        path: The file.
        where: How the user named the model, printable; messages begin with it.

    Raises:
        RequestError: If the file cannot be read, or a value is invalid; the message has its key and value.
    """
    raw = read_json(path, dict[str, Any], WAY_OUT, CONFIG_BYTES, f"{where}: {path.name}")
    return parse_config(raw, where)


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """Validate the content of a config.json.

    Raises:
        RequestError: If a value is invalid; the message has its key and value.
    """
    return _Reader(where).config(_split(raw))


def _split(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a config in timm's current layout; the first one had all keys on one level."""
    if "pretrained_cfg" in raw or "architecture" not in raw:
        return raw
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    top = {key: raw[key] for key in ("architecture", "num_classes", "label_names", "model_args") if key in raw}
    if "labels" in raw:
        top.setdefault("label_names", raw["labels"])
    return top | {"pretrained_cfg": {key: raw[key] for key in known & raw.keys() - top.keys()}}


@dataclass(frozen=True)
class _Reader:
    """Validates a config; each method returns validated values or raises RequestError."""

    where: str

    def config(self, raw: dict[str, Any]) -> ModelConfig:
        """Return the validated content of a config.json."""
        config = self.convert(raw, _Config, "")
        architecture = self.architecture(config.architecture)
        stated = {key: value for key, value in config.pretrained_cfg.items() if value is not None}
        self.steering(stated)
        facts = self.convert(stated, _PretrainedCfg, "pretrained_cfg")
        model_args = self.model_args(architecture, config.model_args or {})
        args_classes = model_args.pop("num_classes", None)
        # older timm left num_classes of the base model in pretrained_cfg of fine-tuned models; timm ignores it as well
        classes = next(n for n in (config.num_classes, args_classes, facts.num_classes, 1000) if n is not None)
        if args_classes not in (None, classes):
            raise self.error("model_args.num_classes", args_classes, f"expected {classes}, the value of num_classes")
        names = config.label_names if config.label_names is not None else facts.label_names
        own = self.convert(config.resnext_hub or {}, _PluginFacts, "resnext_hub")
        return ModelConfig(
            architecture=architecture,
            model_args=model_args,
            num_classes=classes,
            label_names=self.label_names(names, classes),
            pretrained_cfg=self.input_facts(facts, model_args)
            | _layers_of(architecture, model_args)
            | {"num_classes": classes},
            thresholds=self.thresholds(config.resnext_hub or {}, classes)
            if config.problem_type == MULTI_LABEL
            else None,
            tta=own.tta,
            ood_sha256=own.ood_sha256,
            accept={float(precision): lowest for precision, lowest in (own.accept_thresholds or {}).items()},
        )

    def thresholds(self, facts: dict[str, Any], classes: int) -> tuple[float, ...]:
        """Return the stated thresholds of the labels, or 0.5 for each."""
        stated = facts.get("thresholds")
        if stated is None:
            return (0.5,) * classes
        found = self.convert(stated, list[_Probability], "resnext_hub.thresholds")
        if len(found) != classes:
            raise self.error("resnext_hub.thresholds", stated, f"expected {classes} numbers, one per class")
        return tuple(found)

    def architecture(self, name: str) -> str:
        """Return an architecture if timm knows it."""
        if not timm.is_model(name):
            raise self.error("architecture", name, f"unknown to timm {timm.__version__}")
        return name.partition(".")[0]  # a tag names weights, but those of the folder are used

    def steering(self, cfg: dict[str, Any]) -> None:
        """Raise RequestError for keys that would make timm load other weights than the checked ones."""
        known = {field.name for field in dataclasses.fields(PretrainedCfg)}
        for key, value in cfg.items():
            if key in _STEERING and value:
                raise self.error(
                    f"pretrained_cfg.{key}", value, "not allowed: weights are only loaded from model.safetensors"
                )
            if key not in known:
                raise self.error(f"pretrained_cfg.{key}", value, "unknown to timm")

    def model_args(self, architecture: str, args: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that affect inference, with their types and ranges checked."""
        args = {key: value for key, value in args.items() if value is not None}
        for key, value in args.items():
            if key in _RESERVED:
                raise self.error(f"model_args.{key}", value, "not allowed in a saved model")
        if architecture in VARIANTS:
            kind: type[_CommonArgs] | None = _VariantArgs
        else:
            kind = _ResNetArgs if model_entrypoint(architecture).__module__ == "timm.models.resnet" else None
        if kind is None:
            for key, value in args.items():
                self.plain(key, value)
            for key, type_ in (("num_classes", _Classes), ("in_chans", _Channels), ("drop_rate", _Rate)):
                if key in args:
                    self.convert(args[key], type_, f"model_args.{key}")
        else:
            for key, value in args.items():
                if key not in kind.__struct_fields__:
                    raise self.error(f"model_args.{key}", value, f"{architecture} does not accept it")
            self.convert(args, kind, "model_args")
            args = {key: value for key, value in args.items() if (key, value) != ("global_pool", "avg")}
        return {
            key: value
            for key, value in args.items()
            if key not in _TRAINING_ARGS and (key, value) != ("in_chans", 3)  # timm also writes defaults
        }

    def plain(self, key: str, value: Any) -> None:
        """Raise RequestError unless an argument of another architecture is a plain value."""
        values = value if isinstance(value, list) and len(value) <= 64 else [value]
        for entry in values:
            number = isinstance(entry, (bool, int, float)) and abs(entry) < 1 << 20
            word = isinstance(entry, str) and re.fullmatch(r"[a-z0-9_]{0,32}", entry)
            if not (number or word):
                raise self.error(f"model_args.{key}", value, "expected numbers or the name of a layer")

    def input_facts(self, facts: _PretrainedCfg, model_args: dict[str, Any]) -> dict[str, Any]:
        """Return the input size and preprocessing of images, by timm's keys."""
        channels, height, width = facts.input_size
        # timm corrects configs of its older versions in the same way
        channels = model_args.get("in_chans", channels)
        side = model_args.get("img_size")
        if side is not None and facts.fixed_input_size:
            # not a union of int and tuple: msgspec 0.22 crashes on a union with a tuple of fixed length
            sides = side if isinstance(side, list) else [side, side]
            height, width = self.convert(sides, tuple[_Side, _Side], "model_args.img_size")
        resized = resized_side((channels, height, width), facts.crop_pct)
        if resized > MAX_RESIZED:
            raise self.error(
                "pretrained_cfg.crop_pct",
                facts.crop_pct,
                f"with input_size {[channels, height, width]}, images would be resized to {resized:,} px: expected at "
                f"most {MAX_RESIZED:,}",
            )
        for key, values in (("mean", facts.mean), ("std", facts.std)):
            if len(values) != channels:
                raise self.error(f"pretrained_cfg.{key}", values, f"expected {channels}, one per channel")
        return {
            "input_size": (channels, height, width),
            "fixed_input_size": facts.fixed_input_size,
            "interpolation": facts.interpolation,
            "crop_pct": facts.crop_pct,
            "crop_mode": facts.crop_mode,
            "mean": tuple(facts.mean),
            "std": tuple(facts.std),
            "tag": facts.tag,
            "license": facts.license,
        }

    def label_names(self, names: list[str] | dict[str, str] | None, classes: int) -> tuple[str, ...] | None:
        """Return the names in class order; two classes may share a name, as in ImageNet."""
        if names is None:
            return None
        if isinstance(names, dict):
            if names.keys() != {str(number) for number in range(classes)}:
                raise self.error("label_names", list(names), f"expected the numbers 0 to {classes - 1} as keys")
            names = [names[str(number)] for number in range(classes)]
        if len(names) != classes:
            raise self.error("label_names", names, f"{len(names)} names for {classes} classes: expected one per class")
        return tuple(names)

    def convert(self, raw: Any, kind: Any, prefix: str) -> Any:
        """Return a value converted to a type, or raise RequestError with the key at fault."""
        try:
            return msgspec.convert(raw, kind)
        except msgspec.ValidationError as error:
            reason, _, path = str(error).partition(" - at `$")
            value, shown, field = raw, prefix, ""
            for key, index in re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", path):
                if key and isinstance(value, dict) and key in value:
                    value, shown, field = value[key], f"{shown}.{key}".lstrip("."), key
                elif index and isinstance(value, list) and int(index) < len(value):
                    value, shown = value[int(index)], f"{shown}[{index}]"
            if reason.startswith("Invalid enum value"):
                reason = f"expected one of {', '.join(map(str, _choices(get_type_hints(kind)[field])))}"
            raise self.error(shown, value, reason[0].lower() + reason[1:].replace("`", "")) from error

    def error(self, key: str, value: Any, reason: str) -> RequestError:
        """Return an error with a key, its value and the reason."""
        text = printable(json.dumps(value, ensure_ascii=False, default=str))
        stated = f"{printable(key)[:80]} {text if len(text) <= 60 else f'{text[:59]}…'}".strip()
        return RequestError(f"{self.where}: config.json has {stated}: {reason}; {WAY_OUT}")


def resized_side(input_size: Sequence[int], crop_pct: float) -> int:
    """Return the longest side in pixels to which a square image is resized before the center crop."""
    return int(max(input_size[1:]) / crop_pct)


def _layers_of(architecture: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """Return the layers that timm adapts to other channels and classes, from its registry instead of the file."""
    registered = get_pretrained_cfg(architecture) or PretrainedCfg()
    deep = bool(model_args.get("stem_type"))
    return {"first_conv": "conv1.0" if deep else registered.first_conv, "classifier": registered.classifier}


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the values of a type that is or contains a Literal."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for part in get_args(hint) if (found := _choices(part))), ())
