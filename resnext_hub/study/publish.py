"""Publish a study: its report, its plots, and the card and record of every run."""

import tempfile
from pathlib import Path

import yaml

from resnext_hub.errors import RequestError
from resnext_hub.files import require_regular
from resnext_hub.hub.folder import publish_files
from resnext_hub.hub.publish import Publication, check_request
from resnext_hub.study.plan import StudyFolder, read_study
from resnext_hub.text import printable

_REPORT = ("report.json", "study.yaml", "plots/*.png", "runs/*/record.json", "runs/*/model/README.md")
_MEMBER = ("runs/*/model/config.json", "runs/*/model/plots/*.png")


def publish_study(
    folder: StudyFolder,
    repo_id: str | None,
    license: str | None,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str = "main",
    dry_run: bool = False,
) -> Publication:
    """Upload the report of a study with its plots and the card, plots, configuration and record of each run.

    Weights stay local: `publish` uploads those of a run that is worth a repository of its own.

    Args:
        folder: The study folder.
        repo_id: `owner/name`; created if it does not exist.
        license: License of the report, an ID from the Hub's list.
        private: Whether to create a new repository as private.
        create_pr: Whether to open a pull request instead of committing.
        revision: Branch to commit to; created if it does not exist.
        dry_run: Whether to only list the files, without any request.

    Raises:
        RequestError: If the request is incomplete, or the study has no report yet.
        RunError: If the Hub rejects the request, cannot be reached, or returns different bytes.
    """
    repo_id, license = check_request(None, repo_id, license)
    study = read_study(folder)
    if not folder.page.is_file() or not folder.report.is_file():
        raise RequestError(f"{printable(folder)} has no report yet; rerun the study to write it")
    files = {}
    for pattern in (*_REPORT, *_MEMBER):
        for path in sorted(folder.path.glob(pattern)):
            require_regular(path)
            files[path.relative_to(folder.path).as_posix()] = path
    metadata = {
        "license": license,
        "library_name": "timm",
        "tags": ["resnext-hub", "resnext", "image-classification", "study"],
    }
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch, "README.md")
        page.write_text(
            f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n{folder.page.read_text('utf-8')}", "utf-8"
        )
        return publish_files(
            files | {"README.md": page},
            repo_id,
            f"Upload a study of {study['kind']} on {printable(study['dataset'])}",
            private=private,
            create_pr=create_pr,
            revision=revision,
            dry_run=dry_run,
        )
