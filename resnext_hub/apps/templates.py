"""The templates of the pages, which escape all text from data."""

import base64
import io
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from resnext_hub.plots.theme import DARK
from resnext_hub.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image


COLORS = {
    "light": "--paper: white; --ink: #1d2125; --faint: #5b6570; --track: #e3e7eb; --bar: #1a66b3; --warn: #a34100;",
    "dark": f"--paper: {DARK.paper}; --ink: {DARK.ink}; --faint: {DARK.faint}; --track: #2c333b; --bar: #6cb6ff; "
    "--warn: #ffa657;",
}
"""Variables of `answer.css` in both themes."""


def title_of(model: str) -> str:
    """Return the heading of a page for a model: the name of its folder without the path, or its name on the Hub."""
    if os.path.exists(model):
        return Path(model).resolve().name
    return model.removeprefix("hf-hub:").partition("@")[0]


def invitation(label_names: Sequence[str], several: bool) -> str:
    """Return what to do on a page, in one sentence.

    Args:
        label_names: Names of the classes.
        several: Whether an image can have several of them.
    """
    count = f"{len(label_names):,}"
    if several:
        return f"Drop an image to see which of {count} labels it has."
    return f"Drop an image to classify it as one of {count} classes."


def text_of(name: str) -> str:
    """Return the content of a file of this package."""
    return resources.files("resnext_hub.apps").joinpath(name).read_text("utf-8")


def render(name: str, **values: object) -> str:
    """Return a template of this package, filled in."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True)
    environment.filters |= {"line": printable, "png": _data_uri}
    return environment.from_string(text_of(name)).render(values)


def _data_uri(image: "Image") -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
