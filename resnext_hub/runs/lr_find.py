"""Find a learning rate for a run by a range test; the run folder is neither read nor written."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from resnext_hub.errors import RequestError, failed_system_call, setting
from resnext_hub.files import write_json
from resnext_hub.plots.lr_range import plot_range_test
from resnext_hub.plots.write import save_plot
from resnext_hub.processes.peers import Peers
from resnext_hub.runs.agreement import shared_facts
from resnext_hub.runs.job import build_initial_model, require_readable_splits, start_accelerator
from resnext_hub.runs.train import TrainRequest, as_run_errors, plan_run
from resnext_hub.training.fit_head import fit_head
from resnext_hub.training.lr_range import RangeTest, range_test

FORMAT_VERSION = 1
"""Format version of lr-find.json."""

SUFFIX = ".lr-find"
"""What the name of the folder has after that of the run folder."""


@dataclass(frozen=True, kw_only=True)
class FoundRate:
    """The result of a range test, and where it was written."""

    test: RangeTest
    lr: float
    """The peak learning rate that the run would have, as requested or derived."""
    plot: Path | None
    """None if it could not be drawn."""
    values: Path


def find_lr(request: TrainRequest, peers: Peers) -> FoundRate:
    """Run a learning rate range test for a request, and write its plot and its values next to the run folder.

    Args:
        request: What the user asked for.
        peers: The processes of the run; their group is closed at the end.

    Raises:
        RequestError: If the request is invalid.
        RunError: If a step fails, or the results cannot be written.
    """
    # the plan is for a folder that does not exist, so a run in the run folder does not matter
    plan = peers.agree(lambda: plan_run(request, peers, lambda folder: _beside(folder) / "run"), shared_facts)
    if not plan.schedule.steps:
        raise RequestError(
            "this run fits the classifier without a learning rate, so --lr-find has nothing to find; add "
            f"{setting('epochs', 10)} and {setting('freeze', 'none')} to train all layers"
        )
    with as_run_errors(plan.config):
        require_readable_splits(plan)
        accelerator = start_accelerator(plan)
        model = build_initial_model(plan, peers)
        if plan.config.finetune.fit_head:
            fit_head(plan, model, accelerator, peers)
        test = range_test(plan, model, accelerator, peers)
        assert plan.config.optim.lr is not None
        found = peers.from_main(partial(_write, test, plan.config.optim.lr, plan.folder.path.parent))
    accelerator.end_training()
    peers.close()
    return found


def _beside(folder: Path) -> Path:
    """Return the folder of the results."""
    return folder.absolute().parent / f"{folder.absolute().name}{SUFFIX}"


def _write(test: RangeTest, lr: float, folder: Path) -> FoundRate:
    plot, values = folder / "lr-find.png", folder / "lr-find.json"
    facts = {"format_version": FORMAT_VERSION, "suggestion": test.suggestion, **dataclasses.asdict(test)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(values, facts)
    except OSError as error:
        raise failed_system_call(error) from error
    drawn = save_plot(plot, (), lambda letters: plot_range_test(test, lr))
    return FoundRate(test=test, lr=lr, plot=plot if drawn else None, values=values)
