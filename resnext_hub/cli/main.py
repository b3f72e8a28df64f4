"""The entry point of the commands, each in its own file: errors become lines and exit codes here."""

import argparse
import atexit
import contextlib
import gc
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from resnext_hub.errors import RequestError, RunError, StoppedRun, hide_tokens, one_line
from resnext_hub.extras import named_extras
from resnext_hub.processes.launcher import speaks_for_host, speaks_for_run
from resnext_hub.processes.peers import Peers, join
from resnext_hub.text import printable

MAX_ERROR = 2000
"""Characters to which an error is cut, in its middle."""

COMMANDS = {
    "train": "train a model",
    "check": "check a dataset for duplicates, unreadable images and imbalance, or the dataset of a run for wrong "
    "labels",
    "evaluate": "re-evaluate the model of a run, and compare the result with the record of the run",
    "predict": "classify images",
    "similar": "find the images that are most similar to a given one",
    "report": "draw all plots of a run, and write an HTML page that shows them",
    "demo": "try a trained model in a web page",
    "export": "export a trained model to ONNX, OpenVINO or torch.export",
    "push": "publish a study, a demo page or the model of a run to the Hub in a single commit",
    "verify": "check a published model: its files against their hashes, and the results in its card against a new "
    "evaluation",
    "info": "list the variants with their numbers of parameters and multiply-adds (MACs)",
    "recipes": "list the recipes, or show one with its settings and sources",
    "benchmark": "measure throughput against baselines, or predict the cost of large runs",
    "study": "compare cardinality, width and depth at controlled cost",
}
"""What each command does; its code is in the file of its name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Its words; those of the process if not given.

    Returns:
        The exit code: 2 for an invalid request, 1 for a failed run, above 128 for a stopped one.
    """
    _occupy_standard_files()
    atexit.register(gc.freeze)  # the search for garbage in all imported libraries would delay the exit by a second
    words = list(sys.argv[1:] if arguments is None else arguments)
    speaks = speaks_for_host()  # one process of each host reports errors
    _set_up_logging(speaks_for_run())
    try:
        # processes that train together fail together, even over a flag that only one of them does not know
        peers = join() if words[:1] == ["train"] else Peers()
        options = peers.together(lambda: _parse(words))
        with named_extras():
            command = importlib.import_module(f"resnext_hub.cli.{options.command}")
            command.run(options, peers) if options.command == "train" else command.run(options)
    except RequestError as error:
        return _report(error, 2, speaks)
    except RunError as error:
        return _report(error, 1, speaks or not error.everywhere)
    except ImportError as error:
        return _report(f"{error.name} is installed but cannot be imported: {one_line(error)}", 1, speaks)
    except StoppedRun as stopped:
        return _report(stopped, stopped.code, speaks)
    except KeyboardInterrupt:
        return _report("stopped; rerun the same command to resume from the last checkpoint, if any", 130, speaks)
    except BrokenPipeError:  # the reader has closed its end, as head does
        from resnext_hub.cli.output import discard_output

        discard_output()
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _report(f"{where}{error.strerror or one_line(error)}", 1, True)
    except (MemoryError, RuntimeError) as error:
        from resnext_hub.machine import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _report(
            f"out of memory ({one_line(error)[:120]}); use a smaller --batch-size or smaller images", 1, True
        )
    return 0


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; the parsed options name the command as `command`.

    Args:
        only: The command whose flags are needed; those of all if not given.
    """
    from resnext_hub.cli.parser import Parser

    parser = Parser(prog="resnext-hub", description="Train, evaluate and publish ResNeXt models.")
    commands = parser.add_subparsers(title="commands", required=True, dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if only in (None, name):
            importlib.import_module(f"resnext_hub.cli.{name}").add_arguments(command)
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    with named_extras():
        only = words[0] if words and words[0] in COMMANDS else ""
        return build_parser(only).parse_args(words)


def _report(what: object, code: int, aloud: bool) -> int:
    if aloud:
        words = what.for_command_line() if isinstance(what, (RequestError, RunError)) else what
        text = hide_tokens(printable(words))
        text = text if len(text) <= MAX_ERROR else f"{text[: MAX_ERROR // 2]}…{text[-MAX_ERROR // 2 :]}"
        with contextlib.suppress(OSError):  # the exit code tells as well
            sys.stderr.write(f"{'' if code > 128 else 'error: '}{text}\n")
    return code


def _occupy_standard_files() -> None:
    """Open closed standard files on the null device: the next file opened would get their number, and output of
    libraries.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


class _PrintableFormatter(logging.Formatter):
    """Escapes what could control a terminal, whatever a message quotes."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record, with its own line breaks."""
        return "\n".join(map(printable, super().format(record).split("\n")))


_LIBRARIES = {"huggingface_hub": "HF_HUB_VERBOSITY", "datasets": "DATASETS_VERBOSITY"}
"""Libraries that log what they also raise, such as each failed request, with the variable that sets their level."""


def _set_up_logging(is_main: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logger = logging.getLogger("resnext_hub")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logger.propagate = False
    for name, variable in _LIBRARIES.items():
        # their errors are raised as well, and become one line here; the variable is read when the library is imported
        if os.environ.setdefault(variable, "error") == "error":
            logging.getLogger(name).setLevel(logging.ERROR)
    if not is_main:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
