"""A command that fails prints one line, and nothing of the libraries that it uses."""

import os
import subprocess
import sys
from pathlib import Path

from pytest import mark
from support.loopback_hub import Fault, serve
from support.processes import ROOT


def run(words: str, environment: dict[str, str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "resnext_hub", *words.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def is_one_line(text: str) -> bool:
    return text.startswith("error: ") and text.endswith("\n") and text.count("\n") == 1


@mark.parametrize(
    "words", ["check nowhere", "train --dataset me/nowhere", "predict hf-hub:me/nowhere x.png", "push nowhere"]
)
def test_a_name_that_does_not_exist_on_the_hub_is_reported_in_one_line(words: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with serve() as hub:
        hub.faults.append(Fault("nowhere", "reset", 1))
        code, text = run(words, hub.environment(), tmp_path)
    assert code in (1, 2)
    assert is_one_line(text), text


@mark.parametrize("words", ["check me/nowhere", "evaluate hf-hub:me/nowhere", "export hf-hub:me/nowhere"])
def test_a_name_that_is_not_in_the_cache_is_reported_in_one_line_offline(words: str, tmp_path: Path) -> None:
    code, text = run(words, {}, tmp_path)
    assert code in (1, 2)
    assert is_one_line(text), text


@mark.slow  # clients of the Hub retry for half a minute
@mark.parametrize("asked", [{}, {"HF_HUB_VERBOSITY": "warning"}], ids=["by default", "if its variable asks for it"])
def test_a_library_logs_failed_requests_only_if_its_variable_asks_for_it(asked: dict[str, str], tmp_path: Path) -> None:
    with serve() as hub:
        environment = hub.environment()
    code, text = run("check me/nowhere", environment | asked, tmp_path)  # the server has stopped
    assert code == 1
    assert is_one_line(text[text.rindex("error: ") :])
    assert ("Retrying in" in text) == bool(asked)
    assert is_one_line(text) == (not asked)
