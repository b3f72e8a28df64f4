"""The errors that end a command, and the exit codes that follow from them."""

import re

from resnext_hub.text import printable

_NAME, _VALUE, _END = "\ufdd0", "\ufdd1", "\ufdd2"
"""Marks around a setting in a message: noncharacters, which `printable` escapes in any text that comes from data."""

_MARKED = re.compile(f"{_NAME}([^{_VALUE}{_END}]*)(?:{_VALUE}([^{_END}]*))?{_END}")


def setting(name: str, value: object = None) -> str:
    """Return a setting for a message: `batch_size=64` in Python, `--batch-size 64` on the command line.

    Args:
        name: Its flat name, such as `batch_size`.
        value: Its value, or an example of one; the name alone if not given.
    """
    if value is None:
        return f"{_NAME}{name}{_END}"
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else printable(value)
    return f"{_NAME}{name}{_VALUE}{text}{_END}"


class _ReportedError(Exception):
    """An error whose message names settings as `setting` writes them."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        """The message with its marks, to be raised again in another process."""
        first = _MARKED.search(message)
        self.field: str | None = first[1] if first else None
        """The first setting that the message names."""
        self.value: str | None = first[2] if first else None
        """Its value, as text."""

    def __str__(self) -> str:
        return _MARKED.sub(lambda mark: mark[1] if mark[2] is None else f"{mark[1]}={mark[2]}", self.message)

    def for_command_line(self) -> str:
        """Return the message with flags in place of the settings' names."""
        return _MARKED.sub(lambda mark: _flag(mark[1], mark[2]), self.message)


def _flag(name: str, value: str | None) -> str:
    flag = "--" + name.replace("_", "-")
    if value == "False":
        return flag.replace("--", "--no-", 1)
    return flag if value in (None, "True") else f"{flag} {value}"


class RequestError(_ReportedError, ValueError):
    """An invalid request; nothing was computed. The command exits with code 2.

    Args:
        message: One or two lines: the value at fault, what was expected, and what works.
    """


class RunError(_ReportedError, RuntimeError):
    """A valid request that failed. The command exits with code 1.

    Args:
        message: One or two lines.
        everywhere: Whether every process fails in the same way, so that only one of them reports the error.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class StoppedRun(Exception):
    """A run that a signal stopped after its state was saved.

    Args:
        message: One line.
        number: The signal; the command exits with 128 plus this number, as shells do.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


def failed_system_call(error: OSError) -> RunError:
    """Return the error for what the operating system refused in the middle of a run."""
    where = f" ({printable(str(error.filename))})" if error.filename else ""
    reason = printable(error.strerror or str(error))
    return RunError(f"the run stopped: {reason}{where}; fix that and rerun the same command to resume")


def one_line(error: BaseException) -> str:
    """Return an error's text in one printable line of at most 300 characters without tokens, for a message."""
    return hide_tokens(printable(" ".join(str(error).split())))[:300] or type(error).__name__


def hide_tokens(text: str) -> str:
    """Return text with Hub tokens removed; names such as `hf_hub_filename` are kept."""
    return re.sub(r"hf_[A-Za-z0-9]{6,}\w*", "hf_…", text)
