"""ResNeXt: residual networks whose 3x3 convolution is split into groups.

Paper: `Aggregated Residual Transformations for Deep Neural Networks` - https://arxiv.org/abs/1611.05431

C is the cardinality (number of groups) and d the base width (channels per group in the first stage). The paper draws
three equivalent blocks (Figure 3); this module implements (c), a grouped convolution between two 1x1 convolutions.
Parameter names match timm and torchvision, so state dicts are interchangeable in both directions.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath, create_classifier
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    list_pretrained,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._pretrained import PretrainedCfg
from torch import nn
from torch.nn import functional as F

# `register_model` appends the name of each variant in the table.
__all__ = ["VARIANTS", "Bottleneck", "ResNeXt", "StockArchitecture", "Variant", "stock_architecture"]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., nn.Module]:
        """Type the entrypoints, such as `resnext_g32`, which `_register` defines from the table."""


STAGE_WIDTHS = (64, 128, 256, 512)
"""Channels of the 3x3 convolution in each of the four stages at C=1, d=64 (paper, Table 1)."""

CHANNELS = 1 << 16
CLASSES = 1 << 24
BLOCKS = 1000
"""Upper bounds; larger values are a typo or hostile, since no machine has the memory for them."""


class Bottleneck(nn.Module):
    """A 1x1 - grouped 3x3 - 1x1 residual block (paper, Figure 3c).

    Maps `(N, in_chs, H, W)` to `(N, 4 * stage_width, H / stride, W / stride)`. The stride is in the 3x3 convolution, as
    in the paper and in torchvision.

    Args:
        in_chs: Number of input channels.
        stage_width: Channels of the 3x3 convolution at cardinality 1 and base width 64.
        stride: Stride of the 3x3 convolution and of the shortcut.
        dilation: Dilation of the 3x3 convolution.
        cardinality: Number of groups C.
        base_width: Channels d per group in the first stage; doubles with each stage.
        group_width: Channels per group; `stage_width * base_width / 64`, rounded down, if not given.
        project: Use a 1x1 convolution as the shortcut (type B) instead of the identity.
        shortcut: Add the shortcut; without it the block is plain (paper, section 5.1, "Residual connections").
        drop_path_rate: Probability of dropping the residual branch per sample in training (stochastic depth).
    """

    expansion = 4

    def __init__(
        self,
        in_chs: int,
        stage_width: int,
        stride: int = 1,
        dilation: int = 1,
        cardinality: int = 1,
        base_width: int = 64,
        group_width: int | None = None,
        project: bool = False,
        shortcut: bool = True,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group_width is None:
            group_width = math.floor(stage_width * (base_width / 64))
        width = group_width * cardinality
        out_chs = stage_width * self.expansion
        if width < 1:
            raise ValueError(
                f"cardinality={cardinality} with base_width={base_width} gives a 3x3 convolution without channels in "
                f"the stage of width {stage_width}; base_width * {stage_width} / 64 must be at least 1"
            )

        self.conv1 = nn.Conv2d(in_chs, width, 1, bias=False, device=device, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(width, device=device, dtype=dtype)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(
            width,
            width,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=cardinality,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.bn2 = nn.BatchNorm2d(width, device=device, dtype=dtype)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out_chs, 1, bias=False, device=device, dtype=dtype)
        self.bn3 = nn.BatchNorm2d(out_chs, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, device=device, dtype=dtype),
                nn.BatchNorm2d(out_chs, device=device, dtype=dtype),
            )
            if project and shortcut
            else None
        )
        self.shortcut = shortcut
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(N, in_chs, H, W)` to `(N, out_chs, H / stride, W / stride)`."""
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.drop_path(self.bn3(self.conv3(x)))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if self.shortcut:
            x += shortcut
        return self.act3(x)


class ResNeXt(nn.Module):
    """ResNeXt: a stem, three or four stages of bottlenecks, and a linear classifier (paper, Table 1 and section 5.3).

    With three stages `layer4` is empty, so all models have the same children.

    Args:
        layers: Number of blocks in each of three or four stages.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of input image channels.
        cardinality: Number of groups C of every 3x3 convolution.
        base_width: Channels d per group in the first stage, where that has 64 channels.
        channels: Channels of the 3x3 convolution of each stage at cardinality 1 and base width 64; a block returns four
            times as many.
        group_widths: Channels per group of each stage, instead of `base_width`, to match a cost closely.
        shortcuts: Add residual connections; without them the model is plain (paper, section 5.1).
        small_stem: Use a 3x3 stem at full resolution, for 32 px images, instead of a 7x7 convolution and max pooling
            with a total stride of 4.
        output_stride: Total stride of the last feature map: 32, or 16 or 8 with dilated last stages.
        global_pool: Pooling before the classifier, a name that timm knows; an empty string for none.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it increases linearly with depth.
        zero_init_last: Zero-initialize the last batch norm weight of each residual branch.

    Raises:
        ValueError: If an argument is outside its range, or the groups would have no channels; nothing is allocated.
        AssertionError: In `forward`, if the image is smaller than the stride of the model.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        cardinality: int = 32,
        base_width: int = 4,
        channels: Sequence[int] = STAGE_WIDTHS,
        group_widths: Sequence[int] | None = None,
        shortcuts: bool = True,
        small_stem: bool = False,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_layers(layers)
        _check_count("num_classes", num_classes, 0, CLASSES)
        _check_count("in_chans", in_chans, 1, CHANNELS)
        _check_count("cardinality", cardinality, 1, CHANNELS)
        _check_count("base_width", base_width, 1, CHANNELS)
        channels = channels[: len(layers)] if channels is STAGE_WIDTHS else channels
        _check_widths("channels", channels, len(layers))
        if group_widths is not None:
            _check_widths("group_widths", group_widths, len(layers))
        if not isinstance(shortcuts, bool):
            raise ValueError(f"shortcuts={shortcuts!r}: expected True or False")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride!r} is not one of 8, 16, 32")
        widest = max(group_widths or [math.floor(width * (base_width / 64)) for width in channels]) * cardinality
        if widest > CHANNELS:
            width = f"base_width={base_width}" if group_widths is None else f"group_widths={group_widths!r}"
            raise ValueError(
                f"cardinality={cardinality} with {width} gives {widest:,} channels in the 3x3 "
                f"convolutions of the last stage; expected at most {CHANNELS:,}"
            )
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
                raise ValueError(f"{name}={rate!r}: expected a number of at least 0 and below 1")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(
            in_chans, 64, kernel, stride=stride, padding=kernel // 2, bias=False, device=device, dtype=dtype
        )
        self.bn1 = nn.BatchNorm2d(64, device=device, dtype=dtype)
        self.act1 = nn.ReLU(inplace=True)
        pool: nn.Module = nn.Identity() if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        self.maxpool = pool
        feature_info: list[dict[str, Any]] = [{"num_chs": 64, "reduction": stride, "module": "act1"}]

        in_chs, reduction, dilation = 64, stride * stride, 1
        stages = []
        num_blocks = sum(layers)
        drop_path_rates = [drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        for stage, (depth, stage_width) in enumerate(zip(layers, channels, strict=True), start=1):
            stride = 1 if stage == 1 else 2
            first_dilation = dilation
            if reduction * stride > output_stride:  # keep the resolution and dilate instead
                dilation, stride = dilation * stride, 1
            reduction *= stride
            blocks = []
            for index in range(depth):
                blocks.append(
                    Bottleneck(
                        in_chs,
                        stage_width,
                        stride=stride if index == 0 else 1,
                        dilation=first_dilation if index == 0 else dilation,
                        cardinality=cardinality,
                        base_width=base_width,
                        group_width=group_widths[stage - 1] if group_widths is not None else None,
                        project=index == 0 and (stride != 1 or in_chs != stage_width * Bottleneck.expansion),
                        shortcut=shortcuts,
                        drop_path_rate=drop_path_rates.pop(0),
                        device=device,
                        dtype=dtype,
                    )
                )
                in_chs = stage_width * Bottleneck.expansion
            stages.append(nn.Sequential(*blocks))
            feature_info.append({"num_chs": in_chs, "reduction": reduction, "module": f"layer{stage}"})

        stages += [nn.Sequential()] * (4 - len(stages))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.stride = reduction
        self.feature_info = feature_info

        self.num_features = in_chs
        self.global_pool, self.fc = create_classifier(
            in_chs, num_classes, pool_type=global_pool, device=device, dtype=dtype
        )
        self.head_hidden_size = in_chs * self.global_pool.feat_mult()
        self.init_weights(zero_init_last and shortcuts)  # zero without a shortcut would block the signal

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialize convolutions as in He et al. 2015 (fan out), optionally with zero residual branches."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_last:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return regular expressions that group parameters into a stem and blocks, or stages if `coarse`."""
        return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing, which recomputes each block in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one with `num_classes` (0 for none), and optionally the pooling."""
        weight = self.conv1.weight
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the last feature map and selected intermediate ones.

        Args:
            x: Images `(N, in_chans, H, W)`.
            indices: Take the last n maps if an int, all of them (stem and stages) if None, else those selected.
            norm: Accepted for timm's interface and ignored: these maps have no further norm layer.
            stop_early: Stop after the last selected map.
            output_fmt: Must be `NCHW`.
            intermediates_only: Return only the intermediate maps.

        Raises:
            ValueError: If `output_fmt` is not `NCHW`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not supported; use 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        self._require_size(x)
        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take_indices:
            intermediates.append(x)
        x = self.maxpool(x)
        for stage in range(1, (max_index + 1) if stop_early else len(self.feature_info)):
            layer = getattr(self, f"layer{stage}")
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(layer, x)
            else:
                x = layer(x)
            if stage in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last selected feature map, and the classifier; return the selected indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        last = len(self.feature_info) - 1
        for stage in range(max_index + 1, last + 1):
            setattr(self, f"layer{stage}", nn.Sequential())
        if max_index == 0:
            self.maxpool = nn.Identity()
        if max_index < last:  # the classifier was sized for the last stage
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
            self.stride = self.feature_info[max_index]["reduction"]
        if prune_head or max_index < last:
            self.reset_classifier(0, "")
        return list(take_indices)

    def _require_size(self, x: torch.Tensor) -> None:
        # torch._assert because tracing and scripting support it, unlike an `if`
        height, width = x.shape[-2], x.shape[-1]
        torch._assert(height >= self.stride, f"an image of height {height} is smaller than the stride {self.stride}")
        torch._assert(width >= self.stride, f"an image of width {width} is smaller than the stride {self.stride}")

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(N, in_chans, H, W)` to the last feature map, `(N, num_features, H / stride, W / stride)`."""
        self._require_size(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool a feature map to `(N, num_features)` and, unless `pre_logits`, classify it: `(N, num_classes)`."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images `(N, in_chans, H, W)` to logits `(N, num_classes)`."""
        return self.forward_head(self.forward_features(x))


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise ValueError(f"{name}={value!r}: expected a whole number from {low} to {high:,}")


def _check_widths(name: str, widths: object, stages: int) -> None:
    if not isinstance(widths, (list, tuple)) or len(widths) != stages:
        raise ValueError(f"{name}={widths!r}: expected a number of channels for each of the {stages} stages")
    for width in widths:
        _check_count(name, width, 1, CHANNELS // Bottleneck.expansion)


def _check_layers(layers: object) -> None:
    if not isinstance(layers, (list, tuple)) or not 3 <= len(layers) <= 4:
        raise ValueError(f"layers={layers!r}: expected a number of blocks for each of three or four stages")
    for depth in layers:
        _check_count("layers", depth, 1, BLOCKS)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table of variants: a name and its architecture."""

    name: str
    layers: tuple[int, ...]
    """Blocks per stage."""
    cardinality: int
    base_width: int
    small_stem: bool = False
    """Whether the model has a 3x3 stem, for 32 px images."""
    channels: tuple[int, ...] = STAGE_WIDTHS
    """Channels of each stage at C=1, d=64; surplus entries are ignored."""
    group_widths: tuple[int, ...] | None = None
    """Channels per group of each stage, if they do not follow from `base_width`."""
    shortcuts: bool = True
    """Whether the model has residual connections."""

    @property
    def depth(self) -> int:
        """Number of weighted layers: three per block, the stem and the classifier."""
        return 3 * sum(self.layers) + 2

    @property
    def stage_group_widths(self) -> tuple[int, ...]:
        """Channels per group of each stage."""
        channels = self.channels[: len(self.layers)]
        return self.group_widths or tuple(width * self.base_width // 64 for width in channels)

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments that build the architecture, except for the stem, which can only be selected by name."""
        args: dict[str, Any] = {"layers": list(self.layers), "cardinality": self.cardinality}
        if self.group_widths is None:
            args["base_width"] = self.base_width
        else:
            args["group_widths"] = list(self.group_widths)
        if self.channels != STAGE_WIDTHS:
            args["channels"] = list(self.channels[: len(self.layers)])
        return args if self.shortcuts else args | {"shortcuts": False}

    @property
    def template(self) -> str:
        """The setting in the paper's notation, such as 32x4d."""
        return f"{self.cardinality}x{self.base_width}d"


_LAYERS = {
    26: (2, 2, 2, 2),
    29: (3, 3, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}

# (name, depth, cardinality, base width). Names without a width use the one that preserves the complexity of 1x64d at
# that cardinality (paper, Table 2).
_TABLE = (
    ("resnext_g1", 50, 1, 64),
    ("resnext_g2", 50, 2, 40),
    ("resnext_g4", 50, 4, 24),
    ("resnext_g8", 50, 8, 14),
    ("resnext_g32", 50, 32, 4),
    ("resnext101_g1", 101, 1, 64),
    ("resnext101_g2", 101, 2, 40),
    ("resnext101_g4", 101, 4, 24),
    ("resnext101_g8", 101, 8, 14),
    ("resnext101_g32", 101, 32, 4),
    # twice the complexity (Table 4), by width, depth and cardinality
    ("resnext101_g1_w100", 101, 1, 100),
    ("resnext200_g1", 200, 1, 64),
    ("resnext101_g2_w64", 101, 2, 64),
    ("resnext101_g64_w4", 101, 64, 4),
    # larger, smaller and deeper models
    ("resnext101_g32_w8", 101, 32, 8),
    ("resnext26_g32", 26, 32, 4),
    ("resnext152_g32", 152, 32, 4),
    # for CIFAR (section 5.3)
    ("resnext29_g8_w64", 29, 8, 64),
    ("resnext29_g16_w64", 29, 16, 64),
    ("resnext29_g32_w4", 29, 32, 4),
)

VARIANTS: dict[str, Variant] = {
    name: Variant(
        name=name, layers=_LAYERS[depth], cardinality=cardinality, base_width=base_width, small_stem=depth == 29
    )
    for name, depth, cardinality, base_width in _TABLE
}


@dataclass(frozen=True, kw_only=True)
class StockArchitecture:
    """A variant in terms of stock timm: an architecture name and the arguments that differ from its defaults."""

    name: str
    model_args: dict[str, int]


# timm's own models of the same architecture, by blocks per stage: (name, cardinality, base width).
_STOCK: dict[tuple[int, ...], tuple[tuple[str, int, int], ...]] = {
    (2, 2, 2, 2): (("resnet26", 1, 64),),
    (3, 4, 6, 3): (("resnext50_32x4d", 32, 4), ("resnet50", 1, 64)),
    (3, 4, 23, 3): (
        ("resnext101_32x4d", 32, 4),
        ("resnet101", 1, 64),
        ("resnext101_64x4d", 64, 4),
        ("resnext101_32x8d", 32, 8),
    ),
    (3, 8, 36, 3): (("resnet152", 1, 64),),
    (3, 24, 36, 3): (("resnet200", 1, 64),),
}


def stock_architecture(variant: Variant) -> StockArchitecture | None:
    """Return the timm architecture that builds the same model, or None if timm has none of that depth and stem."""
    stocks = () if variant.small_stem else _STOCK.get(variant.layers, ())
    for name, cardinality, base_width in stocks:
        if (cardinality, base_width) == (variant.cardinality, variant.base_width):
            return StockArchitecture(name=name, model_args={})
    for name, cardinality, base_width in stocks:
        differing = {}
        if variant.cardinality != cardinality:
            differing["cardinality"] = variant.cardinality
        if variant.base_width != base_width:
            differing["base_width"] = variant.base_width
        return StockArchitecture(name=name, model_args=differing)
    return None


def variant_like(name: str) -> Variant | None:
    """Return the variant for a model name of this package or of timm, or None if it has another architecture."""
    if name in VARIANTS:
        return VARIANTS[name]
    for layers, stocks in _STOCK.items():
        for stock, cardinality, base_width in stocks:
            if stock == name:
                return Variant(name=name, layers=layers, cardinality=cardinality, base_width=base_width)
    return None


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "origin_url": "https://arxiv.org/abs/1611.05431",
        "paper_ids": "arXiv:1611.05431",
        **kwargs,
    }


def _cifar_cfg() -> dict[str, Any]:
    return _cfg(
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


def _released_cfgs(variant: Variant) -> dict[str, PretrainedCfg | dict[str, Any]]:
    """Return the pretrained configs of a variant, keyed `name.tag`.

    timm's released weights for the same architecture come from timm's registry, so preprocessing, license and origin
    stay as timm states them. Only the safetensors files on the Hub are kept as a source, not the older pickles.
    """
    cfgs: dict[str, PretrainedCfg | dict[str, Any]] = {}
    stock = stock_architecture(variant)
    if stock is not None and not stock.model_args:
        for name in list_pretrained(f"{stock.name}.*"):
            tag = name.partition(".")[2]
            cfg = get_pretrained_cfg(name)
            if cfg is not None and cfg.hf_hub_id:
                cfgs[f"{variant.name}.{tag}"] = replace(cfg, url=None, architecture=None, tag=None)
        default = get_pretrained_cfg(stock.name)
        if default is not None and f"{variant.name}.{default.tag}" in cfgs:
            key = f"{variant.name}.{default.tag}"
            cfgs = {key: cfgs.pop(key), **cfgs}  # timm takes the first as the default
    return cfgs or {f"{variant.name}.untrained": _cifar_cfg() if variant.small_stem else _cfg()}


_FIXED_ARGUMENTS = {"small_stem"}
"""Arguments that are fixed by the name of a variant."""

OWN_ARGUMENTS = frozenset({"group_widths", "shortcuts"})
"""Arguments that timm's ResNet does not have."""

_ARGUMENTS = tuple(name for name in inspect.signature(ResNeXt).parameters if name not in _FIXED_ARGUMENTS)

_TIMM_ARGUMENTS = set(inspect.signature(build_model_with_cfg).parameters) | {
    "features_only",
    "out_indices",
    "feature_cls",
}
"""Arguments of timm's model builder, which every entrypoint accepts."""


def _create_resnext(variant: Variant, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if unknown := [name for name in kwargs if name not in (*_ARGUMENTS, *_TIMM_ARGUMENTS)]:
        raise TypeError(
            f"{variant.name} does not accept {', '.join(unknown)}; expected {', '.join(_ARGUMENTS)}. timm's own ResNet "
            "accepts more, as in timm.create_model('resnext50_32x4d', act_layer='silu')"
        )
    setting: dict[str, Any] = {
        "layers": variant.layers,
        "cardinality": variant.cardinality,
        "base_width": variant.base_width,
    } | kwargs
    _check_layers(setting["layers"])
    model: nn.Module = build_model_with_cfg(
        ResNeXt,
        variant.name,
        pretrained,
        feature_cfg={"out_indices": tuple(range(len(setting["layers"]) + 1))},
        small_stem=variant.small_stem,
        **setting,
    )
    return model


def _register(variant: Variant) -> None:
    """Define the entrypoint of a variant in this module and register it with timm."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_resnext(variant, pretrained=pretrained, **kwargs)

    if is_model(variant.name):
        raise RuntimeError(f"timm already has a model named {variant.name!r}; refusing to replace it")
    entrypoint.__name__ = entrypoint.__qualname__ = variant.name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f"ResNeXt-{variant.depth} ({variant.template}), arXiv 1611.05431."
    globals()[variant.name] = register_model(entrypoint)


default_cfgs = generate_default_cfgs({key: cfg for v in VARIANTS.values() for key, cfg in _released_cfgs(v).items()})
"""Pretrained configs by variant; timm looks them up under this name."""

for _variant in VARIANTS.values():
    _register(_variant)
