"""A training job in order: take the folder, train, write the results."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from resnext_hub.errors import RequestError, RunError, StoppedRun, one_line
from resnext_hub.files import remove_leftovers, write_atomic
from resnext_hub.hub.checkpoints import CheckpointPusher, restore_run
from resnext_hub.hub.publish import Publication, open_repository, publish
from resnext_hub.machine import keep_memory
from resnext_hub.models.lookup import build_model
from resnext_hub.processes.accelerator import build_accelerator, set_threads
from resnext_hub.processes.heartbeat import heartbeat
from resnext_hub.processes.peers import Peers, lost_peers
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder, RunLock
from resnext_hub.runs.existing import CONFIG_VERSION
from resnext_hub.runs.public import public_settings
from resnext_hub.runs.results import write_results
from resnext_hub.runs.summary import log_plan
from resnext_hub.text import is_printable, printable
from resnext_hub.training.checkpoint import latest_checkpoint
from resnext_hub.training.feed import evaluation_samples, require_readable
from resnext_hub.training.loop import train
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

PUSH_GRACE = 20
"""Seconds that a run stopped by SIGTERM waits for its last checkpoint to reach the Hub; launchers allow it 30."""


def execute(plan: Plan, peers: Peers) -> RunRecord:
    """Train, and leave the whole run folder on the main process's disk; return the record in every process.

    Args:
        plan: The run, the same in every process.
        peers: The processes of the run.

    Raises:
        RequestError: If another process works in the folder.
        RunError: If training or the export fails.
        StoppedRun: After SIGTERM or Ctrl-C; the state was saved.
    """
    config = plan.config
    require_readable(evaluation_samples(plan.splits.eval, plan.input, config.loader.max_image_pixels))
    accelerator = _start_accelerator(plan)
    with contextlib.ExitStack() as stack:
        peers.from_main(lambda: _take_folder(plan, stack))
        log_plan(plan, accelerator)
        torch.manual_seed(config.seed)
        model = peers.together(
            lambda: build_model(plan.source, plan.splits.label_names, config.drop_rate, config.drop_path)
        )
        if peers.size > 1:  # another host may have another version of the weights to start from
            model.load_state_dict(peers.share_tensors(model.state_dict))
        with heartbeat(peers), lost_peers(peers.rank, peers.size), _pushed_checkpoints(plan) as on_checkpoint:
            outcome = train(plan, model, accelerator, peers, on_checkpoint)
        record = peers.from_main(lambda: write_results(plan, outcome, accelerator))
    accelerator.end_training()
    return record


def _start_accelerator(plan: Plan) -> "Accelerator":
    """Start Accelerate, and set threads, memory and algorithms of this process."""
    deterministic = bool(plan.config.deterministic)
    accelerator = build_accelerator(plan.precision, deterministic)
    set_threads(plan.config.threads, accelerator.device.type)
    keep_memory(accelerator.device.type)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, CUDA's matrix products are refused
    torch.use_deterministic_algorithms(deterministic)
    # filling fresh memory would cost time, and nothing here reads it before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    return accelerator


def _take_folder(plan: Plan, stack: contextlib.ExitStack) -> None:
    """Lock the run folder, and write into it what the run begins with.

    Raises:
        RequestError: If another process works in the folder, or has since the plan was made.
        RunError: If the Hub refuses, or a fetched state cannot be resumed.
    """
    config, folder = plan.config, plan.folder
    _make_folder(folder)
    require_places(folder)
    stack.enter_context(RunLock(folder))
    remove_leftovers(folder.path)
    if folder.state() != plan.folder_state:
        raise RequestError(
            f"another command has worked in {printable(folder)} since this one looked at it; rerun this command"
        )
    if config.publish.repo_id and (config.publish.push_to_hub or config.publish.push_checkpoints):
        open_repository(config.publish.repo_id, config.publish.private)
    # a finished run that is extended: from here on, its record does not describe what the folder will hold
    if os.path.lexists(folder.record):
        os.replace(folder.record, folder.previous_record)
    write_atomic(folder.config, _yaml(config.to_flat()))
    if plan.resume_from is not None and latest_checkpoint(folder.checkpoints) is None:
        restore_run(plan.resume_from, folder)
        if latest_checkpoint(folder.checkpoints) is None:
            raise RunError("the fetched checkpoint is damaged, so there is nothing to resume")


def require_places(folder: RunFolder) -> None:
    """Raise RequestError if something else lies where results will go, which would show after training.

    A link would lead the writing to a file elsewhere. Most files are written aside and replace what was there, links
    included; those that are written in place must not be links.
    """
    for path in (folder.model, folder.plots, folder.checkpoints):
        replaceable = path.is_symlink() and path != folder.checkpoints
        if os.path.lexists(path) and not path.is_dir() and not replaceable:
            raise RequestError(f"{printable(path)} is not a folder; remove it, or choose another --output-dir")
    replaced = [folder.config, folder.metrics, folder.predictions, folder.previous_record]
    for path in (*replaced, folder.lock, *folder.unreadable_lists):
        if path.is_symlink() and path in replaced:
            continue
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise RequestError(f"{printable(path)} is not a regular file; remove it, or choose another --output-dir")


def _make_folder(folder: RunFolder) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"the run folder {printable(folder)} cannot be created: {error.strerror or one_line(error)}; choose "
            "another --output-dir"
        ) from error


def publish_run(plan: Plan, record: RunRecord) -> Publication:
    """Publish a finished run as its settings say.

    Raises:
        RunError: If that fails; the run itself is kept.
    """
    hub = plan.config.publish
    return publish(plan.folder.model, record, hub.repo_id, hub.license, private=hub.private)


@contextlib.contextmanager
def _pushed_checkpoints(plan: Plan) -> Iterator[Callable[[Path], None]]:
    """Yield what uploads each checkpoint to the Hub, with --push-checkpoints, and wait for the last upload."""
    hub = plan.config.publish
    if not (hub.push_checkpoints and hub.repo_id):
        yield lambda path: None
        return
    pusher = CheckpointPusher(hub.repo_id, hub.private, _yaml(public_settings(plan.config, plan.splits)))
    try:
        yield pusher.push
    except StoppedRun:
        pusher.finish(PUSH_GRACE)
        raise
    pusher.finish()


def _yaml(settings: Mapping[str, Any]) -> str:
    content = {"format_version": CONFIG_VERSION, **settings}
    text = str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    if not is_printable(text.replace("\n", "")):  # escapes are all or none
        text = str(yaml.safe_dump(content, sort_keys=False))
    return text
