"""The words of the command line: flags are made from the typed configurations, and typed words become values."""

import argparse
import errno
import importlib
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from resnext_hub.data.loaders import PIXELS, LoaderConfig
from resnext_hub.data.transforms import IMAGE_SIZE
from resnext_hub.errors import RequestError
from resnext_hub.machine import THREADS
from resnext_hub.settings import Range, check_value, did_you_mean, flag_of, is_count, shown, without_none
from resnext_hub.training.config import ALIASES, BATCH, WIDTHS, FlatField, fields_of, flat_fields

BENCHMARKS = {
    "inference": "a network's forward pass beside timm, torchvision, ONNX Runtime and OpenVINO",
    "training": "optimizer steps beside a bare loop and timm's train.py",
    "loader": "pictures from encoded bytes to batches beside datasets, PIL and timm's transform",
}


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
    """Says what is wrong in a line, without the usage of every flag before it, and which word may be meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments: one that is unknown is refused by the parser of its own command."""
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
        """Refuse a command line in the way that every wrong request is refused."""
        raise RequestError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; the options say which one as `command`."""
    parser = Parser(prog="resnext-hub", description="Train, evaluate and publish ResNeXt networks.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, dest="command", metavar="COMMAND")

    train = _add(commands, "train", "train a network and leave a run folder")
    train.add_argument("--recipe", help="a named configuration: quickstart, finetune, imagenet")
    train.add_argument("--config", type=_path, metavar="FILE", help="settings in YAML, such as a run's config.yaml")
    train.add_argument(
        "--output-dir", type=_new_path, metavar="DIR", help="the run folder (default: runs/DATASET-MODEL)"
    )
    train.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="resume the run of the folder, as is done anyway where there is one; --no-resume refuses a used folder",
    )
    train.add_argument(
        "--resume-from", metavar="hub:OWNER/NAME", help="go on from the checkpoint that --push-checkpoints left there"
    )
    add_config_flags(train)

    info = _add(commands, "info", "list the variants and what they cost")
    info.add_argument("name", nargs="*", help="variants; all if none is named")
    info.add_argument("--image-size", type=_pixels, metavar="N", help="pixels (default: 224, or 32 for CIFAR variants)")
    info.add_argument("--like", metavar="NAME", help="a network whose cost to match, such as resnet50")
    info.add_argument("--cardinality", type=_positive, metavar="C", help="with --like: groups to find the width for")
    info.add_argument("--write-cards", type=_path, metavar="DIR", help="write records and cards of the variants there")
    info.add_argument(
        "--preserve",
        choices=("block", "parameters", "macs"),
        default="block",
        help="with --like: what to match; block is the paper's equation 4 (default)",
    )

    evaluate = _add(commands, "evaluate", "evaluate a run's model again, and compare with its record")
    evaluate.add_argument("run", type=_path, help="the run folder")
    _add_threads(evaluate)

    predict = _add(commands, "predict", "classify pictures")
    predict.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder, a model folder, or hf-hub:owner/repo")
    predict.add_argument("path", type=_path, nargs="+", metavar="PATH", help="pictures, or folders with pictures")
    predict.add_argument(
        "--top", type=_positive, default=1, metavar="N", help="classes to give for each picture (default: 1)"
    )
    predict.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object for each picture, one a line; one that cannot be read has an error",
    )
    predict.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="pictures at once (default: 32)")
    predict.add_argument(
        "--decoder",
        choices=("pil", "simplejpeg"),
        default="pil",
        help="pil, as for the figures of a card (default), or simplejpeg: faster, with nearly the same pixels",
    )
    predict.add_argument(
        "--max-image-pixels",
        type=_image_pixels,
        default=LoaderConfig.max_image_pixels,
        metavar="N",
        help=f"pixels above which an image is unreadable (default: {LoaderConfig.max_image_pixels:,})",
    )
    _add_threads(predict)

    export = _add(commands, "export", "write a trained network for another runtime")
    export.add_argument("model", metavar="RUN_OR_MODEL", help="a run folder, a model folder, or hf-hub:owner/repo")
    export.add_argument("--format", choices=("onnx", "openvino"), default="onnx", help="what to write (default: onnx)")
    export.add_argument(
        "--output",
        type=_path,
        metavar="FILE",
        help="the file (default: beside the model: model.onnx or model.xml, in int8 model-int8.onnx or model-int8.xml)",
    )
    export.add_argument(
        "--merge-groups",
        type=_merge_groups,
        default="off",
        metavar="off|auto|N",
        help="merge neighbouring groups of grouped convolutions to a width of N channels, or, with OpenVINO, to what "
        "is fastest on this machine; the function stays the same (default: off)",
    )
    export.add_argument("--int8", action="store_true", help="compute convolutions in int8, if accuracy allows it")
    export.add_argument(
        "--calibration", metavar="DATASET", help="with --int8: a dataset as for training (default: that of the run)"
    )
    export.add_argument(
        "--max-drop", type=_points, metavar="POINTS", help="with --int8: top-1 that may be lost (default: 0.5)"
    )
    _add_threads(export)

    benchmark = _add(commands, "benchmark", "measure speed beside the peers, by turns")
    kinds = benchmark.add_subparsers(title="what to measure", required=True, dest="kind", metavar="KIND")
    for kind, text in BENCHMARKS.items():
        _add_benchmark(kinds, kind, text)

    push = _add(commands, "push", "upload a run's model folder to the Hub, in one commit")
    push.add_argument("run", type=_path, help="the run folder")
    push.add_argument("--repo-id", metavar="OWNER/NAME", help="repository, made if it is not there")
    push.add_argument("--license", help="licence of the weights, such as apache-2.0")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing to main")
    push.add_argument("--revision", default="main", metavar="BRANCH", help="branch to commit to (default: main)")
    push.add_argument(
        "--overwrite-card",
        action="store_true",
        help="replace the README.md on the Hub, whatever somebody wrote into it",
    )
    push.add_argument("--dry-run", action="store_true", help="list what would be uploaded; nothing is sent")
    return parser


def _add(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    return parser


def _add_benchmark(kinds: Any, kind: str, text: str) -> None:
    parser = _add(kinds, kind, text)
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="rounds that count (default: 5)")
    parser.add_argument("--json", type=_path, metavar="FILE", help="write all rounds, the machine and the ratios there")
    _add_threads(parser)
    _add_flags(parser, fields_of(importlib.import_module(f"resnext_hub.benchmark.{kind}").Settings))


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_threads, default="auto", help="computing threads on a CPU (default: auto)")


def _threads(text: str) -> str:
    if text != "auto" and not is_count(text, THREADS):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected auto or a number of threads from 1 to {THREADS:,}")
    return text


def _merge_groups(text: str) -> str | int:
    if text in ("off", "auto"):
        return "measure" if text == "auto" else text
    if is_count(text, WIDTHS):
        return int(text)
    raise argparse.ArgumentTypeError(
        f"{shown(text)}: expected off, auto or a number of channels from 1 to {WIDTHS:,}, such as 32"
    )


def _image_pixels(text: str) -> int:
    if not is_count(text, PIXELS):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number from 1 to {PIXELS:,}")
    return int(text)


def _positive(text: str) -> int:
    if not is_count(text, BATCH):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a whole number from 1 to {BATCH:,}")
    return int(text)


def _pixels(text: str) -> int:
    if not is_count(text, IMAGE_SIZE):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected pixels from 1 to {IMAGE_SIZE:,}")
    return int(text)


def _path(text: str) -> Path:
    """Return a path that the operating system can look up; whether anything is there is for the command to judge.

    A shell leaves the tilde of `--output-dir=~/runs` to the program.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text) or 'an empty text'}: expected a path")
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise argparse.ArgumentTypeError(f"{shown(text)}: {error.strerror}; expected another path") from error
    return Path(os.path.expanduser(text))


def _new_path(text: str) -> Path:
    """Return a path to write to, which safetensors and Parquet can only do where it is valid UTF-8."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: not valid UTF-8; expected another path")
    return _path(text)


def _points(text: str) -> float:
    try:
        value = check_value("max_drop", text, Annotated[float, Range(0, 100)])
    except RequestError as error:  # argparse takes a ValueError for one of its own, and names this function
        raise argparse.ArgumentTypeError(str(error).removeprefix("--max-drop ")) from error
    return float(value)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of the training configuration; flags that are not typed leave no trace."""
    _add_flags(parser, flat_fields())


def _add_flags(parser: argparse.ArgumentParser, fields: Mapping[str, FlatField]) -> None:
    for name, field in fields.items():
        default = "" if field.default is None else f" (default: {field.default})"
        text = (field.help + default).replace("%", "%%")
        parser.add_argument(flag_of(name), default=argparse.SUPPRESS, help=text, **_flag_type(field.type))


def _flag_type(hint: Any) -> dict[str, Any]:
    """Return argparse's arguments for a field's type; its value stays text, which `check_value` reads as in a file."""
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
