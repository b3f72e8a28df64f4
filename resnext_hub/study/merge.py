"""Copy finished runs from other study folders: shards of the same study, or studies that share members."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resnext_hub.errors import RequestError, setting
from resnext_hub.files import new_folder, read_json
from resnext_hub.study.plan import Study, StudyFolder, claim_folder, read_study
from resnext_hub.study.runner import finished_record
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)


def take_over(study: Study, folders: Sequence[Path]) -> None:
    """Claim the folder of a study, and copy the finished runs that it does not have.

    Args:
        study: The study; nothing is written if one of the folders is refused.
        folders: Folders of the same study, or of another kind with the same base, dataset and settings.

    Raises:
        RequestError: If the base, the dataset or a setting of a folder differs, or it cannot be read.
    """
    others = [StudyFolder(folder) for folder in folders]
    identity = {name: value for name, value in study.identity().items() if name != "kind"}
    for other in others:
        content = read_study(other, "merge")
        differing = [name for name, value in identity.items() if content.get(name) != value]
        if differing:
            raise RequestError(
                f"{setting('merge', other)} contains a different study: it differs in {', '.join(differing)}"
            )
    claim_folder(study)
    for other in others:
        copied = 0
        theirs = {architecture: path.name for path, architecture in _architectures(other)}
        names = {path.name: theirs.get(architecture) for path, architecture in _architectures(study.folder)}
        for member, seed in study.runs:
            name, target = names[member.slug], study.folder.run(member.slug, seed)
            if name is None or finished_record(target) is not None:
                continue
            source = other.run(name, seed)
            if finished_record(source) is not None:
                with new_folder(target.path) as aside:
                    shutil.copytree(source.path, aside, dirs_exist_ok=True)
                copied += 1
        _logger.info("%s: copied %d finished %s", printable(other), copied, "run" if copied == 1 else "runs")


def _architectures(folder: StudyFolder) -> Iterator[tuple[Path, str]]:
    """Yield the folder of each member with its architecture; members of two kinds can differ in name only."""
    try:
        paths = sorted(folder.members.iterdir())
    except OSError as error:
        raise RequestError(f"{printable(folder.members)} cannot be read: {(error.strerror or '').lower()}") from error
    for path in paths:
        content = read_json(path / "config.json", dict[str, Any], f"choose another {setting('merge')}")
        yield path, json.dumps(content, sort_keys=True)
