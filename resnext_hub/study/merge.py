"""Take over finished runs from other folders of the same study, such as those of other machines."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from resnext_hub.errors import RequestError, setting
from resnext_hub.files import new_folder
from resnext_hub.study.plan import Study, StudyFolder, read_study
from resnext_hub.study.runner import finished_record
from resnext_hub.text import printable

_logger = logging.getLogger(__name__)


def take_over(study: Study, folders: Sequence[Path]) -> None:
    """Copy the finished runs that this study does not have.

    Args:
        study: The study.
        folders: Folders of the same study.

    Raises:
        RequestError: If a folder contains another study.
    """
    others = [StudyFolder(folder) for folder in folders]
    identity = study.identity()
    for other in others:
        content = read_study(other)
        differing = [name for name, value in identity.items() if content.get(name) != value]
        if differing:
            raise RequestError(
                f"{setting('merge', other)} contains another study: it differs in {', '.join(differing)}"
            )
    for other in others:
        copied = 0
        for member, seed in study.runs:
            source, target = other.run(member, seed), study.folder.run(member, seed)
            if finished_record(target) is None and finished_record(source) is not None:
                with new_folder(target.path) as aside:
                    shutil.copytree(source.path, aside, dirs_exist_ok=True)
                copied += 1
        _logger.info("%s: took over %d runs", printable(other), copied)
