"""The members of a study have equal cost, by the counted model."""

import timm
import torch
from pytest import mark, raises

from resnext_hub.errors import RequestError
from resnext_hub.models.complexity import complexity_of
from resnext_hub.study.members import KINDS, TOLERANCE, BaseConfig, Member, design

BASES = [
    BaseConfig(),
    BaseConfig(match="macs"),
    BaseConfig(depth=20, width_scale=0.375),
    BaseConfig(depth=11, width_scale=1.0, match="macs"),
    BaseConfig(depth=26, stem="imagenet", width_scale=0.5),
    BaseConfig(depth=50, stem="imagenet", width_scale=1.0, match="macs"),
]


def counted(member: Member, in_chans: int) -> int:
    """Parameters of the built model."""
    with torch.device("meta"):
        model = timm.create_model(member.variant.name, num_classes=7, in_chans=in_chans, **member.variant.model_args)
    return sum(parameter.numel() for parameter in model.parameters())


@mark.parametrize("base", BASES, ids=str)
@mark.parametrize("kind", KINDS)
def test_every_member_costs_what_it_should_within_2_percent(kind: str, base: BaseConfig) -> None:
    members = design(kind, base, (1, 2, 4, 8, 32), 32, 7, in_chans=1).members
    cost = getattr(complexity_of(base.variant(), 32, 7, 1), base.match)
    assert len({member.slug for member in members}) == len(members)
    for member in members:
        assert abs(member.deviation(base.match)) <= TOLERANCE
        assert counted(member, 1) == member.cost.parameters
        assert member.target in ((cost, 2 * cost) if kind == "doubling" else (cost,))


def test_the_grid_at_the_width_of_the_paper_is_that_of_the_paper() -> None:
    members = design("cardinality", BaseConfig(width_scale=1.0), (1, 2, 4, 8), 32, 10).members
    assert [member.name for member in members] == ["1x64d", "2x40d", "4x24d", "8x14d"]
    assert all(member.variant.group_widths is None for member in members)


def test_widths_leave_doubling_only_where_the_cost_demands_it() -> None:
    *_, member = design("cardinality", BaseConfig(width_scale=1.0), (1, 32), 32, 10).members
    assert member.variant.group_widths is not None
    first, second, third = member.variant.group_widths
    assert first <= second <= third
    assert abs(third - 16) <= 2


def test_members_of_doubling_are_deeper_wider_or_have_more_groups() -> None:
    base, deeper, wider, two, many = (m.variant for m in design("doubling", BaseConfig(), (), 32, 10).members)
    assert deeper.layers == tuple(2 * blocks for blocks in base.layers)
    assert abs(deeper.base_width / base.base_width - 1) < 0.1
    assert wider.layers == base.layers
    assert wider.cardinality == base.cardinality
    assert wider.stage_group_widths[0] > base.stage_group_widths[0]
    assert (two.cardinality, many.cardinality) == (2, 64)


def test_plain_members_have_no_shortcut() -> None:
    members = design("shortcuts", BaseConfig(), (), 32, 10).members
    assert [member.variant.shortcuts for member in members] == [True, True, False, False]
    for member in members:
        model = timm.create_model(member.variant.name, num_classes=10, **member.variant.model_args)
        assert any("downsample" in name for name, _ in model.named_parameters()) == member.variant.shortcuts


def test_a_cost_that_no_width_has_is_refused_with_the_setting_to_change() -> None:
    with raises(RequestError, match=r"no model with 32 groups matches the base's number of parameters.*width_scale"):
        design("cardinality", BaseConfig(width_scale=0.125), (1, 32), 32, 10)


@mark.parametrize(("depth", "stem"), [(30, "cifar"), (29, "imagenet")])
def test_a_depth_without_a_model_is_refused(depth: int, stem: str) -> None:
    with raises(RequestError, match=f"depth={depth}.*expected"):
        BaseConfig(depth=depth, stem=stem).variant()  # type: ignore[arg-type]
