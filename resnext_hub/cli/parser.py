"""The command-line parser: flags are generated from the typed settings, and their values are read as in a file.

argparse reads the words; `settings.check_value` reads the values, so `--lr 1e-3` and `lr: 1e-3` are the same value or
the same error, and ranges are stated once. Parsers that convert values by themselves would apply checks across
settings to the flags alone, before recipe and file are merged in.
"""

import argparse
import errno
import os
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from resnext_hub.errors import RequestError
from resnext_hub.settings import check_value, did_you_mean, flag_of, is_count, shown, without_none
from resnext_hub.training.config import ALIASES, FlatField

COMMAND_ALIASES = {
    "fit": "train",
    "eval": "evaluate",
    "test": "evaluate",
    "val": "evaluate",
    "validate": "evaluate",
    "infer": "predict",
    "classify": "predict",
    "convert": "export",
    "onnx": "export",
    "upload": "push",
    "publish": "push",
    "bench": "benchmark",
    "list": "info",
    "models": "info",
}
"""What other programs call a command, and its name here."""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage of every flag, and suggests the word that may be meant."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs | {"allow_abbrev": False, "formatter_class": _HelpFormatter})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments: the parser of a command reports the ones that it does not know."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(map(shown, unknown))}{self._meant(unknown)}")
        return options, unknown

    def _meant(self, unknown: Sequence[str]) -> str:
        flags = {flag: flag for action in self._actions for flag in action.option_strings}
        names = {flag_of(alias): flag_of(name) for alias, name in ALIASES.items() if flag_of(name) in flags}
        typed = [word.partition("=")[0].replace("_", "-") for word in unknown if word.startswith("--")]
        return "".join(did_you_mean(word, flags, names) for word in typed[:3])

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), action.choices, COMMAND_ALIASES if action.dest == "command" else None)
            listed = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"{shown(value)} is not one of {listed}{hint}")

    def error(self, message: str) -> NoReturn:
        """Raise a RequestError, as for every wrong request."""
        raise RequestError(f"{message} (see {self.prog} --help)")


class _HelpFormatter(argparse.HelpFormatter):
    """Aligns the help of flags with the longest common ones."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def add_config_flags(parser: argparse.ArgumentParser, fields: Mapping[str, FlatField]) -> None:
    """Add a flag for every setting, in groups; flags that are not given leave no trace in the parsed options."""
    words = [str(action.metavar or action.dest) for action in parser._actions if not action.option_strings]
    parser.usage = " ".join(["%(prog)s [--FLAG VALUE ...]", *words])  # the list of all flags would fill a screen
    groups: dict[str, Any] = {}
    for name, field in fields.items():
        group = groups.get(field.group) or groups.setdefault(field.group, parser.add_argument_group(field.group))
        default = "" if field.default is None else f" (default: {_default(field.default)})"
        text = (_phrase(field.help) + default).replace("%", "%%")
        group.add_argument(flag_of(name), default=argparse.SUPPRESS, help=text, **_flag_type(field.type))


def _phrase(sentence: str) -> str:
    """Return a sentence in the form of argparse's own help texts: lower case, without a full stop."""
    first = sentence[0].lower() if sentence[1:2].islower() or sentence[1:2] == " " else sentence[0]
    return (first + sentence[1:]).rstrip(".")


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(f"{part:.4g}" for part in value)
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else f"{value}"


def _flag_type(hint: Any) -> dict[str, Any]:
    """Return argparse's arguments for a field's type; its value stays text for `check_value`."""
    hint = _bare(without_none(_bare(hint)))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"metavar": "|".join(typing.get_args(hint))}
    if typing.get_origin(hint) is tuple:
        return {"nargs": len(typing.get_args(hint)), "metavar": "X"}
    return {"metavar": {int: "N", float: "X", str: "TEXT"}[hint]}


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def count(most: int) -> Callable[[str], int]:
    """Return the argparse type of a whole number from 1 to a limit."""

    def parse(text: str) -> int:
        if not is_count(text, most):
            raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number from 1 to {most:,}")
        return int(text)

    return parse


def value_of(name: str, hint: Any) -> Callable[[str], Any]:
    """Return the argparse type of a flag whose value has a type with a range."""

    def parse(text: str) -> Any:
        try:
            return check_value(name, text, hint)
        except RequestError as error:  # argparse would take a ValueError for one of its own, and name this function
            raise argparse.ArgumentTypeError(error.for_command_line().removeprefix(f"{flag_of(name)} ")) from error

    return parse


def choice_or_count(words: Iterable[str], most: int, what: str) -> Callable[[str], str | int]:
    """Return the argparse type of a word or a whole number from 1 to a limit."""
    words = tuple(words)

    def parse(text: str) -> str | int:
        if text in words:
            return text
        if is_count(text, most):
            return int(text)
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected {', '.join(words)} or {what} from 1 to {most:,}")

    return parse


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads."""
    from resnext_hub.machine import THREADS

    def parse(text: str) -> str:
        return str(choice_or_count(["auto"], THREADS, "a number of threads")(text))

    parser.add_argument(
        "--threads",
        type=parse,
        default="auto",
        metavar="N|auto",
        help="number of CPU threads (default: auto, one per core)",
    )


def existing_path(text: str) -> Path:
    """Return a path that the operating system can look up; whether anything is there is for the command to judge.

    A shell leaves the tilde of `--output-dir=~/runs` to the program.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text) or 'an empty string'}: expected a path")
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise argparse.ArgumentTypeError(f"{shown(text)}: {error.strerror}; expected a different path") from error
    return Path(os.path.expanduser(text))


def fraction(text: str) -> float:
    """Return a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a number from 0 to 1")
    return value


def new_path(text: str) -> Path:
    """Return a path to write to, which for safetensors and Parquet has to be valid UTF-8."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: not valid UTF-8; expected a path in UTF-8")
    return existing_path(text)
