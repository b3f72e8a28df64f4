"""Two blocks side by side: their channels to scale, the groups of the 3x3 convolution, and parameters by formula."""

from typing import TYPE_CHECKING, Any

from resnext_hub.models.complexity import grouped_conv_parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN = 350
"""Width of a block with its labels, in units of 1/100 inch, like all lengths here."""

BLOCK = 192
"""Width of the input and output of a block; the 32 groups of 32x4d are then 3 units wide, a whole number of pixels."""

LEFT = 24
"""Space to the left of a block, for the shortcut."""

TOP = 42
"""Space above a block, for its title."""

BAR, CONV = 19, 64
"""Heights of a feature map and of a convolution."""

DARK, POINTWISE, GROUPED = "#37474f", "#a9c9e6", "#f2a654"


def plot_block(reference: tuple[int, int] = (1, 64), other: tuple[int, int] = (32, 4), channels: int = 256) -> "Figure":
    """Draw two bottleneck blocks side by side, with widths proportional to the number of channels.

    Args:
        reference: Cardinality C and width d of the block on the left.
        other: The same of the block on the right.
        channels: Input and output channels of both blocks.

    Raises:
        ValueError: If the 3x3 convolution of a block is wider than its input.
    """
    from matplotlib.figure import Figure

    bottom = TOP + 4 * BAR + 3 * CONV
    figure = Figure(figsize=(2 * COLUMN / 100, (bottom + 46) / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 2 * COLUMN), ylim=(bottom + 46, 0))  # downwards, as data flows in the paper's figures
    axes.axis("off")
    for column, (cardinality, base_width) in enumerate((reference, other)):
        if cardinality * base_width > channels:
            raise ValueError(f"{cardinality}x{base_width}d is wider than the input of the block ({channels} channels)")
        _draw_block(axes, column * COLUMN + LEFT, cardinality, base_width, channels)
    return figure


def _draw_block(axes: Any, left: float, cardinality: int, base_width: int, channels: int) -> None:
    """Draw one block with its title, labels and total."""
    width = cardinality * base_width
    labels = left + BLOCK + 9
    name = "ResNet" if cardinality == 1 else "ResNeXt"
    axes.text(left + BLOCK / 2, 25, f"{name} {cardinality}x{base_width}d", fontsize=12, weight="bold", ha="center")
    convs = (
        (1, channels, width, 1, f"1x1, {channels} → {width}"),
        (3, width, width, cardinality, f"3x3, {cardinality} group{'s' * (cardinality > 1)}"),
        (1, width, channels, 1, f"1x1, {width} → {channels}"),
    )
    top, total = TOP, 0
    _draw_bar(axes, left, top, channels, channels)
    for kernel, in_chs, out_chs, groups, label in convs:
        parameters = grouped_conv_parameters(kernel, in_chs, out_chs, groups)
        total += parameters
        _draw_conv(axes, left, top + BAR, in_chs / channels, out_chs / channels, groups, kernel)
        top += BAR + CONV
        _draw_bar(axes, left, top, out_chs, channels)
        middle = top - CONV / 2
        axes.text(labels, middle - 1, label, fontsize=8.5, weight="bold", va="bottom")
        axes.text(labels, middle + 3, f"{parameters:,} parameters", fontsize=8.5, va="top")
    _draw_shortcut(axes, left, TOP + BAR / 2, top + BAR / 2)
    axes.text(left + BLOCK / 2, top + BAR + 26, f"{total:,} parameters", fontsize=11, weight="bold", ha="center")


def _draw_bar(axes: Any, left: float, top: float, width: int, channels: int) -> None:
    """Draw a feature map as a bar, as wide as it has channels."""
    from matplotlib.patches import Rectangle

    extent = BLOCK * width / channels
    text = f"{width} channels" if width == channels else f"{width}"
    axes.add_patch(Rectangle((left + (BLOCK - extent) / 2, top), extent, BAR, color=DARK, linewidth=0))
    axes.text(left + BLOCK / 2, top + BAR / 2 + 0.5, text, color="white", fontsize=8.5, ha="center", va="center")


def _draw_conv(
    axes: Any, left: float, top: float, in_fraction: float, out_fraction: float, groups: int, kernel: int
) -> None:
    """Draw a convolution as one quadrilateral per group, from its input channels to its output channels."""
    from matplotlib.patches import Polygon

    color = POINTWISE if kernel == 1 else GROUPED
    share = 1.0 if groups == 1 else 2 / 3  # of a group's width, so that the gaps between groups show
    ends = [(BLOCK * in_fraction, top), (BLOCK * out_fraction, top + CONV)]
    for group in range(groups):
        (a, b), (c, d) = (
            [left + (BLOCK - extent) / 2 + extent * (group + 0.5 + side * share / 2) / groups for side in (-1, 1)]
            for extent, _ in ends
        )
        axes.add_patch(Polygon([(a, top), (b, top), (d, top + CONV), (c, top + CONV)], color=color, linewidth=0))


def _draw_shortcut(axes: Any, left: float, start: float, end: float) -> None:
    """Draw the identity shortcut from the input to the output of a block."""
    out = left - 15
    axes.plot([left, out, out], [start, start, end], color=DARK, linewidth=1.2)
    arrow = dict(arrowstyle="-|>", color=DARK, linewidth=1.2, shrinkA=0, shrinkB=0)
    axes.annotate("", (left, end), (out, end), arrowprops=arrow)
    axes.text(out + 6, (start + end) / 2, "shortcut", color=DARK, fontsize=8.5, rotation=90, va="center")
