"""`resnext-hub benchmark`: measure speed against baselines, and predict costs at scale."""

import argparse
import importlib
import os
from types import ModuleType

from resnext_hub.cli.output import write
from resnext_hub.cli.parser import add_config_flags, add_threads, count, existing_path
from resnext_hub.errors import RequestError, RunError
from resnext_hub.settings import check_value
from resnext_hub.training.config import BATCH, fields_of

BENCHMARKS = {
    "inference": "measure the forward pass of a model against timm, torchvision, ONNX Runtime and OpenVINO",
    "training": "measure training against bare PyTorch loops and timm's train.py",
    "checkpoints": "measure how much frequent checkpoints slow down a training run",
    "time-to-accuracy": "measure the total time to train a model, against timm's train.py and a bare loop",
    "loader": "measure data loading, from encoded images to batches, against the datasets library with PIL and timm's "
    "transform",
    "scale": "predict startup time, memory, bytes read and all-reduce time for any number of images, classes and "
    "processes",
}

_ROUNDS = {
    "time-to-accuracy": "number of seeds; each is a round",
    "scale": "number of repetitions of each measurement, of which the median is used",
}
"""What `--rounds` means, where it is not the number of rounds after a warmup."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    kinds = parser.add_subparsers(title="benchmarks", required=True, dest="kind", metavar="KIND")
    for kind, text in BENCHMARKS.items():
        own = kinds.add_parser(kind, help=text, description=text)
        own.add_argument(
            "--rounds",
            type=count(BATCH),
            default=5,
            metavar="N",
            help=f"{_ROUNDS.get(kind, 'number of measured rounds, after one warmup round')} (default: 5)",
        )
        own.add_argument(
            "--json",
            type=existing_path,
            metavar="FILE",
            help="write the results to this file as JSON, with every round and a description of the machine",
        )
        add_threads(own)
        add_config_flags(own, fields_of(_module(kind).Settings))


def _module(kind: str) -> ModuleType:
    return importlib.import_module(f"resnext_hub.benchmark.{kind.replace('-', '_')}")


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, and write the JSON file."""
    from resnext_hub.files import write_atomic
    from resnext_hub.machine import device_type
    from resnext_hub.processes.accelerator import set_threads

    set_threads(options.threads, device_type())
    module = _module(options.kind)
    known = fields_of(module.Settings)
    given = {name: value for name, value in vars(options).items() if name in known}
    settings = module.Settings(**{name: check_value(name, value, known[name].type) for name, value in given.items()})
    if options.json is not None and not os.access(options.json.absolute().parent, os.W_OK | os.X_OK):
        raise RequestError(f"--json {options.json}: expected a file in an existing, writable folder")
    comparison = module.measure(settings, options.rounds)
    write(comparison.table())
    if options.json is not None:
        try:
            write_atomic(options.json, comparison.to_json())
        except OSError as error:
            raise RunError(f"{options.json} could not be written: {error.strerror or error}") from error
