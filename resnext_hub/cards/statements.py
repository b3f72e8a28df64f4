"""What a card states that can be checked: its metadata field `resnext_hub`, and the figures that a reader sees."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from resnext_hub.cards.card_file import CARD_BYTES, TAGS, split_card, take_apart
from resnext_hub.data.config import NO_TEST, DataConfig
from resnext_hub.data.loaders import PIXELS, LoaderConfig
from resnext_hub.errors import RequestError, one_line
from resnext_hub.facts import LabelFacts
from resnext_hub.files import convert, read_regular
from resnext_hub.record import RunRecord
from resnext_hub.text import printable
from resnext_hub.yaml_files import parse_yaml

FIELD = "resnext_hub"
"""The metadata field; its keys are those of `Facts`."""

FORMAT_VERSION = 1

LONGEST = 80
"""Characters of JSON up to which the value of a key of config.json is stated; of a longer one its SHA-256 is."""

_NOT_STATED = {"max_bad_fraction", "shuffle_block"}
"""Settings of a dataset that do not change which images are evaluated."""

_Count = Annotated[int, Meta(ge=0)]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class ResultFacts:
    """The counts of an evaluation."""

    correct: _Count
    count: Annotated[int, Meta(ge=1)]
    batch_size: Annotated[int, Meta(ge=1, le=1_000_000)]
    counts: _Digest
    """SHA-256 of the counts of every class; see `digest_of_counts`."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card states for programs."""

    format_version: int
    weights: _Digest
    """SHA-256 of model.safetensors."""
    config: dict[str, Any]
    """Values of config.json; see `config_facts`."""
    dataset: dict[str, Any]
    """The settings that open the dataset, by their flat names; a local one is reduced to its name."""
    fingerprint: str
    """Of the dataset."""
    max_image_pixels: Annotated[int, Meta(ge=1, le=PIXELS)]
    evaluation: ResultFacts
    test: ResultFacts | None = None

    @property
    def results(self) -> dict[str, ResultFacts]:
        """The results by part of the run, `evaluation` and `test`."""
        return {"evaluation": self.evaluation} | ({} if self.test is None else {"test": self.test})


def facts_of(record: RunRecord, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the metadata field for a run and the config.json of its model."""
    stated = {field.name: record.config.get(field.name) for field in fields(DataConfig)}
    stated |= {"dataset_revision": record.dataset.revision}
    # records of versions without these settings: there was no test, and copies were not kept together
    if stated["group_duplicates"] is None:
        stated["group_duplicates"] = False
    if stated["test_split"] is None and not stated["test_fraction"]:
        stated["test_split"] = NO_TEST
    parts = {"evaluation": record.evaluation} | ({} if record.test is None else {"test": record.test})
    return {
        "format_version": FORMAT_VERSION,
        "weights": record.model.weights_sha256,
        "config": config_facts(config),
        "dataset": {name: value for name, value in stated.items() if value is not None and name not in _NOT_STATED},
        "fingerprint": record.dataset.fingerprint,
        "max_image_pixels": record.config.get("max_image_pixels", LoaderConfig.max_image_pixels),
        **{
            part: {
                "correct": facts.correct,
                "count": facts.count,
                "batch_size": facts.batch_size,
                "counts": digest_of_counts(facts.confusion, facts.labels),
            }
            for part, facts in parts.items()
        },
    }


def config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json by key, such as `pretrained_cfg.mean`; in place of long ones their SHA-256."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return {key: _stated(value) for key, value in flat.items()}


def _stated(value: Any) -> Any:
    """Return a short plain value as it is; names from data could contain anything, so a list of them is not plain."""
    text = json.dumps(value, sort_keys=True)
    plain = re.fullmatch(r'"[\w./:+-]*"|null|true|false|[-\d.eE+, \[\]]*', text, re.ASCII)
    return value if plain and len(text) <= LONGEST else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def digest_of_counts(confusion: Sequence[Sequence[tuple[int, int]]], labels: Sequence[LabelFacts] | None) -> str:
    """Return the SHA-256 of the confusion matrix, or with several labels of the counts of each, as JSON."""
    several = [(label.positives, label.predicted, label.true_positives) for label in labels or []]
    return hashlib.sha256(json.dumps(confusion if labels is None else several).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CardStatements:
    """What a card states."""

    facts: Facts
    edited: bool
    """Whether its generated part was edited."""
    claims: list[tuple[str, str, str]]
    """Where the text states a result, the correct images and all images, as a reader sees them."""
    rows: list[tuple[str, ...]]
    """The cells of its table of classes that are counts or follow from them; see `class_cells`."""
    accuracies: list[Any]
    """Top-1 accuracies in `model-index`."""


def read_statements(path: Path) -> CardStatements:
    """Read the card of a model folder.

    Raises:
        RequestError: If there is none, or it states nothing that can be checked.
    """
    try:
        text = read_regular(path, CARD_BYTES).decode()
        card, (metadata, body) = take_apart(text, TAGS), split_card(text)
        content = parse_yaml(metadata)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise RequestError(f"{printable(path)} cannot be read: {reason}; expected the card of a model") from error
    if FIELD not in content:
        raise RequestError(
            f"{printable(path)} contains nothing that can be checked: the metadata field {FIELD} is missing, so the "
            "card was written by another program or an earlier version of resnext-hub; push the run again to write a "
            "new card"
        )
    stated = content[FIELD]
    version = stated.get("format_version") if isinstance(stated, dict) else None
    if version != FORMAT_VERSION:
        raise RequestError(
            f"{printable(path)} has facts in format version {printable(version)[:40]}, but this version of resnext-hub "
            f"reads version {FORMAT_VERSION}; update resnext-hub"
        )
    facts = convert(stated, Facts, path, "restore the card that was published")
    classes, labels = _table(body, "class"), _table(body, "label")
    return CardStatements(
        facts=facts,
        edited=card.edited or not card.marked,
        claims=_claims(body),
        rows=[_cells(row, ("class", "images", "correct")) for row in classes]
        or [_cells(row, ("label", "images", "average precision", "precision", "recall")) for row in labels],
        accuracies=_accuracies(content.get("model-index")),
    )


def class_cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the cells of rows of a card that follow from counts, as `CardStatements.rows` has them."""
    several = ("name", "count", "ap", "precision", "recall")
    return [_cells(row, several if "ap" in row else ("name", "count", "correct")) for row in rows]


def _cells(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row.get(column)) for column in columns)


def _table(body: str, first: str) -> list[dict[str, str]]:
    """Return the rows of the first table whose first column has a name, by column."""
    match = re.search(rf"^(\| {first} \|.*)\n\|[-|]*\|\n((?:\|.*\n)*)", body, re.MULTILINE)
    lines = [match[1], *match[2].splitlines()] if match else [""]
    header, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=False)) for row in rows]


def _claims(body: str) -> list[tuple[str, str, str]]:
    """Return where the text states results, with correct and all images."""
    headline = re.search(r"\*\*accuracy [^*(]*\((\d+)/(\d+)\)\*\*", body)
    claims = [("its first paragraph", headline[1], headline[2])] if headline else []
    for row in _table(body, "split"):
        correct = row.get("correct") or _all_correct(row).rpartition("(")[2].rstrip(")")
        claims.append((f"the row of {row['split']}", correct, row.get("images", "")))
    return claims


def _all_correct(row: Mapping[str, str]) -> str:
    return row.get("all labels correct") or row.get("all labels right", "")  # the second one is in earlier cards


def _accuracies(index: Any) -> list[Any]:
    """Return the values of the top-1 accuracies of a model-index of any content, in order."""
    found = []
    for entry in index if isinstance(index, list) else []:
        for result in _listed(entry, "results"):
            metrics = _listed(result, "metrics")
            found += [metric.get("value") for metric in metrics if metric.get("name") in _TOP1]
    return found


_TOP1 = ("Top-1 accuracy", "All labels correct", "All labels right")
"""Names of the metric; the last one is that of earlier cards."""


def _listed(entry: Any, name: str) -> list[dict[str, Any]]:
    content = entry.get(name) if isinstance(entry, dict) else None
    return [inner for inner in content if isinstance(inner, dict)] if isinstance(content, list) else []
