"""`resnext-hub train`: train a model and leave a run folder."""

import argparse
import contextlib
import importlib
import logging
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from resnext_hub.cli.output import write
from resnext_hub.cli.parser import add_config_flags, existing_path, new_path
from resnext_hub.errors import RequestError
from resnext_hub.extras import named_extras
from resnext_hub.processes.peers import Peers
from resnext_hub.run_folder import RunFolder
from resnext_hub.text import printable, python_string
from resnext_hub.training.config import flat_fields

if TYPE_CHECKING:
    from resnext_hub.record import EvaluationFacts, RunRecord

WEAKEST = 5
"""Number of classes that are named at the end of a run because they are recognized worst."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    from resnext_hub.runs.recipes import RECIPES

    group = parser.add_argument_group(
        "Run folder and configuration (flags override --config, which overrides --recipe)"
    )
    group.add_argument("--recipe", metavar="NAME", help=f"named configuration: {', '.join(RECIPES)}")
    group.add_argument(
        "--config", type=existing_path, metavar="FILE", help="YAML file with settings, such as the config.yaml of a run"
    )
    group.add_argument("--output-dir", type=new_path, metavar="DIR", help="run folder (default: runs/DATASET-MODEL)")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="resume the run in the run folder (default: if there is one); --no-resume fails if there is one",
    )
    group.add_argument(
        "--resume-from", metavar="hub:OWNER/NAME", help="resume from the checkpoint uploaded by --push-checkpoints"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print what the run would do, its time and memory, and write nothing"
    )
    add_config_flags(parser, flat_fields())


def run(options: argparse.Namespace, peers: Peers) -> None:
    """Train, and print the accuracy and how to load the model."""

    def ready() -> Mapping[str, Any]:
        with named_extras():
            importlib.import_module("resnext_hub.runs.train")
        return {name: value for name, value in vars(options).items() if name in flat_fields()}

    asked = peers.together(ready)
    from resnext_hub.runs.train import TrainRequest, plan_only, train_run

    request = TrainRequest(
        asked=asked,
        recipe=options.recipe,
        file=options.config,
        output_dir=options.output_dir,
        resume=options.resume,
        resume_from=options.resume_from,
    )
    if options.dry_run:
        if request.resume_from:
            raise RequestError("--dry-run does not download the run of --resume-from; omit one of them")
        write("".join(f"{line}\n" for line in plan_only(request, peers)))
        return
    with _bars_beside_logs():
        done = train_run(request, peers)
    folder, record = done.plan.folder, done.record
    if done.plan.finished:
        write(f"the run in {folder} is already finished; nothing was computed (to train longer, increase --epochs)\n")
    if done.publication is not None:
        write(f"published and verified: {done.publication.address}\n")
    write(_summary(folder, record))


def _summary(folder: RunFolder, record: "RunRecord") -> str:
    """Return the results of a run, where they are, and what to do with them."""
    best, name = record.evaluation, shlex.quote(printable(folder))
    lines = [
        _result(best, "held-out images"),
        *([f"test {_result(record.test, 'images')}"] if record.test else []),
        f"best weights: step {best.step} of {record.steps} (epoch {round(best.epoch, 1):g})",
        *_weakest(record),
        f"model folder: {printable(folder.model)}",
        f"plots and predictions: {printable(folder)}",
        "",
        "    import timm",
        *(["    import resnext_hub"] if record.model.needs_plugin else []),
        f"    model = timm.create_model({python_string(f'local-dir:{folder.model}')}, pretrained=True).eval()",
        "    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "",
        f"look at the run:  resnext-hub report {name}",
        f"classify images:  resnext-hub predict {name} IMAGE",
        f"publish:          resnext-hub push {name} --repo-id OWNER/NAME --license LICENSE",
    ]
    return "".join(f"{line}\n" for line in lines)


def _weakest(record: "RunRecord") -> list[str]:
    """Return a line about the classes with the lowest recall, or labels with the lowest average precision."""
    facts, names = record.reported, record.label_names
    if facts.labels is not None:
        what, values = "average precision", [label.average_precision for label in facts.labels]
    else:
        what = "recall"
        values = [
            dict(row).get(label, 0) / count if (count := sum(n for _, n in row)) else None
            for label, row in enumerate(facts.confusion)
        ]
    found = sorted((value, label) for label, value in enumerate(values) if value is not None and value < 1)
    shown = ", ".join(f"{printable(names[label])} {100 * value:.1f} %" for value, label in found[:WEAKEST])
    return [f"lowest {what}: {shown}"] if found else []


def _result(facts: "EvaluationFacts", what: str) -> str:
    """Return the main result of an evaluation in words."""
    if facts.mean_average_precision is not None:
        return f"mAP {100 * facts.mean_average_precision:.2f} % ({facts.count} {what})"
    return f"accuracy {100 * facts.top1:.2f} % ({facts.correct}/{facts.count} {what})"


@contextlib.contextmanager
def _bars_beside_logs() -> Iterator[None]:
    """Keep log lines from breaking a progress bar on a terminal."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm([logging.getLogger("resnext_hub")]):
        yield
