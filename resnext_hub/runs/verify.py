"""Check what the card of a published model states: files against hashes, and counts against a new evaluation."""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from resnext_hub.cards.model_card import MOST_CLASSES, class_name, class_rows
from resnext_hub.cards.statements import (
    CardStatements,
    Facts,
    ResultFacts,
    class_cells,
    config_facts,
    digest_of_counts,
    read_statements,
)
from resnext_hub.data.config import DataConfig
from resnext_hub.data.sources import BUNDLED, is_url
from resnext_hub.data.splits import Splits, load_splits
from resnext_hub.errors import RequestError, setting
from resnext_hub.files import read_json, sha256_of
from resnext_hub.machine import device_type
from resnext_hub.models.fetch import check_revision, fetch_repository
from resnext_hub.models.lookup import ModelSource, find_model
from resnext_hub.models.ood import OOD
from resnext_hub.models.saved import CONFIG, WEIGHTS
from resnext_hub.models.saved_config import CONFIG_BYTES
from resnext_hub.processes.accelerator import set_threads
from resnext_hub.runs.recount import Counts, recount, start_timm
from resnext_hub.text import listing, printable

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A statement of the card, and what was found."""

    what: str
    stated: str
    found: str
    same: bool


def verify(
    model: str,
    *,
    dataset: str | None = None,
    exclude: str | None = None,
    evaluate: bool = True,
    threads: str = "auto",
) -> Iterator[Check]:
    """Yield checks of a model against its card, each as soon as it is done.

    Args:
        model: `hf-hub:owner/name[@revision]`, with or without the prefix, a model folder, or a run folder.
        dataset: The dataset, if the card describes a local one.
        exclude: The list of images that the run left out, if any.
        evaluate: Whether to evaluate the model again, with timm alone if it has the architecture.
        threads: CPU threads, or `auto`.

    Raises:
        RequestError: If there is no such model, its card states nothing that can be checked, or its dataset is missing.
        RunError: If the Hub cannot be reached, a file differs from what it lists, or the evaluation fails.
    """
    folder, on_hub = _open(model)
    if on_hub is not None:
        yield on_hub
    card = read_statements(folder / "README.md")
    yield Check(what="card", stated="unedited", found="edited" if card.edited else "unedited", same=not card.edited)
    yield _text(card)
    yield _same(WEIGHTS, card.facts.weights, sha256_of(folder / WEIGHTS), length=16)
    yield from _check_config(folder, card)
    if (folder / OOD).is_file():
        stated_hash = str(card.facts.config.get("resnext_hub.ood_sha256"))
        yield _same(OOD, stated_hash, sha256_of(folder / OOD), length=16)
    if not evaluate:
        return
    try:
        source = find_model(f"local-dir:{folder}", pretrained=True, where=printable(model))
    except RequestError as error:
        yield Check(what="loading the model", stated="loads", found=str(error), same=False)
        return
    splits = load_splits(_data_config(card.facts, dataset, exclude))
    yield _same("dataset", card.facts.fingerprint, splits.fingerprint, length=16)
    if splits.fingerprint == card.facts.fingerprint:
        yield from _evaluate(folder, source, splits, card, threads)


def _open(model: str) -> tuple[Path, Check | None]:
    """Return the model folder, downloaded if it is on the Hub, with a check of its files."""
    local = Path(model.removeprefix("local-dir:")).expanduser()
    places = (local / "model", local)
    folder = next((at for at in places if all((at / name).is_file() for name in (CONFIG, WEIGHTS))), None)
    name = model.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if name == model and folder is not None:
        return folder, None
    repo_id, at, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or local.is_dir():
        raise RequestError(
            f"{printable(model)}: expected hf-hub:owner/name, or a folder with {CONFIG}, {WEIGHTS} and README.md"
        )
    where = printable(model)
    if at:
        check_revision(f"{where}: {printable(revision) or 'an empty string'} after @", revision)
    folder, files = fetch_repository(where, repo_id, revision or None)
    count = f"{len(files.hashes)} files"
    return folder, Check(what=f"commit {files.commit[:12]}", stated=count, found=count, same=True)


def _same(what: str, stated: str, found: str, length: int | None = None) -> Check:
    return Check(what=what, stated=stated[:length], found=found[:length], same=stated == found)


def _text(card: CardStatements) -> Check:
    """Compare the results in the text of a card, and in its model-index, with those that it states for programs."""
    results = list(reversed(card.facts.results.values()))  # those that are reported come first, as in the text
    stated = [f"{facts.correct}/{facts.count}" for facts in results]
    if len(card.claims) > len(stated):
        stated = [stated[0], *stated]  # the first paragraph
    found = [(f"{correct}/{count}", f"in {place}") for place, correct, count in card.claims]
    stated += [repr(facts.correct / facts.count) for facts in results]
    found += [(repr(value), "in model-index") for value in card.accuracies]
    what, (first, _) = "results in the card", found[0] if found else ("none", "")
    for own, other in zip_longest(stated, found):
        if other is None or own != other[0]:
            text = "nothing" if other is None else " ".join(other)
            return Check(what=what, stated=own or "nothing", found=printable(text)[:100], same=False)
    return Check(what=what, stated=stated[0], found=first, same=True)


def _check_config(folder: Path, card: CardStatements) -> Iterator[Check]:
    """Compare the values of config.json with those that the card states; what differs is named by its key."""
    stated = card.facts.config
    content = read_json(folder / CONFIG, dict[str, Any], "restore the file", CONFIG_BYTES)
    found = config_facts(content)
    wrong = [key for key in {**stated, **found} if stated.get(key, _MISSING) != found.get(key, _MISSING)]
    if not wrong:
        yield Check(what=CONFIG, stated=f"{len(stated)} values", found=f"{len(found)} values", same=True)
    for key in wrong:
        values = [_shown(facts[key]) if key in facts else "not stated" for facts in (stated, found)]
        if key == "label_names":
            values = _differing_names(card.rows, content.get(key)) or values
        yield Check(what=f"{CONFIG}: {printable(key)[:80]}", stated=values[0], found=values[1], same=False)


_MISSING = object()


def _shown(value: Any) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value))
    return text[: len("sha256:") + 12] if text.startswith("sha256:") else text[:100]


def _differing_names(rows: Sequence[tuple[str, ...]], names: Any) -> list[str] | None:
    """Return the names that differ, in a table of all classes and in a config.json; None if the table is shorter."""
    if not isinstance(names, list) or len(rows) != len(names):
        return None
    pairs = [(row[0], class_name(str(name))) for row, name in zip(rows, names, strict=True)]
    pairs = [(stated, found) for stated, found in pairs if stated != found]
    return [listing(names, 4) for names in zip(*pairs, strict=True)] or None


def _data_config(facts: Facts, dataset: str | None, exclude: str | None) -> DataConfig:
    """Return the settings that open the dataset of a card.

    Raises:
        RequestError: If they are invalid, or refer to files of the machine of the run.
    """
    unknown = facts.dataset.keys() - {field.name for field in fields(DataConfig)}
    if unknown:
        raise RequestError(f"the card contains unknown dataset settings: {listing(sorted(unknown))}")
    config = DataConfig(**facts.dataset)
    local = config.dataset_revision is None and config.dataset != BUNDLED and not is_url(config.dataset)
    if local and dataset is None:
        raise RequestError(
            f"the card describes the local dataset {printable(config.dataset)}; pass its path with "
            f"{setting('dataset', 'PATH')}, or check only hashes with {setting('evaluate', False)}"
        )
    if config.exclude is not None and exclude is None:
        raise RequestError(
            f"the run excluded the images listed in {printable(config.exclude)}; pass the path of this list with "
            f"{setting('exclude', 'FILE')}, or check only hashes with {setting('evaluate', False)}"
        )
    if dataset is not None:
        config = dataclasses.replace(config, dataset=dataset, dataset_revision=None)
    return dataclasses.replace(config, exclude=exclude)


def _evaluate(folder: Path, source: ModelSource, splits: Splits, card: CardStatements, threads: str) -> Iterator[Check]:
    """Evaluate the model on the splits of the run, and compare the counts."""
    unknown = set(source.saved.label_names) ^ set(splits.label_names)
    if unknown:
        what = f"not the same: {listing(sorted(unknown), 4)}"
        yield Check(what="classes", stated="those of the dataset", found=what, same=False)
        return
    device = torch.device(device_type())
    set_threads(threads, device.type)
    reported = list(card.facts.results)[-1]
    for part, stated in card.facts.results.items():
        if part not in splits.evaluated:
            yield Check(what=f"{part} images", stated=str(stated.count), found="none", same=False)
            continue
        with start_timm(folder, source, stated.batch_size, str(device)) as timm:
            how = "and the architecture of this package" if timm.versions["plugin"] else "alone"
            _logger.info("classifying the %s images with timm %s %s", part, timm.versions["timm"], how)
            images = splits.evaluated[part]
            counts = recount(timm, source, images, splits.label_names, card.facts.max_image_pixels)
        yield from _compare(part, stated, counts)
        if part == reported:
            yield _compare_rows(card.rows, counts, splits.label_names)


def _compare(part: str, stated: ResultFacts, counts: Counts) -> Iterator[Check]:
    correct, every = f"{counts.correct}/{counts.count}", digest_of_counts(counts.confusion, counts.labels)
    yield _same(f"{part}: correct", f"{stated.correct}/{stated.count}", correct)
    yield _same(f"{part}: counts of each class", stated.counts, every, length=16)


def _compare_rows(stated: Sequence[tuple[str, ...]], counts: Counts, names: Sequence[str]) -> Check:
    """Compare the table of classes in a card."""
    found = class_cells(class_rows(names, counts.confusion, counts.labels)[:MOST_CLASSES])
    what = "table of classes in the card"
    for own, other in zip_longest(stated, found):
        if own != other:
            texts = [" | ".join(cells) if cells else "no row" for cells in (own, other)]
            return Check(what=what, stated=printable(texts[0])[:100], found=texts[1], same=False)
    return Check(what=what, stated=f"{len(stated)} rows", found=f"{len(found)} rows", same=True)
