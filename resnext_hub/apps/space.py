"""Publish a page that runs in the browser as a static Space."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from resnext_hub.apps.static import FILES, is_static_page
from resnext_hub.apps.templates import invitation
from resnext_hub.apps.web_runtime import VERSION
from resnext_hub.errors import RequestError
from resnext_hub.files import read_json, require_regular
from resnext_hub.hub.folder import publish_files
from resnext_hub.hub.publish import Publication, check_request
from resnext_hub.text import markdown, printable

_WAY_OUT = "write the page again with `resnext-hub demo RUN --static DIR`"


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What the card needs of labels.json."""

    title: str
    label_names: tuple[str, ...]
    thresholds: tuple[float, ...] | None


def publish_page(
    folder: Path,
    repo_id: str | None,
    license: str | None,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str = "main",
    dry_run: bool = False,
) -> Publication:
    """Upload a page with a card that makes the repository a static Space, and compare the uploaded files.

    Args:
        folder: Folder of the page.
        repo_id: `owner/name`; created as a static Space if it does not exist.
        license: License of the weights, an ID from the Hub's list.
        private: Whether to create a new Space as private.
        create_pr: Whether to open a pull request instead of committing.
        revision: Branch to commit to; created if it does not exist.
        dry_run: Whether to only list the files, without any request.

    Raises:
        RequestError: If the request is incomplete, or the folder is not such a page.
        RunError: If the Hub rejects the request, cannot be reached, or returns different bytes.
    """
    repo_id, license = check_request(None, repo_id, license)
    if not is_static_page(folder):
        raise RequestError(
            f"{printable(folder)} is not a demo page: expected a folder written by `resnext-hub demo --static`"
        )
    files = {name: folder / name for name in FILES}
    for path in files.values():
        require_regular(path)
    facts = read_json(files["labels.json"], _Facts, _WAY_OUT)
    with tempfile.TemporaryDirectory() as scratch:
        card = Path(scratch, "README.md")
        card.write_text(_card(facts, license), "utf-8")
        return publish_files(
            files | {"README.md": card},
            repo_id,
            f"Upload a page for {printable(facts.title)}",
            private=private,
            create_pr=create_pr,
            revision=revision,
            dry_run=dry_run,
            space=True,
        )


def _card(facts: _Facts, license: str) -> str:
    metadata = {
        "title": printable(facts.title),
        "sdk": "static",
        "app_file": "index.html",
        "license": license,
        "tags": ["resnext-hub", "image-classification"],
    }
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"
        f"# {markdown(facts.title)}\n\n"
        f"{invitation(facts.label_names, facts.thresholds is not None)} The model runs in the browser, "
        f"with ONNX Runtime Web {VERSION} (MIT license); images are not uploaded.\n\n"
        "`model.onnx` contains the preprocessing and the class names. Made with resnext-hub.\n"
    )
