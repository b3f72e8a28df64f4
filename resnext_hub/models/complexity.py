"""What a network costs, by formula: parameters, multiply-adds, activations, memory in training.

Nothing is built. Counts follow the usual conventions: a multiply-add is one operation, and those of convolutions and
the classifier count; activations are the outputs of convolutions and of the classifier (Radosavovic et al. 2020).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from resnext_hub.models.resnext import STAGE_WIDTHS, VARIANTS, Bottleneck, Variant

Preserved = Literal["block", "parameters", "macs"]
"""What a width can preserve: the parameters of one block (the paper's way), of the network, or its multiply-adds."""


def grouped_conv_parameters(kernel: int, in_chs: int, out_chs: int, groups: int = 1) -> int:
    """Give the weights of a convolution: k² c m / g, as each group sees c / g of the inputs (paper, section 3)."""
    return kernel * kernel * (in_chs // groups) * out_chs


def block_parameters(cardinality: int, base_width: int, channels: int = 256) -> int:
    """Give equation 4 of the paper, C (256 d + 9 d² + 256 d): the weights of a block between `channels`."""
    return cardinality * (channels * base_width + 9 * base_width**2 + base_width * channels)


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """The cost of one image, unless said otherwise."""

    parameters: int
    macs: int
    """Multiply-adds of a forward pass."""
    activations: int
    """Elements that convolutions and the classifier put out."""
    saved: int
    """Elements that a forward pass keeps for the backward pass."""

    def training_bytes(self, batch_size: int, optimizer_states: int = 1, element_bytes: int = 4) -> int:
        """Estimate the memory of training, without the workspace of the convolutions.

        Args:
            batch_size: Images computed at once.
            optimizer_states: Values that the optimizer keeps of each parameter: 1 for SGD with momentum, 2 for AdamW.
            element_bytes: Bytes of an activation: 4, or 2 with bfloat16 or float16. Weights, gradients and the
                optimizer's values stay at 4.
        """
        return 4 * self.parameters * (2 + optimizer_states) + batch_size * self.saved * element_bytes


class _Conv(NamedTuple):
    """One convolution with its norm layer, as it stands in the network."""

    kernel: int
    in_chs: int
    out_chs: int
    groups: int
    size: int
    """Height and width of its output in pixels."""
    kept: int
    """Tensors of its output's size that the backward pass needs, its own output among them."""


def complexity_of(
    variant: Variant, image_size: int | None = None, num_classes: int | None = None, in_chans: int = 3
) -> Complexity:
    """Give the cost of a network at a resolution.

    Args:
        variant: The network.
        image_size: Height and width of the image in pixels; 224, or 32 for the networks with a small stem.
        num_classes: Classes of the classifier; 1000, or 10 for those.
        in_chans: Channels of the image.
    """
    size = image_size or (32 if variant.small_stem else 224)
    classes = (10 if variant.small_stem else 1000) if num_classes is None else num_classes
    convs = list(_convolutions(variant, size, in_chans))
    features = STAGE_WIDTHS[len(variant.layers) - 1] * Bottleneck.expansion
    weights = [grouped_conv_parameters(c.kernel, c.in_chs, c.out_chs, c.groups) for c in convs]
    outputs = [c.out_chs * c.size**2 for c in convs]
    pooled = 0 if variant.small_stem else 64 * _halved(convs[0].size) ** 2
    return Complexity(
        parameters=sum(weights) + sum(2 * c.out_chs for c in convs) + (features + 1) * classes,
        macs=sum(w * c.size**2 for w, c in zip(weights, convs, strict=True)) + features * classes,
        activations=sum(outputs) + classes,
        # the image, what follows each convolution, the pooled map with its int64 places (two elements), the features
        saved=in_chans * size**2
        + sum(output * c.kept for output, c in zip(outputs, convs, strict=True))
        + 3 * pooled
        + features,
    )


def _convolutions(variant: Variant, image_size: int, in_chans: int) -> Iterator[_Conv]:
    """Walk the convolutions of a network in the order of its forward pass (paper, Table 1)."""
    size = image_size if variant.small_stem else _halved(image_size)
    yield _Conv(3 if variant.small_stem else 7, in_chans, 64, 1, size, kept=2)
    size = size if variant.small_stem else _halved(size)
    in_chs = 64
    for stage, (depth, stage_width) in enumerate(zip(variant.layers, STAGE_WIDTHS, strict=False)):
        width = stage_width * variant.base_width // 64 * variant.cardinality
        out_chs = stage_width * Bottleneck.expansion
        for block in range(depth):
            before = size
            size = _halved(size) if block == 0 and stage > 0 else size
            yield _Conv(1, in_chs, width, 1, before, kept=2)
            yield _Conv(3, width, width, variant.cardinality, size, kept=2)
            yield _Conv(1, width, out_chs, 1, size, kept=2)  # its own output, and the block's
            if block == 0:
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
    """Give the base width d with which a network of this cardinality costs most nearly what the reference costs.

    Args:
        cardinality: Number of groups C.
        reference: The network to match: its layers are kept.
        preserve: `block` matches equation 4, as the paper's Table 2 does; `parameters` and `macs` match whole networks.
        image_size: Resolution for `macs`, in pixels.

    Raises:
        ValueError: If even one channel a group costs more than twice the reference.
    """
    if cardinality < 1:
        raise ValueError(f"cardinality={cardinality} is not a positive number of groups")

    def cost(base_width: int, groups: int = cardinality) -> int:
        if preserve == "block":
            return block_parameters(groups, base_width)
        network = Variant(
            name="",
            layers=reference.layers,
            cardinality=groups,
            base_width=base_width,
            small_stem=reference.small_stem,
        )
        found = complexity_of(network, image_size)
        return found.parameters if preserve == "parameters" else found.macs

    target = cost(reference.base_width, reference.cardinality)
    width = 1
    while cost(width + 1) <= target:  # the cost grows with the width
        width += 1
    nearest = min((width, width + 1), key=lambda d: abs(cost(d) - target))
    if cost(nearest) > 2 * target:
        raise ValueError(
            f"cardinality={cardinality} costs {cost(nearest):,} even at base_width={nearest}, "
            f"and the reference {target:,}"
        )
    return nearest


# ImageNet-1K top-1 error in percent, single 224 px crop (paper, Tables 3 and 4), and the error of the CIFAR networks on
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
"""Error that the paper reports for a variant, where it does."""


def info_rows(variants: Sequence[Variant], image_size: int | None = None) -> list[tuple[str, ...]]:
    """Give a table of variants, its head first: name, setting, cost, error in the paper, released weights."""
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
