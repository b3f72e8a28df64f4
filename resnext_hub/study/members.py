"""The members of a study: architectures of equal cost, derived from a base (paper, Tables 2 to 4)."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from resnext_hub.errors import RequestError, setting
from resnext_hub.models.complexity import Complexity, complexity_of
from resnext_hub.models.resnext import STAGE_WIDTHS, Variant
from resnext_hub.settings import Range, check_fields

TOLERANCE = 0.02
"""Largest relative deviation of a member's counted cost from its target."""

KINDS = {
    "cardinality": "several cardinalities, with widths chosen for equal cost (paper, Table 3: 1x64d to 32x4d)",
    "doubling": "ways to double the cost: by depth, by width and by cardinality (paper, Table 4)",
    "shortcuts": "ResNet and ResNeXt with and without residual connections, at equal cost (paper, section 5.1)",
    "resnet": "ResNet and ResNeXt at equal cost, with training curves (paper, Figure 5)",
}
"""The studies, and what each compares."""

_IMAGENET_LAYERS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The base architecture."""

    depth: Annotated[int, Range(11, 1000)] = 29
    """Number of layers of the base architecture: 9n + 2 with the cifar stem, such as 20 or 29; 26, 50, 101 or 152 with
    the imagenet stem."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers and number of stages. cifar: 3x3 convolution at full resolution, three stages; imagenet: 7x7
    convolution and pooling, four stages."""
    width_scale: Annotated[float, Range(1 / 64, 8)] = 0.5
    """Multiplier for the channels of all stages; 1 is the width used in the paper. The number before the d in a
    member's name, such as 4 in 32x4d, is the width of a group before scaling."""
    match: Literal["parameters", "macs"] = "parameters"
    """Cost by which members are matched: number of parameters, or multiply-adds (macs)."""

    def __post_init__(self) -> None:
        check_fields(self)

    def variant(self) -> Variant:
        """Return the base as a variant of one group of width 64.

        Raises:
            RequestError: If there is no model of that depth.
        """
        cifar = self.stem == "cifar"
        if cifar and (self.depth - 2) % 9 == 0:
            layers: tuple[int, ...] = ((self.depth - 2) // 9,) * 3
        elif not cifar and self.depth in _IMAGENET_LAYERS:
            layers = _IMAGENET_LAYERS[self.depth]
        else:
            expected = "9n + 2, such as 11, 20 or 29" if cifar else ", ".join(map(str, _IMAGENET_LAYERS))
            raise RequestError(f"{setting('depth', self.depth)} with {setting('stem', self.stem)}: expected {expected}")
        channels = tuple(max(1, round(width * self.width_scale)) for width in STAGE_WIDTHS)
        name = "resnext29_g32_w4" if cifar else "resnext_g32"
        return Variant(name=name, layers=layers, cardinality=1, base_width=64, small_stem=cifar, channels=channels)


@dataclass(frozen=True, kw_only=True)
class Member:
    """An architecture of a study."""

    name: str
    """Name in the report, such as `32x4d`."""
    variant: Variant
    """The architecture; `timm.create_model` builds it from its name and `variant.model_args`."""
    target: int
    """Parameters or multiply-adds that it should have."""
    cost: Complexity

    @property
    def slug(self) -> str:
        """Name of its folders."""
        return re.sub(r"[^\w]+", "-", self.name.lower())

    def deviation(self, match: str) -> float:
        """Return the relative deviation of its counted parameters or multiply-adds from the target."""
        counted: int = getattr(self.cost, match)
        return counted / self.target - 1

    def facts(self) -> dict[str, Any]:
        """Return its architecture and cost, for a report."""
        return {
            "name": self.name,
            "architecture": self.variant.name,
            "model_args": self.variant.model_args,
            "depth": self.variant.depth,
            "cardinality": self.variant.cardinality,
            "group_widths": list(self.variant.stage_group_widths),
            "shortcuts": self.variant.shortcuts,
            "parameters": self.cost.parameters,
            "macs": self.cost.macs,
            "activations": self.cost.activations,
            "target": self.target,
        }


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a study trains and compares."""

    members: tuple[Member, ...]
    comparisons: tuple[tuple[str, str], ...]
    """Pairs of a member and its baseline, by name."""


def design(
    kind: str, base: BaseConfig, cardinalities: Sequence[int], image_size: int, num_classes: int, in_chans: int = 3
) -> Design:
    """Return the members of a study and what to compare.

    Args:
        kind: One of `KINDS`.
        base: The base architecture.
        cardinalities: Numbers of groups for the kind `cardinality`; the first one is the baseline.
        image_size: Image size in pixels, for multiply-adds and activations.
        num_classes: Number of classes.
        in_chans: Number of image channels.

    Raises:
        RequestError: If no architecture with some number of groups has a cost within 2 % of its target.
    """
    plain = base.variant()
    solver = _Solver(base=base, image_size=image_size, num_classes=num_classes, in_chans=in_chans)
    cost = solver.counted(plain)
    if kind == "cardinality":
        grid = [solver.matching(replace(plain, cardinality=c), cost, "{C}x{d}d") for c in cardinalities]
        return Design(members=tuple(grid), comparisons=tuple((member.name, grid[0].name) for member in grid[1:]))
    grouped = replace(plain, cardinality=32)
    if kind == "doubling":
        return _doubling(solver, plain, cost)
    resnet = solver.matching(plain, cost, "ResNet {C}x{d}d")
    resnext = solver.matching(grouped, cost, "ResNeXt {C}x{d}d")
    if kind == "resnet":
        return Design(members=(resnet, resnext), comparisons=((resnext.name, resnet.name),))
    bare = solver.matching(replace(plain, shortcuts=False), cost, "ResNet without shortcuts")
    bare_grouped = solver.matching(replace(grouped, shortcuts=False), cost, "ResNeXt without shortcuts")
    return Design(
        members=(resnet, resnext, bare, bare_grouped),
        comparisons=(
            (resnext.name, resnet.name),
            (bare.name, resnet.name),
            (bare_grouped.name, resnext.name),
            (bare_grouped.name, bare.name),
        ),
    )


def _doubling(solver: "_Solver", plain: Variant, cost: int) -> Design:
    """Return a base and members of twice its cost: deeper, wider, and with more groups.

    As in the paper, depth and width are those of the model with one group, and cardinality is doubled both from one
    group to two, and from the 32 groups that have the cost of the base to 64.
    """
    deep = replace(plain, layers=tuple(2 * blocks for blocks in plain.layers))
    base = solver.matching(plain, cost, "base {C}x{d}d")
    deeper = solver.matching(deep, 2 * cost, f"deeper, {deep.depth} layers")
    wider = solver.matching(plain, 2 * cost, "wider, {C}x{d}d")
    two = solver.matching(replace(plain, cardinality=2), 2 * cost, "cardinality {C}x{d}d")
    many = solver.matching(replace(plain, cardinality=64), 2 * cost, "cardinality {C}x{d}d")
    return Design(
        members=(base, deeper, wider, two, many),
        comparisons=(
            *((member.name, base.name) for member in (deeper, wider, two, many)),
            *((many.name, member.name) for member in (deeper, wider)),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Solver:
    """Finds the group widths at which an architecture has a certain cost."""

    base: BaseConfig
    image_size: int
    num_classes: int
    in_chans: int

    def cost(self, variant: Variant) -> Complexity:
        """Return the cost of an architecture with this study's images and classes."""
        return complexity_of(variant, self.image_size, self.num_classes, self.in_chans)

    def counted(self, variant: Variant) -> int:
        """Return the cost that members have in common: parameters or multiply-adds."""
        found: int = getattr(self.cost(variant), self.base.match)
        return found

    def matching(self, wanted: Variant, target: int, name: str) -> Member:
        """Return a member like `wanted`, with group widths that double from stage to stage if those match the cost.

        Otherwise the widths are as close to doubling as the cost allows.
        """

        def off(variant: Variant) -> float:
            return abs(self.counted(variant) / target - 1)

        doubling = [wanted] if off(wanted) <= TOLERANCE else self._doubling(wanted, target)
        solved = min(doubling, key=off)
        if off(solved) > TOLERANCE:
            close = [v for center in doubling for v in _around(center) if off(v) <= TOLERANCE]
            if not close:
                what = "parameters" if self.base.match == "parameters" else "multiply-adds"
                twice = "" if target == self.counted(self.base.variant()) else "twice "
                raise RequestError(
                    f"no model with {wanted.cardinality} groups matches {twice}the base's number of {what} to within "
                    f"{100 * TOLERANCE:.0f} % at {setting('width_scale', f'{self.base.width_scale:g}')}; the closest "
                    f"one is off by {100 * off(solved):.1f} %; use a larger {setting('width_scale')} or fewer groups"
                )
            solved = min(close, key=lambda v: (_skew(v), off(v)))
        name = name.format(C=solved.cardinality, d=solved.base_width)
        return Member(name=name, variant=solved, target=target, cost=self.cost(solved))

    def _doubling(self, wanted: Variant, target: int) -> list[Variant]:
        """Return the architectures with doubling widths on both sides of the target."""
        narrower: list[Variant] = []
        for base_width in itertools.count(1):
            variant = replace(wanted, base_width=base_width)
            if min(variant.stage_group_widths) < 1:
                continue
            if self.counted(variant) >= target:
                return [*narrower, variant]
            narrower = [variant]
        raise AssertionError("unreachable")


def _around(center: Variant) -> Iterator[Variant]:
    """Yield architectures with growing group widths near those of a center: an eighth or two channels off at most."""
    steps = []
    for width in center.stage_group_widths:
        most = max(2, width // 8)
        steps.append([w for w in range(width - most, width + most + 1) if w > 0])
    for widths in itertools.product(*steps):
        if list(widths) == sorted(widths):
            yield replace(center, group_widths=widths)


def _skew(variant: Variant) -> float:
    """Return how far the group widths are from doubling: the sum of relative distances from those of `base_width`."""
    doubled = replace(variant, group_widths=None).stage_group_widths
    return sum(abs(width / exact - 1) for width, exact in zip(variant.stage_group_widths, doubled, strict=True))
