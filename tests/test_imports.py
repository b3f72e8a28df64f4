"""Imports point one way, and the package itself needs four others."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "resnext_hub"

# Every room may import from those before it, and from itself.
ORDER = (
    {"text", "__init__"},
    {"errors"},
    {"files", "extras", "facts"},
    {"yaml_files"},
    {"settings"},
    {"machine", "record"},
    {"run_folder"},
    {"processes", "trackers"},
    {"models"},
    {"kernels"},
    {"data"},
    {"export"},
    {"training", "inference"},
    {"cards", "plots"},
    {"hub"},
    {"runs"},
    {"api"},
    {"apps", "benchmark", "check", "report", "study"},
    {"cli"},
    {"__main__"},
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def imports_of(path: Path, top_alone: bool = False) -> set[str]:
    """Rooms of this package that a file imports, at the top or inside functions."""
    rooms = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_alone else ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "resnext_hub"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "resnext_hub":
                room = rest.partition(".")[0]
                rooms.add(room if room in RANK else "__init__")
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in RANK, f"{room} has no place in the order of imports"
    if room == "__init__":
        assert imports_of(path, top_alone=True) <= {
            "models",
            "errors",
        }  # what else is public is loaded when it is asked for
        return
    for imported in imports_of(path):
        before = RANK[imported] < RANK[room]
        assert before or imported == room, f"{path.name} imports {imported}, which stands beside or after {room}"


LONG_FILES = {"models/resnext.py"}
"""Files that may be longer: a model file holds all of its architecture, as in timm."""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short_enough_to_read(path: Path) -> None:
    text = path.read_text()
    if path.relative_to(PACKAGE).as_posix() not in LONG_FILES:
        assert text.count("\n") <= 400
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_the_package_needs_only_torch_timm_huggingface_hub_and_safetensors() -> None:
    # What those four bring along themselves (numpy, Pillow, PyYAML, …) is there with them.
    code = """
import sys
for name in ("accelerate", "datasets", "sklearn", "matplotlib", "jinja2", "pyarrow", "transformers"):
    sys.modules[name] = None  # importing it now says that there is no such module
import timm
import resnext_hub
assert timm.create_model("resnext_g32", num_classes=7).num_classes == 7
assert callable(resnext_hub.from_hub)
assert callable(resnext_hub.optimize)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
