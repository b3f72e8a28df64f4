"""`resnext-hub info`: list the variants and their cost."""

import argparse
import difflib

from resnext_hub.cli.output import table, write
from resnext_hub.cli.parser import count, existing_path
from resnext_hub.errors import RequestError, one_line
from resnext_hub.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from resnext_hub.data.transforms import IMAGE_SIZE
    from resnext_hub.training.config import BATCH

    parser.add_argument("name", nargs="*", help="variants to list (default: all)")
    parser.add_argument(
        "--image-size",
        type=count(IMAGE_SIZE),
        metavar="N",
        help="image size to compute the cost for, in pixels (default: 224, or 32 for CIFAR variants)",
    )
    parser.add_argument(
        "--like",
        metavar="NAME",
        help="find the width at which the cost is the same as that of this model (such as resnet50)",
    )
    parser.add_argument("--cardinality", type=count(BATCH), metavar="C", help="with --like: number of groups")
    parser.add_argument(
        "--preserve",
        choices=("block", "parameters", "macs"),
        default="block",
        help="with --like: cost to match; block (default) is the number of parameters of a block (equation 4 of the "
        "paper)",
    )
    parser.add_argument(
        "--write-cards",
        type=existing_path,
        metavar="DIR",
        help="write a card (.md) and its data (.json) for each variant with released weights to this folder",
    )


def run(options: argparse.Namespace) -> None:
    """Print a table of variants, or the width that matches another model's cost."""
    if options.write_cards is not None:
        _write_cards(options)
    elif (options.like is None) != (options.cardinality is None):
        raise RequestError(
            "--like and --cardinality must be used together, for example: info --like resnet50 --cardinality 16"
        )
    elif options.like is None:
        _print_variants(options)
    else:
        _print_width(options)


def _write_cards(options: argparse.Namespace) -> None:
    from resnext_hub.cards.variant_card import write_variant_cards

    try:
        written = write_variant_cards(options.write_cards)
    except OSError as error:
        where, reason = printable(options.write_cards), error.strerror or one_line(error)
        raise RequestError(f"--write-cards {where} cannot be written to: {reason}; choose another folder") from error
    write("".join(f"{path}\n" for path in written))


def _print_variants(options: argparse.Namespace) -> None:
    from resnext_hub.models.complexity import info_rows
    from resnext_hub.models.resnext import VARIANTS

    for name in options.name:
        if name not in VARIANTS:
            close = difflib.get_close_matches(name, VARIANTS, n=4, cutoff=0.0)
            raise RequestError(f"{name} is not a variant; closest matches: {', '.join(close)}")
    write(table(info_rows([VARIANTS[name] for name in options.name or VARIANTS], options.image_size)))


def _print_width(options: argparse.Namespace) -> None:
    from resnext_hub.models.complexity import complexity_of, info_rows, preserving_width
    from resnext_hub.models.resnext import VARIANTS, Variant, variant_like

    reference = variant_like(options.like)
    if reference is None:
        raise RequestError(f"--like {options.like}: expected a variant, or a name such as resnet50")
    try:
        width = preserving_width(options.cardinality, reference, options.preserve, options.image_size)
    except ValueError as error:
        raise RequestError(str(error)) from error
    solved = Variant(
        name="solved",
        layers=reference.layers,
        cardinality=options.cardinality,
        base_width=width,
        small_stem=reference.small_stem,
    )
    *_, base = (name for name, v in VARIANTS.items() if (v.layers, v.small_stem) == (solved.layers, solved.small_stem))
    write(table(info_rows([reference, solved], options.image_size)))
    before, after = (complexity_of(variant, options.image_size) for variant in (reference, solved))
    write(
        f"\nparameters {after.parameters / before.parameters - 1:+.1%}, MACs {after.macs / before.macs - 1:+.1%}, "
        f"matched by --preserve {options.preserve} (block, parameters or macs)\n"
    )
    write(f'\ntimm.create_model("{base}", cardinality={options.cardinality}, base_width={width})\n')
