"""Cost of a model by formula: parameters, multiply-adds, activations and training memory.

No model is built. A multiply-add counts as one operation, for convolutions and the classifier only; activations are
the outputs of convolutions and of the classifier (Radosavovic et al. 2020).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from resnext_hub.models.resnext import VARIANTS, Bottleneck, Variant

Preserved = Literal["block", "parameters", "macs"]
"""What a width preserves: the parameters of one block (as in the paper), those of the model, or its multiply-adds."""


def grouped_conv_parameters(kernel: int, in_chs: int, out_chs: int, groups: int = 1) -> int:
    """Return the number of weights of a grouped convolution, k² · in_chs · out_chs / groups (paper, section 3)."""
    return kernel * kernel * (in_chs // groups) * out_chs


def block_parameters(cardinality: int, base_width: int, channels: int = 256) -> int:
    """Return the number of weights of a block by equation 4 of the paper, C · (256 · d + 3 · 3 · d · d + d · 256)."""
    return cardinality * (channels * base_width + 9 * base_width**2 + base_width * channels)


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """The cost of a model; all but `parameters` are per image."""

    parameters: int
    macs: int
    """Multiply-adds of a forward pass."""
    activations: int
    """Output elements of the convolutions and the classifier."""
    saved: int
    """Elements that autograd saves for the backward pass."""

    def training_bytes(self, batch_size: int, optimizer_states: int = 1, element_bytes: int = 4) -> int:
        """Estimate training memory in bytes, excluding the workspace of the convolutions.

        Args:
            batch_size: Images per forward pass.
            optimizer_states: Optimizer states per parameter: 1 for SGD with momentum, 2 for AdamW.
            element_bytes: Bytes per activation: 4, or 2 with bfloat16 or float16. Weights, gradients and optimizer
                states are float32.
        """
        return 4 * self.parameters * (2 + optimizer_states) + batch_size * self.saved * element_bytes


class _Conv(NamedTuple):
    """A convolution of the model with its norm layer."""

    kernel: int
    in_chs: int
    out_chs: int
    groups: int
    size: int
    """Height and width of the output in pixels."""
    kept: int
    """Tensors of the output's size saved for the backward pass, including the output itself."""


def complexity_of(
    variant: Variant, image_size: int | None = None, num_classes: int | None = None, in_chans: int = 3
) -> Complexity:
    """Return the cost of a model at a resolution.

    Args:
        variant: The model.
        image_size: Height and width of the image in pixels; by default 224, or 32 for models with a small stem.
        num_classes: Number of classes; by default 1000, or 10 for models with a small stem.
        in_chans: Number of image channels.
    """
    size = image_size or (32 if variant.small_stem else 224)
    classes = (10 if variant.small_stem else 1000) if num_classes is None else num_classes
    convs = list(_convolutions(variant, size, in_chans))
    features = variant.channels[len(variant.layers) - 1] * Bottleneck.expansion
    weights = [grouped_conv_parameters(c.kernel, c.in_chs, c.out_chs, c.groups) for c in convs]
    outputs = [c.out_chs * c.size**2 for c in convs]
    pooled = 0 if variant.small_stem else 64 * _halved(convs[0].size) ** 2
    return Complexity(
        parameters=sum(weights) + sum(2 * c.out_chs for c in convs) + (features + 1) * classes,
        macs=sum(w * c.size**2 for w, c in zip(weights, convs, strict=True)) + features * classes,
        activations=sum(outputs) + classes,
        # the image, the tensors after each convolution, the pooled map with int64 indices (two elements each), features
        saved=in_chans * size**2
        + sum(output * c.kept for output, c in zip(outputs, convs, strict=True))
        + 3 * pooled
        + features,
    )


def _convolutions(variant: Variant, image_size: int, in_chans: int) -> Iterator[_Conv]:
    """Yield the convolutions of a model in the order of the forward pass (paper, Table 1)."""
    size = image_size if variant.small_stem else _halved(image_size)
    yield _Conv(3 if variant.small_stem else 7, in_chans, 64, 1, size, kept=2)
    size = size if variant.small_stem else _halved(size)
    in_chs = 64
    stages = zip(variant.layers, variant.channels, variant.stage_group_widths, strict=False)
    for stage, (depth, stage_width, group_width) in enumerate(stages):
        width = group_width * variant.cardinality
        out_chs = stage_width * Bottleneck.expansion
        for block in range(depth):
            before = size
            size = _halved(size) if block == 0 and stage > 0 else size
            yield _Conv(1, in_chs, width, 1, before, kept=2)
            yield _Conv(3, width, width, variant.cardinality, size, kept=2)
            # its own output, and the block's; without a shortcut the block's is that of batch norm
            yield _Conv(1, width, out_chs, 1, size, kept=2)
            if block == 0 and variant.shortcuts and (before != size or in_chs != out_chs):
                yield _Conv(1, in_chs, out_chs, 1, size, kept=1)
            in_chs = out_chs


def _halved(size: int) -> int:
    return -(-size // 2)


def preserving_width(
    cardinality: int,
    reference: Variant = VARIANTS["resnext_g1"],
    preserve: Preserved = "block",
    image_size: int | None = None,
) -> int:
    """Return the base width d at which a model of this cardinality costs closest to the reference.

    Args:
        cardinality: Number of groups C.
        reference: The model to match; its depth is kept.
        preserve: `block` matches equation 4, as in Table 2 of the paper; `parameters` and `macs` match whole models.
        image_size: Image size in pixels for `macs`.

    Raises:
        ValueError: If one channel per group already costs more than twice the reference.
    """
    if cardinality < 1:
        raise ValueError(f"cardinality={cardinality} is not a positive number of groups")

    def cost(base_width: int, groups: int = cardinality) -> int:
        if preserve == "block":
            return block_parameters(groups, base_width)
        candidate = replace(reference, name="", cardinality=groups, base_width=base_width)
        found = complexity_of(candidate, image_size)
        return found.parameters if preserve == "parameters" else found.macs

    target = cost(reference.base_width, reference.cardinality)
    width = 1
    while cost(width + 1) <= target:  # the cost grows with the width
        width += 1
    nearest = min((width, width + 1), key=lambda d: abs(cost(d) - target))
    if cost(nearest) > 2 * target:
        unit = "multiply-adds" if preserve == "macs" else "parameters"
        raise ValueError(
            f"cardinality={cardinality} needs {cost(nearest):,} {unit} even at base_width={nearest}, more than twice "
            f"the {target:,} of the reference; use a smaller cardinality"
        )
    return nearest


# ImageNet-1K top-1 error in percent, single 224 px crop (paper, Tables 3 and 4), and the error of the CIFAR models on
# CIFAR-10 (Table 7).
PAPER_ERROR: dict[str, float] = {
    "resnext_g1": 23.9,
    "resnext_g2": 23.0,
    "resnext_g4": 22.6,
    "resnext_g8": 22.3,
    "resnext_g32": 22.2,
    "resnext101_g1": 22.0,
    "resnext101_g2": 21.7,
    "resnext101_g4": 21.4,
    "resnext101_g8": 21.3,
    "resnext101_g32": 21.2,
    "resnext101_g1_w100": 21.3,
    "resnext200_g1": 21.7,
    "resnext101_g2_w64": 20.7,
    "resnext101_g64_w4": 20.4,
    "resnext29_g8_w64": 3.65,
    "resnext29_g16_w64": 3.58,
}
"""Error in percent by variant, where the paper reports one."""


def info_rows(variants: Sequence[Variant], image_size: int | None = None) -> list[tuple[str, ...]]:
    """Return the rows of a table of variants, header first: name, setting, cost, error in the paper, weights."""
    from timm.models import list_pretrained

    head = "name|C x d|layers|pixels|M parameters|G MACs|M activations|error %, paper|released weights"
    rows: list[tuple[str, ...]] = [tuple(head.split("|"))]
    for variant in variants:
        size = image_size or (32 if variant.small_stem else 224)
        cost = complexity_of(variant, size)
        error = PAPER_ERROR.get(variant.name)
        weights = len(list_pretrained(f"{variant.name}.*"))
        rows.append(
            (
                variant.name,
                variant.template,
                str(variant.depth),
                str(size),
                f"{cost.parameters / 1e6:.3f}",
                f"{cost.macs / 1e9:.3f}",
                f"{cost.activations / 1e6:.2f}",
                "" if error is None else f"{error:g}",
                str(weights) if weights else "",
            )
        )
    return rows
