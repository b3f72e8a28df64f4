"""ResNeXt: residual networks whose 3x3 convolution is split into groups.

Paper: `Aggregated Residual Transformations for Deep Neural Networks` - https://arxiv.org/abs/1611.05431

The number of groups is the network's cardinality C, the width of one group in the first stage its base width d. The
paper draws the block in three equal forms (Figure 3); the one built here is form (c), a grouped convolution between
two 1x1 convolutions. Parameter names are those of timm and torchvision, so state dicts interchange in both directions.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

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

__all__ = ["VARIANTS", "Bottleneck", "ResNeXt", "StockArchitecture", "Variant", "stock_architecture"]

STAGE_WIDTHS = (64, 128, 256, 512)
"""Channels of a plain bottleneck's 3x3 convolution in the four stages (paper, Table 1, at C=1 and d=64)."""


CHANNELS = 1 << 16
CLASSES = 1 << 24
BLOCKS = 1000
"""More than these fit no memory: what asks for it is a slip, or hostile."""


class Bottleneck(nn.Module):
    """A 1x1 - grouped 3x3 - 1x1 residual block (paper, Figure 3c).

    Takes `(N, in_chs, H, W)`, gives `(N, 4 * stage_width, H / stride, W / stride)`. The stride sits in the 3x3
    convolution, as in the paper and in torchvision.

    Args:
        in_chs: Channels that enter the block.
        stage_width: Channels of the 3x3 convolution when cardinality is 1 and base width is 64.
        stride: Stride of the 3x3 convolution and of the shortcut.
        dilation: Dilation of the 3x3 convolution.
        cardinality: Number of groups C.
        base_width: Width d of one group in the first stage; it doubles from stage to stage.
        project: Whether the shortcut is a 1x1 convolution (type B) instead of the identity.
        drop_path_rate: Probability of dropping the residual branch of a sample in training.
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
        project: bool = False,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = math.floor(stage_width * (base_width / 64)) * cardinality
        out_chs = stage_width * self.expansion
        if width < 1:
            raise ValueError(
                f"cardinality={cardinality} with base_width={base_width} leaves the 3x3 convolution of a stage of "
                f"width {stage_width} without channels: base_width * {stage_width} / 64 must be at least 1"
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
            if project
            else None
        )
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the residual branch to the shortcut: `(N, in_chs, H, W)` to `(N, out_chs, H / stride, W / stride)`."""
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.drop_path(self.bn3(self.conv3(x)))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class ResNeXt(nn.Module):
    """A stem, stages of bottlenecks, and a linear classifier (paper, Table 1; for CIFAR, section 5.3).

    A network of three stages has an empty `layer4`, so that every network is walked in the same way.

    Args:
        layers: Number of blocks in each of three or four stages.
        num_classes: Classes of the classifier; 0 leaves it out.
        in_chans: Channels of the input image.
        cardinality: Number of groups C of every 3x3 convolution.
        base_width: Width d of one group in the first stage.
        small_stem: Begin with a 3x3 convolution at full resolution, for images of 32 pixels, instead of a 7x7
            convolution and a pooling that quarter the resolution.
        output_stride: Greatest input size over size of the last feature map: 32, or 16 or 8 with dilated last stages.
        global_pool: Pooling before the classifier, a name that timm knows; the empty string leaves it out.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Probability of dropping the last block's residual branch; it grows linearly with depth.
        zero_init_last: Start every residual branch at zero (the last batch norm's weight).

    Raises:
        ValueError: If an argument is not a number within its range, or the groups would have no channels; nothing is
            allocated then.
        AssertionError: In a call, if the image is smaller than the network's stride.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        cardinality: int = 32,
        base_width: int = 4,
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
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride!r} is not one of 8, 16, 32")
        widest = math.floor(STAGE_WIDTHS[len(layers) - 1] * (base_width / 64)) * cardinality
        if widest > CHANNELS:
            raise ValueError(
                f"cardinality={cardinality} with base_width={base_width} makes {widest:,} channels in the 3x3 "
                f"convolutions of the last stage; expected at most {CHANNELS:,}"
            )
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
                raise ValueError(f"{name}={rate!r}: expected a number from 0 to below 1")
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
        for stage, (depth, stage_width) in enumerate(zip(layers, STAGE_WIDTHS, strict=False), start=1):
            stride = 1 if stage == 1 else 2
            first_dilation = dilation
            if reduction * stride > output_stride:  # keep the resolution, widen the view instead
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
                        project=index == 0,
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
        self.init_weights(zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise the convolutions as He et al. 2015 (fan out), and optionally the residual branches at zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_last:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Give timm the patterns by which parameters group into a stem and blocks (or stages, if coarse)."""
        return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Give the linear classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier of `num_classes` (0: none) on the features, and optionally another pooling."""
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
        """Give the last feature map and those asked for.

        Args:
            x: IndexedImages, `(N, in_chans, H, W)`.
            indices: The last n maps if an int, all (stem and stages) if None, else these.
            norm: Accepted for timm's interface; these maps carry no further norm layer.
            stop_early: Stop after the last map that is asked for.
            output_fmt: Only `NCHW` is offered.
            intermediates_only: Give the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not offered: feature maps are 'NCHW'")
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
        """Drop the stages behind the last feature map asked for, and the classifier; give the indices kept."""
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
        # torch's own assertion, because tracing and scripting follow it where they could not follow an `if`
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


def _check_layers(layers: object) -> None:
    if not isinstance(layers, (list, tuple)) or not 3 <= len(layers) <= 4:
        raise ValueError(f"layers={layers!r}: expected the numbers of blocks of three or four stages")
    for depth in layers:
        _check_count("layers", depth, 1, BLOCKS)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the family: a name and the network it stands for."""

    name: str
    layers: tuple[int, ...]
    """Blocks per stage."""
    cardinality: int
    base_width: int
    small_stem: bool = False
    """Whether it is a network for images of 32 pixels, with a 3x3 stem."""

    @property
    def depth(self) -> int:
        """Weighted layers: three a block, the stem and the classifier."""
        return 3 * sum(self.layers) + 2

    @property
    def template(self) -> str:
        """The paper's way to write a setting, such as 32x4d."""
        return f"{self.cardinality}x{self.base_width}d"


_LAYERS = {
    26: (2, 2, 2, 2),
    29: (3, 3, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}

# (name, depth, cardinality, base width). Where the name says no width, it is the one that preserves the complexity of
# 1x64d at that cardinality (paper, Table 2).
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
    # larger, smaller and deeper ones
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
    """How timm, without this package, writes a network: an architecture and the arguments that differ from it."""

    name: str
    model_args: dict[str, int]


# timm's own networks of the same form, by blocks per stage: (name, cardinality, base width).
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
    """Give the timm architecture that builds the same network, or None where timm has none of that depth and stem."""
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
    """Give the network that a name of this package or of timm stands for, or None if it is not of this form."""
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
    """Give the pretrained configurations of a variant, keyed `name.tag`.

    timm's released weights for the same network are read from timm's own registry, so that preprocessing, licence and
    origin stay what timm says of them; only the safetensors on the Hub are kept as a source, not the older pickles.
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
            cfgs = {key: cfgs.pop(key), **cfgs}  # the first is the default
    return cfgs or {f"{variant.name}.untrained": _cifar_cfg() if variant.small_stem else _cfg()}


_OF_A_VARIANT = {"layers", "small_stem"}
"""Arguments that the name of a variant stands for."""

_ARGUMENTS = tuple(name for name in inspect.signature(ResNeXt).parameters if name not in _OF_A_VARIANT)

_OF_TIMM = set(inspect.signature(build_model_with_cfg).parameters) | {"features_only", "out_indices", "feature_cls"}
"""Arguments that timm takes for every model before it builds it."""


def _create_resnext(variant: Variant, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if unknown := [name for name in kwargs if name not in (*_ARGUMENTS, *_OF_TIMM)]:
        raise TypeError(
            f"{variant.name} does not take {', '.join(unknown)}; it takes {', '.join(_ARGUMENTS)}. timm's own ResNet "
            "takes more, as in timm.create_model('resnext50_32x4d', act_layer='silu')"
        )
    setting = {"cardinality": variant.cardinality, "base_width": variant.base_width} | kwargs
    model: nn.Module = build_model_with_cfg(
        ResNeXt,
        variant.name,
        pretrained,
        feature_cfg={"out_indices": tuple(range(len(variant.layers) + 1))},
        layers=variant.layers,
        small_stem=variant.small_stem,
        **setting,
    )
    return model


def _register(variant: Variant) -> None:
    """Register a variant with timm, which reads the name, the module and the docstring of an entrypoint."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_resnext(variant, pretrained=pretrained, **kwargs)

    if is_model(variant.name):
        raise RuntimeError(f"timm has a model {variant.name!r} already; registering ours would replace it")
    entrypoint.__name__ = entrypoint.__qualname__ = variant.name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f"ResNeXt-{variant.depth} ({variant.template}), arXiv 1611.05431."
    entrypoints[variant.name] = register_model(entrypoint)


default_cfgs = generate_default_cfgs({key: cfg for v in VARIANTS.values() for key, cfg in _released_cfgs(v).items()})
"""Pretrained configurations by variant; timm looks for them under this name."""

entrypoints: dict[str, Callable[..., nn.Module]] = {}
for _variant in VARIANTS.values():
    _register(_variant)
