"""Probably wrong labels as text and as JSON."""

from collections import Counter
from typing import Any

from resnext_hub.check.labels import LabelFindings, WrongLabel
from resnext_hub.check.report import aligned, listed
from resnext_hub.text import printable

SHOWN = 10
"""Images, and pairs of classes, that the text lists."""


def as_text(findings: LabelFindings) -> str:
    """Return the findings for a terminal."""
    rows = [["split", "images", "flagged", "wrong labels (estimate)"]]
    for part in findings.parts:
        name = f"{printable(part.name)} (trained on)" if part.trained_on else printable(part.name)
        flagged = sum(found.part is part for found in findings.wrong)
        rows.append([name, f"{len(part.images)}", f"{flagged}", f"{part.estimate:.0f}"])
    names = [printable(name) for name in findings.label_names]
    lines = [aligned(rows), ""]
    lines += listed(
        "unreadable", [f"{printable(name)}: {entry.name}: {entry.reason}" for name, entry in findings.unreadable]
    )
    if not findings.wrong:
        return "\n".join([*lines, "no label is probably wrong\n"])
    pairs = Counter((found.label, found.suggested) for found in findings.wrong).most_common()
    lines += listed(
        "pairs of classes",
        [f"labeled {names[label]}, probably {names[suggested]}: {count}" for (label, suggested), count in pairs],
        SHOWN,
    )
    lines += listed(
        "labels that are probably wrong, the least probable first",
        (
            f"{printable(found.part.name)}: {found.name}: labeled {names[found.label]}, "
            f"probably {names[found.suggested]} ({found.probability:.2f})"
            for found in findings.wrong
        ),
        SHOWN,
    )
    return "\n".join(lines) + "\n"


def as_json(findings: LabelFindings) -> dict[str, Any]:
    """Return the findings as JSON."""
    return {
        "classes": list(findings.label_names),
        "splits": [
            {
                "split": part.name,
                "images": len(part.images),
                "trained_on": part.trained_on,
                "estimated_wrong_labels": part.estimate,
            }
            for part in findings.parts
        ],
        "unreadable": [
            {"split": name, "name": entry.name, "reason": entry.reason} for name, entry in findings.unreadable
        ],
        "wrong_labels": [_facts(found, findings.label_names) for found in findings.wrong],
    }


def _facts(found: WrongLabel, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "split": found.part.name,
        "trained_on": found.part.trained_on,
        "row": found.row,
        "name": found.name,
        "label": names[found.label],
        "label_probability": found.label_probability,
        "suggested": names[found.suggested],
        "probability": found.probability,
    }
