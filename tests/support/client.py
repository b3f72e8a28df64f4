"""A process with the real clients, which talks to a Hub that a test runs: it starts once and takes many commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import warm_start
from support.loopback_hub import TOKEN, LoopbackHub
from support.processes import ROOT

SERVE = """
import contextlib, io, json, sys, traceback
from resnext_hub.cli.main import main
from resnext_hub.hub import remote

remote.PAUSE = 0.01  # the waits are what they are, but tests need not sit them out
real = sys.stdout
for line in sys.stdin:
    asked = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    scope = {}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if "code" in asked:
                exec(asked["code"], scope)
                code = 0
            else:
                code = main(asked["words"])
        except Exception:  # the process has to live on for the next command; the test sees the traceback and code 99
            traceback.print_exc()
            code = 99
    answer = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "result": scope.get("result")}
    real.write(json.dumps(answer) + "\\n")
    real.flush()
"""


class Client:
    """Runs commands and code of this package against a Hub."""

    def __init__(self, hub: LoopbackHub, home: Path, token: str = TOKEN, xet: bool = False) -> None:
        environment = os.environ | hub.environment(token, xet) | {"HF_HOME": str(home)}
        self._process = warm_start.Popen(
            [sys.executable, "-c", SERVE],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def command(self, *words: object) -> tuple[int, str, str]:
        """Run a command; return its exit code, output and errors."""
        answer = self._ask({"words": [str(word) for word in words]})
        return answer["code"], answer["out"], answer["err"]

    def run(self, code: str) -> dict[str, Any]:
        """Run code; return exit code, output, errors, and what it calls `result`."""
        return self._ask({"code": code})

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
