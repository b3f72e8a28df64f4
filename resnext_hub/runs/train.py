"""Train from settings, for both the command and the Python function."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnext_hub.errors import RequestError, RunError, failed_system_call, one_line, setting
from resnext_hub.extras import named_extras, require_packages
from resnext_hub.hub.checkpoints import fetch_run, fetched_settings
from resnext_hub.hub.publish import Publication
from resnext_hub.processes.peers import Peers
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.runs.agreement import shared_facts
from resnext_hub.runs.estimate import estimate
from resnext_hub.runs.existing import read_config
from resnext_hub.runs.job import execute, publish_run, require_readable_splits, start_accelerator
from resnext_hub.runs.request import merge_settings, prepare
from resnext_hub.runs.summary import describe, log_warnings
from resnext_hub.trackers.names import require_trackers
from resnext_hub.training.config import TrainConfig
from resnext_hub.training.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run."""

    plan: Plan
    record: RunRecord
    publication: Publication | None
    """The publication by the main process, if `push_to_hub` is set."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What the user asked for."""

    asked: Mapping[str, Any]
    """Flat settings."""
    recipe: str | None = None
    """Name of a recipe, which the settings override."""
    file: Path | None = None
    """A YAML file of settings; it overrides the recipe."""
    output_dir: Path | None = None
    """The run folder; `runs/{dataset}-{model}` if not given."""
    resume: bool | None = None
    """Whether to resume a run in the folder; see `prepare`."""
    resume_from: str | None = None
    """`hub:owner/name`, to resume from a checkpoint on the Hub."""


def train_run(request: TrainRequest, peers: Peers) -> Trained:
    """Plan, train and, if requested, publish a run; if it is already finished, only read its record.

    Args:
        request: What the user asked for.
        peers: The processes of the run; their group is closed at the end.

    Raises:
        RequestError: If the request is invalid; nothing was computed.
        RunError: If training or publishing fails.
        StoppedRun: After SIGTERM or Ctrl-C; the state was saved.
    """
    plan, record = run_plan(request, peers)
    peers.close()
    publication = publish_run(plan, record) if plan.config.publish.push_to_hub and peers.is_main else None
    return Trained(plan=plan, record=record, publication=publication)


def run_plan(request: TrainRequest, peers: Peers, *, close: bool = True) -> tuple[Plan, RunRecord]:
    """Plan and train a run, or read its record if it is finished; arguments and errors as of `train_run`.

    Args:
        request: What the user asked for.
        peers: The processes of the run.
        close: Whether to close the group of the processes after training.
    """
    plan = peers.agree(lambda: plan_run(request, peers), shared_facts)
    if plan.finished:
        return plan, peers.from_main(lambda: RunRecord.load(plan.folder.record))
    with as_run_errors(plan.config):
        return plan, execute(plan, peers, close=close)


def plan_only(request: TrainRequest, peers: Peers) -> list[str]:
    """Return what a run would do and take, as lines, without writing its folder; arguments as of `train_run`.

    Raises:
        RequestError: If the request is invalid.
        RunError: If its first steps fail.
    """
    plan = peers.agree(lambda: plan_run(request, peers), shared_facts)
    with as_run_errors(plan.config):
        require_readable_splits(plan)
        accelerator = start_accelerator(plan)
        lines = describe(plan, accelerator, estimate(plan, accelerator))
    log_warnings(plan)
    peers.close()
    finished = ["the run folder contains this run, which is already finished"] if plan.finished else []
    data = plan.config.data
    first = [f"this is the first of {data.folds} such runs"] if data.folds is not None and data.fold is None else []
    return [*lines, *first, *finished, "dry run: nothing was written"]


def plan_run(request: TrainRequest, peers: Peers, place: Callable[[Path], Path] = lambda folder: folder) -> Plan:
    """Resolve a request into a plan, in every process.

    Args:
        request: What the user asked for.
        peers: The processes of the run.
        place: Returns where the run is, given its folder.

    Raises:
        RequestError: If the request is invalid.
    """
    state = fetch_run(request.resume_from) if request.resume_from else None
    fetched = None
    if state is not None and request.file is None:
        fetched = fetched_settings(read_config(RunFolder(state)), request.asked, str(request.resume_from))
    settings, name = merge_settings(request.asked, request.recipe, request.file, fetched)
    with _as_request_errors():
        plan = prepare(
            settings,
            asked=request.asked,
            recipe=name,
            output_dir=request.output_dir,
            resume=request.resume,
            resume_from=state,
            peers=peers,
            place=place,
        )
    with named_extras():
        require_packages("train")
    peers.from_main(lambda: require_trackers(plan.config.track))
    return plan


@contextlib.contextmanager
def _as_request_errors() -> Iterator[None]:
    """Turn an OSError before any work, such as permission denied for a path, into a RequestError."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RequestError(f"{where}{error.strerror or one_line(error)}") from error


@contextlib.contextmanager
def as_run_errors(config: TrainConfig) -> Iterator[None]:
    """Turn an OSError, a killed worker or a lack of memory into a one-line RunError."""
    from resnext_hub.data.batches import lost_worker
    from resnext_hub.machine import is_out_of_memory

    try:
        yield
    except RunError:
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"{_memory_advice(config)} ({one_line(error)[:120]})") from error
        worker_error = lost_worker(error)
        if worker_error is not None:
            raise worker_error from None
        if not isinstance(error, OSError):
            raise
        raise failed_system_call(error) from error


def _memory_advice(config: TrainConfig) -> str:
    from resnext_hub.processes.launcher import processes

    micro = config.images_per_pass(processes())
    size = config.transform.image_size
    smaller = setting("micro_batch_size", micro // 2) if micro >= 4 else f"{setting('image_size')} below {size}"
    return (
        f"out of memory: {micro} images of {size} px per pass (global batch {config.batch_size}, evaluation "
        f"{config.eval_batch_size}); use {smaller}, or a smaller {setting('batch_size')} with another "
        f"{setting('output_dir')}"
    )
