"""The packages that come with extras, and what to install when one is missing."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec

from resnext_hub.errors import RequestError

EXTRA_OF_PACKAGE = {
    **dict.fromkeys(
        (
            "accelerate",
            "datasets",
            "fsspec",
            "imagehash",
            "jinja2",
            "matplotlib",
            "numpy",
            "PIL",
            "pyarrow",
            "simplejpeg",
            "sklearn",
            "tqdm",
            "yaml",
        ),
        "train",
    ),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    **dict.fromkeys(("nncf", "openvino"), "openvino"),
    "captum": "report",
    "gradio": "demo",
    **{name: name for name in ("tensorboard", "trackio", "wandb", "mlflow")},
}
"""Packages that commands import beyond the package's own dependencies, and the extra that installs them."""

OPTIONAL_PACKAGES = {"simplejpeg"}
"""Packages of an extra that commands can do without."""


@contextlib.contextmanager
def named_extras() -> Iterator[None]:
    """Name the extra that installs a package which is missing.

    Raises:
        RequestError: If such a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = EXTRA_OF_PACKAGE.get(package)
        if extra is None:
            raise
        raise RequestError(f'{package} is not installed; pip install "resnext-hub[{extra}]"') from error


def require_packages(extra: str) -> None:
    """Raise ModuleNotFoundError if a package of an extra is missing: some are only needed at the end of a command."""
    for name, brought_by in EXTRA_OF_PACKAGE.items():
        if brought_by == extra and name not in OPTIONAL_PACKAGES and find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
