"""The findings of a check as text and as JSON."""

from collections.abc import Iterable, Sequence
from typing import Any

from resnext_hub.check.findings import Findings, Group
from resnext_hub.data.examine import Facts
from resnext_hub.text import listing, printable
from resnext_hub.training.balance import IMBALANCED, SMALL_CLASS

SHOWN = 5
"""Findings of each kind that the text lists."""

CLASSES_SHOWN = 20
"""Classes that the text lists; of more, the largest and the smallest ones."""


def as_text(findings: Findings) -> str:
    """Return the findings for a terminal."""
    parts = [_classes(findings), *_notes(findings)]
    parts += listed("unreadable", [f"{_name(facts)}: {facts.reason}" for facts in findings.unreadable])
    parts += listed("single color", map(_name, findings.blank))
    conflicts = {id(group) for group in findings.conflicts}
    leaks = [group for group in findings.leaks if id(group) not in conflicts]
    others = [group for group in findings.groups if len(group.labels) == len(group.splits) == 1]
    parts += listed(
        "duplicates with different labels", [_group(group, findings.label_names) for group in findings.conflicts]
    )
    parts += listed("duplicates across splits", map(_group, leaks))
    parts += listed("duplicates within a split", map(_group, others))
    problems = findings.problems
    parts.append(f"{problems} {'problem' if problems == 1 else 'problems'} found" if problems else "no problems found")
    return "\n".join(parts) + "\n"


def as_json(findings: Findings) -> dict[str, Any]:
    """Return the findings as JSON."""
    return {
        "problems": findings.problems,
        "classes": list(findings.label_names),
        "images": {
            split: dict(zip(findings.label_names, counts, strict=True)) for split, counts in findings.counts.items()
        },
        "imbalance": findings.imbalance,
        "sizes": {what: list(size) for what, size in findings.sizes.items()},
        "modes": findings.modes,
        "unreadable": [_facts(facts) | {"reason": facts.reason} for facts in findings.unreadable],
        "single_color": [_facts(facts) for facts in findings.blank],
        "duplicates": [
            {
                "exact": group.exact,
                "across_splits": len(group.splits) > 1,
                "images": [_facts(facts) | _label(facts, findings.label_names) for facts in group.images],
                "different_labels": len(group.labels) > 1,
            }
            for group in findings.groups
        ],
    }


def _classes(findings: Findings) -> str:
    splits = list(findings.counts)
    rows = [["class", *map(printable, splits)]]
    counts = list(zip(*findings.counts.values(), strict=True))
    order = sorted(range(len(counts)), key=lambda i: (-counts[i][0], i))
    if len(order) > CLASSES_SHOWN:
        half = CLASSES_SHOWN // 2
        shown: list[int | None] = [*order[:half], None, *order[-half:]]
    else:
        shown = list(range(len(counts)))
    for i in shown:
        cells = ["…", *["…"] * len(splits)] if i is None else [printable(findings.label_names[i]), *map(str, counts[i])]
        rows.append(cells)
    rows.append(["total" if _sums_up(findings) else "images", *map(str, findings.totals.values())])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of names in the first column and numbers in the others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


def _notes(findings: Findings) -> Iterable[str]:
    if findings.sizes:
        shown = ", ".join(f"{what} {width} x {height}" for what, (width, height) in findings.sizes.items())
        yield f"\nsizes: {shown}"
        yield "modes: " + ", ".join(f"{mode} {count}" for mode, count in findings.modes.items())
    if findings.imbalance >= IMBALANCED:
        yield f"imbalanced: the largest class has {findings.imbalance:.0f}x as many training images as the smallest"
    for split in findings.counts:
        if missing := findings.missing(split):
            yield f"classes without images in {printable(split)}: {listing(missing)}"
        if split != findings.train and (small := findings.small(split)):
            yield f"classes with fewer than {SMALL_CLASS} images in {printable(split)}: {listing(small)}"


def listed(title: str, lines: Iterable[str], shown: int = SHOWN) -> list[str]:
    """Return a title with the number of lines, and the first ones below it; nothing if there are none."""
    found = list(lines)
    if not found:
        return []
    more = [f"  … and {len(found) - shown} more"] if len(found) > shown else []
    return [f"{title}: {len(found)}", *(f"  {line}" for line in found[:shown]), *more]


def _group(group: Group, label_names: Sequence[str] = ()) -> str:
    """Return the images of a group in one line, with their labels if names are given."""
    names = [
        f"{_name(facts)} ({labels_of(facts, label_names)})" if label_names else _name(facts)
        for facts in group.images[:4]
    ]
    more = f" and {len(group.images) - 4} more" if len(group.images) > 4 else ""
    return f"{' = ' if group.exact else ' ~ '}".join(names) + more


def labels_of(facts: Facts, label_names: Sequence[str]) -> str:
    """Return the names of the labels of an image."""
    return ", ".join(printable(label_names[i]) for i in facts.labels) or "none"


def _label(facts: Facts, label_names: Sequence[str]) -> dict[str, Any]:
    names = [label_names[i] for i in facts.labels]
    return {"label": names[0]} if len(names) == 1 else {"labels": names}


def _sums_up(findings: Findings) -> bool:
    """Return whether each image is in exactly one class."""
    return all(sum(counts) == findings.totals[split] for split, counts in findings.counts.items())


def _name(facts: Facts) -> str:
    return f"{printable(facts.split)}: {facts.name}"


def _facts(facts: Facts) -> dict[str, Any]:
    return {"split": facts.split, "row": facts.row, "name": facts.name}
