"""From a model folder to a repository on the Hub, in one commit."""

import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils._validators import validate_repo_id

from resnext_hub.errors import RequestError, RunError, one_line
from resnext_hub.files import write_json
from resnext_hub.hub.card import render_card
from resnext_hub.models.source import WEIGHTS
from resnext_hub.record import RunRecord


def publish(
    folder: Path,
    record: RunRecord,
    repo_id: str,
    license: str | None,
    *,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
) -> tuple[str | None, list[tuple[str, int]]]:
    """Upload a model folder, with its card made out for the repository.

    Args:
        folder: The model folder of a run.
        record: The run's record.
        repo_id: `owner/name`; created if it is not there.
        license: Licence of the weights. It is asked for, never assumed.
        private: Create the repository as a private one.
        create_pr: Open a pull request instead of committing to main.
        dry_run: Touch nothing and reach for nothing.

    Returns:
        Address of the commit or of the pull request (None in a dry run), and names and sizes in bytes of the files.

    Raises:
        RequestError: If there is nothing to publish, the id is no id, or there is no licence.
        RunError: If the Hub refuses or cannot be reached.
    """
    if not (folder / WEIGHTS).is_file():
        raise RequestError(f"{folder} holds no {WEIGHTS}: there is nothing to publish")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"--repo-id {repo_id}: {error}") from error
    if not license:
        base = record.base_model
        hint = (
            f" (the weights that training started from, {base.id}, have {base.license or 'none stated'})"
            if base
            else ""
        )
        raise RequestError(f"--license is needed, such as apache-2.0, mit or cc-by-nc-4.0{hint}")

    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch, "model")
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns(".*"))
        (staged / "README.md").write_text(render_card(record, repo_id, license))
        config = json.loads((staged / "config.json").read_text())
        config["pretrained_cfg"]["license"] = license
        write_json(staged / "config.json", config)
        files = [(p.relative_to(staged).as_posix(), p.stat().st_size) for p in sorted(staged.rglob("*")) if p.is_file()]
        if dry_run:
            return None, files
        api = HfApi(library_name="resnext-hub")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                commit_message=f"{record.model.variant or record.model.architecture} trained on {record.dataset.id}",
                create_pr=create_pr,
            )
        except (HTTPError, OSError) as error:  # the first is the base of what the Hub's HTTP client raises
            raise RunError(
                f"{repo_id} could not be published: {one_line(error)}. Everything is kept in {folder}; "
                "the same command goes on"
            ) from error
    return commit.pr_url if create_pr else commit.commit_url, files
