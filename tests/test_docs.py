"""What the documentation shows is run, and what it names exists."""

import argparse
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import yaml
from PIL import Image
from pytest import MonkeyPatch, mark, param
from support import mistakes
from support.processes import ROOT

from resnext_hub.cli.main import COMMANDS, build_parser
from resnext_hub.models import VARIANTS
from resnext_hub.training.config import flat_fields

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCKS = [
    (page, kind, text) for page in PAGES for kind, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S)
]
LINES = [(page, line) for page, kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
GPU_REPORT = "scripts/gpu_report.py"
"""Not a command of the package."""

COMMAND_LINES = [(page, line) for page, line in LINES if "scripts/" in line or line.startswith("resnext-hub ")]


@mark.parametrize(("page", "line"), COMMAND_LINES, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_every_command_is_one_that_the_command_line_takes(page: Path, line: str) -> None:
    words = shlex.split(line.rpartition(" && ")[2], comments=True)
    if words[0] == "resnext-hub":
        build_parser(words[1]).parse_args(words[1:])
        return
    script = next(word for word in words if word.startswith("scripts/"))
    assert (ROOT / script).is_file()
    flags = words[words.index(script) + 1 :]
    if script == GPU_REPORT:
        runpy.run_path(script)["build_parser"]().parse_args(flags)
        return
    name = script.removeprefix("scripts/").removesuffix(".py")
    build_parser(name).parse_args([name, *flags])


def test_every_flag_that_a_page_mentions_exists() -> None:
    flags = (
        _flags(build_parser())
        | _flags(runpy.run_path(GPU_REPORT)["build_parser"]())
        | {
            *("--shm-size", "--cpu", "--nnodes", "--node_rank", "--nproc_per_node", "--master_addr", "--master_port"),
            *("--rdzv_backend", "--max-restarts", "--num_processes"),
            *("--kills", "--processes", "--xet", "--timm", "--transformers", "--strict"),
        }
    )
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for flag in re.findall(r"`(?:[^`\n]* )?(--[a-z][\w-]*)", text):
            assert flag in flags, f"{page.name}: {flag}"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": (\S+\.md)$", text, re.M))
    assert listed == {page.relative_to(DOCS).as_posix() for page in PAGES}
    assert {entry if isinstance(entry, str) else next(iter(entry)) for entry in yaml.safe_load(text)["plugins"]} == {
        "search",
        "mkdocstrings",
    }


def test_every_test_that_a_page_names_is_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`([^`\s]*test[^`\s]*)`", page.read_text()):
            if name.endswith(".py"):
                assert (ROOT / name).is_file(), f"{page.name}: {name}"
            elif name.startswith(("test_", "…")):
                assert re.search(rf"def \w*{name.strip('…')}\w*\(", sources), f"{page.name}: {name}"
    promises = (DOCS / "background" / "promises.md").read_text()
    rows = [line for line in promises.splitlines() if line.startswith("| **")]
    assert len(rows) >= 17
    assert all("test" in row.rsplit(" | ", 1)[1] for row in rows)


def test_the_reference_is_generated_from_the_package(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(DOCS)])
    monkeypatch.setenv("COLUMNS", "100")
    import generate

    pages = {page.stem: generate.on_page_markdown(page.read_text()) for page in (DOCS / "reference").glob("*.md")}
    assert not any("<!-- generate" in text for text in pages.values())
    for command in COMMANDS:
        assert f"usage: resnext-hub {command}" in pages["commands"]
    for name in flat_fields():
        assert f"| `{name}` |" in pages["settings"]
    for name in VARIANTS:
        assert f"| `{name}` |" in pages["variants"]


@mark.parametrize(
    ("page", "words"),
    [
        param("how-to/optimize.md", ("resnext_hub.optimize",), marks=mark.slow),
        ("how-to/backbone.md", ("features_only=True)\nprint",)),
        ("how-to/report.md", ("explain(",)),
        (
            "how-to/python.md",
            ("resnext_hub.load(", "predict(", "evaluate(", "publish(", "classifier.optimize(", "load_weights("),
        ),
        ("tutorials/first-model.md", ("read_table", "local-dir:", "classifier.label_names")),
    ],
)
def test_the_python_blocks_run(
    page: str, words: tuple[str, ...], vehicles_run: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("runs")
    for name in ("photos-resnext_g32", "first"):
        os.symlink(vehicles_run, f"runs/{name}")
    for name in ("cat.jpg", "dog.jpg"):
        Image.new("RGB", (40, 48)).save(name)
    blocks = [text for path, kind, text in BLOCKS if path == DOCS / page and kind == "python"]
    scope: dict[str, object] = {}
    for word in words:
        (block,) = [text for text in blocks if word in text]
        # smaller images, and eager: the same lines in less time
        code = block.replace("224, 224", "64, 64").replace("(model, images)", "(model, images, compile=False)")
        exec(code, scope)


def test_every_error_of_the_troubleshooting_page_is_what_the_command_prints(
    vehicles_run: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    mistakes.write_mistakes(tmp_path, vehicles_run)
    monkeypatch.chdir(tmp_path)
    shown = list(mistakes.commands(mistakes.PAGE.read_text()))
    assert len(shown) > 20
    for command, line in shown:
        if " runs/photos-test_resnet --lr" not in command and "me/images" not in command:
            assert mistakes.printed(command) == line, command


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags |= set().union(*map(_flags, action.choices.values()))
    return flags
