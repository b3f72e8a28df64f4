"""A page that runs a model in the browser: a folder of static files that requests nothing from elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

from resnext_hub.apps.answer import MOST_CLASSES, unsure_below
from resnext_hub.apps.templates import COLORS, invitation, render, text_of
from resnext_hub.apps.web_runtime import MEMBERS, runtime_files
from resnext_hub.data.decode import MAX_ASPECT, MAX_IMAGE_PIXELS
from resnext_hub.errors import RequestError, setting
from resnext_hub.files import new_folder, write_json

if TYPE_CHECKING:
    from resnext_hub.inference.classifier import Classifier

RUNTIME = "onnxruntime-web"
"""Folder of the runtime's files."""

FILES = ("index.html", "demo.js", "labels.json", "model.onnx", *(f"{RUNTIME}/{name}" for name in MEMBERS))
"""Files of the page."""


def write_static(classifier: "Classifier", title: str, folder: Path, archive: Path | None = None) -> int:
    """Write the page, in place of an earlier one; return its size in bytes.

    Args:
        classifier: The classifier.
        title: Heading of the page.
        folder: The folder; it must not exist, or be empty or an earlier page.
        archive: npm's package of ONNX Runtime Web; downloaded by npm and cached if not given.

    Raises:
        RequestError: If the folder has other files, or the package is missing or another one.
        RunError: If the download or the export fails; an earlier page is kept.
    """
    if folder.exists() and not (is_static_page(folder) or (folder.is_dir() and not any(folder.iterdir()))):
        raise RequestError(f"{setting('static', folder)} exists but is not a demo page; expected a new folder")
    runtime = runtime_files(archive)
    folder = folder.absolute()
    with new_folder(folder) as filling:
        classifier.export("onnx", filling / "model.onnx")
        (filling / RUNTIME).mkdir()
        for name, content in runtime.items():
            (filling / RUNTIME / name).write_bytes(content)
        facts = {
            "title": title,
            "label_names": classifier.label_names,
            "thresholds": classifier.thresholds,
            "unsure_below": unsure_below(classifier),
            "most_classes": MOST_CLASSES,
            "max_pixels": MAX_IMAGE_PIXELS,
            "max_aspect": MAX_ASPECT,
        }
        write_json(filling / "labels.json", facts)
        (filling / "demo.js").write_text(text_of("demo.js"), "utf-8")
        text = invitation(classifier.label_names, classifier.is_multi_label)
        page = render("index.html.jinja", title=title, invitation=text, style=text_of("answer.css"), **COLORS)
        (filling / "index.html").write_text(page, "utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_static_page(folder: Path) -> bool:
    """Return whether a folder is a page that `write_static` wrote."""
    return all((folder / name).is_file() for name in FILES)
