"""`resnext-hub train`: train a model and leave a run folder."""

import argparse
import contextlib
import dataclasses
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
    from resnext_hub.facts import EvaluationFacts
    from resnext_hub.record import RunRecord
    from resnext_hub.runs.folds import CrossValidated
    from resnext_hub.runs.train import TrainRequest

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
        help="resume the run in the run folder (default: resume if the folder contains a run); --no-resume fails if it "
        "contains one",
    )
    group.add_argument(
        "--resume-from", metavar="hub:OWNER/NAME", help="resume from the checkpoint uploaded by --push-checkpoints"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would do, with its estimated time and memory, and exit without writing anything",
    )
    group.add_argument(
        "--lr-find",
        action="store_true",
        help="instead of training, suggest a learning rate: run a range test of at most 100 steps, print the "
        "suggestion, and write the plot and the values to a folder next to the run folder",
    )
    add_config_flags(parser, flat_fields())


def run(options: argparse.Namespace, peers: Peers) -> None:
    """Train, and print the accuracy and how to load the model."""

    def ready() -> Mapping[str, Any]:
        with named_extras():
            importlib.import_module("resnext_hub.runs.train")
        return {name: value for name, value in vars(options).items() if name in flat_fields()}

    asked = peers.together(ready)
    from resnext_hub.runs.folds import requested_folds, train_folds
    from resnext_hub.runs.train import TrainRequest, plan_only, train_run

    request = TrainRequest(
        asked=asked,
        recipe=options.recipe,
        file=options.config,
        output_dir=options.output_dir,
        resume=options.resume,
        resume_from=options.resume_from,
    )
    if options.dry_run and options.lr_find:
        raise RequestError("--dry-run and --lr-find are mutually exclusive; omit one of them")
    if options.dry_run:
        if request.resume_from:
            raise RequestError(
                "--dry-run does not download a run, so it cannot be combined with --resume-from; omit one of them"
            )
        write("".join(f"{line}\n" for line in plan_only(request, peers)))
        return
    if options.lr_find:
        _find_lr(request, peers)
        return
    folds = requested_folds(request)
    if folds is not None:
        with _bars_beside_logs():
            write(_folds_summary(train_folds(request, folds, peers)))
        return
    with _bars_beside_logs():
        done = train_run(request, peers)
    folder, record = done.plan.folder, done.record
    if done.plan.finished:
        write(f"the run in {folder} is already finished; nothing was computed (to train longer, increase --epochs)\n")
    if done.publication is not None:
        write(f"published and verified: {done.publication.address}\n")
    write(_summary(folder, record))


def _find_lr(request: "TrainRequest", peers: Peers) -> None:
    """Run a range test, and print what it suggests."""
    from resnext_hub.runs.lr_find import find_lr

    if request.resume_from:
        raise RequestError("--lr-find does not resume a run; omit --resume-from")
    found = find_lr(request, peers)
    test = found.test
    if test.diverged:
        at = f"at a learning rate of {test.lrs[-1]:.3g}" if test.lrs else "at the first step"
        write(f"the loss diverged {at}, after {len(test.lrs)} steps\n")
    else:
        write(f"the loss did not diverge up to a learning rate of {test.lrs[-1]:.3g}\n")
    if test.suggestion is None:
        write("the loss did not fall at any learning rate, so there is no suggestion\n")
    else:
        write(f"suggested learning rate: --lr {test.suggestion:.2g} (current value: {found.lr:.2g})\n")
    write("".join(f"{what}: {printable(path)}\n" for what, path in (("plot", found.plot), ("values", found.values))))


def _folds_summary(done: "CrossValidated") -> str:
    """Return the results of a cross-validation, and where they are."""
    result = done.result
    several = result.mean_average_precision is not None
    mean, what = result.mean_average_precision or result.mean_accuracy, "mAP" if several else "accuracy"
    lines = [
        *(["all folds are already finished; nothing was trained"] if done.finished else []),
        *(
            f"fold {fold.fold}: mAP {100 * fold.mean_average_precision:.2f} % ({fold.count} images)"
            if fold.mean_average_precision is not None
            else f"fold {fold.fold}: accuracy {100 * fold.top1:.2f} % ({fold.correct}/{fold.count})"
            for fold in result.folds
        ),
        f"mean of {len(result.folds)} folds: {what} {_interval(mean.mean, mean.low, mean.high)}",
        "all images, each classified by a model that was not trained on it: "
        f"{'all labels correct' if several else 'accuracy'} "
        f"{_interval(result.accuracy, result.low, result.high)} ({result.correct}/{result.count})",
    ]
    if result.test is not None:
        lines.append(f"test images, mean of the models: {what} {_interval(*dataclasses.astuple(result.test))}")
    if result.is_optimistic:
        lines.append(
            "the evaluated images were also used to select the weights, so these figures are optimistic (see "
            "--best-by last)"
        )
    else:
        lines.append("the weights are those at the end of each run, and were not selected by any evaluation")
    if several:
        lines.append(
            "the thresholds of the labels were chosen on the evaluated images, which makes all figures except "
            "the mAP optimistic"
        )
    lines += [f"summary: {printable(done.folder / 'folds.json')}", f"runs and predictions: {printable(done.folder)}"]
    return "".join(f"{line}\n" for line in lines)


def _interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f} %)"


def _summary(folder: RunFolder, record: "RunRecord") -> str:
    """Return the results of a run, where they are, and what to do with them."""
    best, name = record.evaluation, shlex.quote(printable(folder))
    kept, epoch = "last" if record.config.get("best_by") == "last" else "best", round(best.epoch, 1)
    lines = [
        _result(best, "held-out images"),
        *([f"test {_result(record.test, 'images')}"] if record.test else []),
        *([f"{kept} weights: step {best.step} of {record.steps} (epoch {epoch:g})"] if record.steps else []),
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
    shown = ", ".join(f"{printable(names[label])} ({100 * value:.1f} %)" for value, label in found[:WEAKEST])
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
