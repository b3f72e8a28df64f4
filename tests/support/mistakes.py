"""Wrong requests, and what they print: `python tests/support/mistakes.py RUN` rewrites docs/troubleshooting.md.

RUN is any finished run of `--model test_resnet` on folders of images.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from resnext_hub.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"

BLOCK = re.compile(r"```text\n(\$ resnext-hub .*?)```", re.DOTALL)


def write_mistakes(folder: Path, run: Path) -> None:
    """Write the datasets and files that the commands of the page name."""
    for number, place in enumerate(
        (
            *(f"photos/{name}/{index:03}" for name in ("bird", "cat", "dog") for index in range(8)),
            *("data/no-classes/1", "data/no-classes/2", "data/one-class/cat/1", "data/one-class/cat/2"),
            *("data/mixed/train/a/1", "data/mixed/train/b/1", "data/mixed/cat/a/1"),
            *("data/test-only/test/a/1", "data/test-only/test/b/1"),
            *(f"data/table/{name}/{name}{i}" for name in "ab" for i in range(3)),
            *(f"data/unreadable/{name}/{index:03}" for name in "ab" for index in range(4)),
        )
    ):
        path = folder / f"{place}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 48, 3), number, np.uint8)).save(path)
    for name in "ab":
        for index in range(4, 6):
            (folder / f"data/unreadable/{name}/{index:03}.jpg").write_bytes(b"text")
    rows = [f"{name}/{name}{i}.jpg,x{i % 2}\n" for name in "ab" for i in range(3)]
    (folder / "data/table/Data.csv").write_text("image,finding\n" + "".join(rows))
    for name in ("data/empty", "data/plain", "runs/used"):
        (folder / name).mkdir(parents=True)
    (folder / "runs/used/notes.txt").write_text("notes")
    (folder / "bad.yaml").write_text("epochs: 3\nbatch_sise: 4\n")
    (folder / "text.jpg").write_text("text")
    (folder / "pointer.jpg").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    )
    shutil.copytree(run, folder / "runs/photos-test_resnet")


def printed(command: str) -> str:
    """Run a command that fails in the working folder, and return the error that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(shlex.split(command)[1:])
    assert code in (1, 2), f"{command} ended with {code}: {out.getvalue()}"
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("error: ")]
    line = line.replace(os.getcwd() + "/", "")
    return re.sub(r"--dataset was \S+ and is now photos; ", "", line)  # where RUN was trained


def commands(page: str) -> Iterator[tuple[str, str]]:
    """Return each command of a page with the line below it."""
    for block in BLOCK.findall(page):
        lines = block.splitlines()
        for line, below in zip(lines, [*lines[1:], ""], strict=True):
            if line.startswith("$ "):
                yield line.removeprefix("$ "), "" if below.startswith("$ ") else below


def renew(page: str) -> str:
    """Return a page with what its commands print now."""

    def block(found: re.Match[str]) -> str:
        lines = [line for line in found[1].splitlines() if line.startswith("$ ")]
        return "```text\n" + "".join(f"{line}\n{printed(line.removeprefix('$ '))}\n" for line in lines) + "```"

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    run = Path(sys.argv[1]).absolute()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        write_mistakes(Path(scratch), run)
        PAGE.write_text(renew(PAGE.read_text()))
