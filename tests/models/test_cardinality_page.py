"""Every number in the tables of docs/cardinality.md is what the formulas compute."""

import json
import re

from pytest import approx, mark, raises
from support.processes import ROOT

from resnext_hub.models import VARIANTS
from resnext_hub.models.complexity import PAPER_ERROR, block_parameters, complexity_of, grouped_conv_parameters
from resnext_hub.plots.block import plot_block

PAGE = (ROOT / "docs" / "cardinality.md").read_text()
PRODUCT = re.compile(r"(\d)² · (\d+) · (\d+) / (\d+) = ([\d,]+)")

# What the tables quote from the paper, where PAPER_ERROR does not have it (Tables 4 and 7, section 5.1).
QUOTED = {
    "ResNet-200": ["21.7", "5.8", "0.3"],
    "ResNet-101, 1x100d": ["21.3", "5.7", "0.7"],
    "ResNeXt-101, 2x64d": ["20.7", "5.5", "1.3"],
    "ResNeXt-101, 64x4d": ["20.4", "5.3", "1.6"],
    "ResNet-50": ["23.9", "31.2"],
    "ResNeXt-50, 32x4d": ["22.2", "26.1"],
    "Wide ResNet": ["4.17", "20.50"],
    "ResNeXt-29, 8x64d": ["3.65", "17.77"],
    "ResNeXt-29, 16x64d": ["3.58", "17.31"],
}


def rows_under(head: str) -> list[list[str]]:
    """Return the cells of the rows of the table whose header is `head`, optionally after an empty cell."""
    (table,) = [block for block in PAGE.split("\n\n") if re.match(rf"(\| )?\| {re.escape(head)} \|", block)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def integers(cells: list[str]) -> list[int]:
    return [int(cell.replace(",", "")) for cell in cells]


def setting(template: str) -> tuple[int, int]:
    """Return C and d of a setting such as 32x4d."""
    cardinality, _, width = template.removesuffix("d").partition("x")
    return int(cardinality), int(width)


def test_every_product_equals_its_result() -> None:
    products = PRODUCT.findall(PAGE)
    assert len(products) == len(rows_under("3x3 convolution"))
    for product in products:
        *factors, result = integers(list(product))
        assert grouped_conv_parameters(*factors) == result


def test_each_worked_example_is_of_the_convolution_in_its_row() -> None:
    for name, formula in rows_under("3x3 convolution"):
        channels, groups = integers(re.findall(r"\d+", name))
        match = PRODUCT.fullmatch(formula)
        assert match
        assert integers(list(match.groups()[:4])) == [3, channels, channels, groups]


def test_table_2_follows_from_equation_4() -> None:
    (head,) = re.findall(r"^\| cardinality C \|(.*)\|$", PAGE, re.M)
    cardinalities = integers(head.split("|"))
    widths, products, blocks = (integers(row[1:]) for row in rows_under("cardinality C | 1 | 2 | 4 | 8 | 32"))
    assert products == [c * d for c, d in zip(cardinalities, widths, strict=True)]
    assert blocks == [block_parameters(c, d) for c, d in zip(cardinalities, widths, strict=True)]


def test_every_member_of_the_family_has_the_weights_of_its_convolution() -> None:
    rows = rows_under("member | convolution | k | c | m | g | weights | block")
    assert [row[0].partition(",")[0].split()[0] for row in rows] == [
        *("AlexNet", "AlexNet", "AlexNet", "ResNet", "Wide", "ResNeXt", "depthwise")
    ]
    for _, convolution, *cells, block in rows:
        *factors, weights = integers(cells)
        assert grouped_conv_parameters(*factors) == weights
        if block:
            cardinality, width = setting(convolution)
            assert factors == [3, cardinality * width, cardinality * width, cardinality]
            assert integers([block]) == [block_parameters(cardinality, width)]


def test_alexnets_layers_without_groups_have_twice_the_weights() -> None:
    for _, _, *cells, block in rows_under("member | convolution | k | c | m | g | weights | block"):
        *factors, weights = integers(cells)
        if not block:
            assert grouped_conv_parameters(*factors[:3]) == 2 * weights


def test_the_cost_of_whole_models_is_computed() -> None:
    for label, name in (("ResNeXt-50 32x4d", "resnext_g32"), ("ResNet-50", "resnext_g1")):
        match = re.search(rf"{label} has ([\d.]+) M(?: parameters)? and (\d+\.\d+)", PAGE)
        assert match
        cost = complexity_of(VARIANTS[name])
        assert match.groups() == (f"{cost.parameters / 1e6:.3f}", f"{cost.macs / 1e9:.3f}")


def test_errors_in_the_tables_are_those_of_the_paper() -> None:
    groups = (1, 2, 4, 8, 32)
    for prefix, row in zip(("resnext", "resnext101"), rows_under("1x64d | 2x40d | 4x24d | 8x14d | 32x4d"), strict=True):
        assert [float(cell) for cell in row[1:]] == [PAPER_ERROR[f"{prefix}_g{g}"] for g in groups]
    assert [row[0] for row in rows_under("1x64d | 2x40d | 4x24d | 8x14d | 32x4d")] == ["50 layers", "101 layers"]
    doubled = rows_under("increased dimension | model | top-1 error | top-5 error | gain, top-1")
    names = ("resnext200_g1", "resnext101_g1_w100", "resnext101_g2_w64", "resnext101_g64_w4")
    for name, (_, _, top1, _, gain) in zip(names, doubled, strict=True):
        assert float(top1) == PAPER_ERROR[name]
        assert float(gain) == approx(PAPER_ERROR["resnext101_g1"] - PAPER_ERROR[name])
    rows = [row[1:] for row in doubled]
    rows += rows_under("top-1 error | with shortcuts | without") + rows_under("model | CIFAR-10 | CIFAR-100")
    assert {name: cells for name, *cells in rows} == QUOTED
    shortcuts = [[float(cell) for cell in row[1:]] for row in rows_under("top-1 error | with shortcuts | without")]
    assert [row[0] for row in shortcuts] == [PAPER_ERROR["resnext_g1"], PAPER_ERROR["resnext_g32"]]
    advantage = [f"{resnet - resnext:.1f}" for resnet, resnext in zip(*shortcuts, strict=True)]
    assert f"from {' to '.join(advantage)} points" in PAGE
    cifar = [float(row[1]) for row in rows_under("model | CIFAR-10 | CIFAR-100")[1:]]
    assert cifar == [PAPER_ERROR["resnext29_g8_w64"], PAPER_ERROR["resnext29_g16_w64"]]


@mark.parametrize(("reference", "other"), [((1, 64), (32, 4)), ((1, 64), (8, 14))])
def test_the_figure_shows_equation_4_and_every_group(reference: tuple[int, int], other: tuple[int, int]) -> None:
    (axes,) = plot_block(reference, other).axes
    texts = [text.get_text() for text in axes.texts]
    for cardinality, width in (reference, other):
        assert f"{block_parameters(cardinality, width):,} parameters" in texts
        grouped = grouped_conv_parameters(3, cardinality * width, cardinality * width, cardinality)
        assert f"{grouped:,} parameters" in texts
    convolutions = 2 * 2 + reference[0] + other[0]
    assert len(axes.patches) == 2 * 4 + convolutions  # four feature maps in each block


def test_a_block_wider_than_its_input_is_refused() -> None:
    with raises(ValueError, match="128x4d is wider than the input"):
        plot_block(other=(128, 4))


def test_the_study_in_the_page_has_the_numbers_of_its_report() -> None:
    report = json.loads((ROOT / "docs/study/cardinality/report.json").read_text())
    errors, differences, intervals = rows_under("member | 1x64d | 2x40d | 4x24d | 8x14d | 32x4d")
    assert errors[1:] == [f"{100 - member['accuracy_mean']:.2f}" for member in report["members"]]
    assert all(abs(member["deviation"]) <= 0.02 for member in report["members"])
    found = report["comparisons"]
    assert differences[2:] == [f"{difference['mean']:+.2f}" for difference in found]
    assert intervals[2:] == [f"{difference['low']:+.2f} to {difference['high']:+.2f}" for difference in found]


def test_the_study_of_twice_the_cost_in_the_page_has_the_numbers_of_its_report() -> None:
    report = json.loads((ROOT / "docs/study/doubling/report.json").read_text())
    (head,) = [block for block in PAGE.split("\n\n") if block.startswith("| how the cost is doubled |")]
    members, errors, gains, intervals, paper = (
        [cell.strip() for cell in line.split("|")[2:-1]] for line in head.splitlines()[2:]
    )
    base, *doubled = report["members"]
    for shown, member in zip(members, doubled, strict=True):
        assert member["name"].endswith(shown)
    assert errors == [f"{100 - member['accuracy_mean']:.2f}" for member in doubled]
    assert all(abs(member["deviation"]) <= 0.02 for member in report["members"])
    found = [entry for entry in report["comparisons"] if entry["baseline"] == base["name"]]
    assert gains == [f"{entry['mean']:+.2f}" for entry in found]
    assert intervals == [f"{entry['low']:+.2f} to {entry['high']:+.2f}" for entry in found]
    names = ("resnext200_g1", "resnext101_g1_w100", "resnext101_g2_w64", "resnext101_g64_w4")
    assert paper == [f"{PAPER_ERROR['resnext101_g1'] - PAPER_ERROR[name]:+.1f}" for name in names]
