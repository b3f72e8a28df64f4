"""The ways in which a command ends early, and the exit codes that follow from them."""

import re

from resnext_hub.text import printable


class RequestError(ValueError):
    """What was asked for cannot be done; nothing was computed. The process exits with 2."""


class RunError(RuntimeError):
    """What was asked for was right, but carrying it out failed. The process exits with 1.

    Args:
        message: One or two lines.
        everywhere: Whether every process fails alike, so that one of them says it for all.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class StoppedRun(Exception):
    """A signal stopped a run, which saved its state before.

    Args:
        message: One line.
        number: The signal; the process exits with 128 more, as shells have it.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


def failed_system_call(error: OSError) -> RunError:
    """Return what the operating system refused in the middle of a run, as a line."""
    where = f" ({printable(str(error.filename))})" if error.filename else ""
    reason = printable(error.strerror or str(error))
    return RunError(f"the run stopped: {reason}{where}; fix that and rerun the same command to resume")


def one_line(error: BaseException) -> str:
    """Return an error's text in one printable line of at most 300 characters without tokens, for our own message."""
    return hide_tokens(printable(" ".join(str(error).split())))[:300] or type(error).__name__


def hide_tokens(text: str) -> str:
    """Return text without the tokens of the Hub that are in it; `hf_hub_filename` is none."""
    return re.sub(r"hf_[A-Za-z0-9]{6,}\w*", "hf_…", text)
