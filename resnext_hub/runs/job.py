"""A training job: lock the folder, train, write the results."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from resnext_hub.errors import RequestError, RunError, StoppedRun, one_line, setting
from resnext_hub.files import remove_leftovers, write_atomic
from resnext_hub.hub.checkpoints import CheckpointPusher, restore_run
from resnext_hub.hub.publish import Publication, open_repository, publish
from resnext_hub.machine import keep_memory
from resnext_hub.models.initialize import initialize
from resnext_hub.models.lookup import build_model
from resnext_hub.models.resnext import ResNeXt
from resnext_hub.processes.accelerator import build_accelerator, set_threads
from resnext_hub.processes.heartbeat import heartbeat
from resnext_hub.processes.peers import Peers, lost_peers
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder, RunLock
from resnext_hub.runs.estimate import estimate
from resnext_hub.runs.existing import CONFIG_VERSION
from resnext_hub.runs.public import public_settings
from resnext_hub.runs.results import write_results
from resnext_hub.runs.summary import log_plan
from resnext_hub.text import is_printable, printable, slug
from resnext_hub.trackers.fan_out import Trackers
from resnext_hub.trackers.names import tracker_names
from resnext_hub.training.checkpoint import latest_checkpoint
from resnext_hub.training.feed import evaluation_samples, require_readable
from resnext_hub.training.fit_head import fit_head
from resnext_hub.training.loop import train
from resnext_hub.training.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

PUSH_GRACE = 20
"""Seconds that a run stopped by a signal waits for the upload of its last checkpoint; launchers allow it 30."""


def execute(plan: Plan, peers: Peers, *, close: bool = True) -> RunRecord:
    """Train and write the run folder, on the disk of the main process; return the record in every process.

    Args:
        plan: The run; equal in every process.
        peers: The processes of the run.
        close: Whether to close the group of the processes at the end.

    Raises:
        RequestError: If another process uses the folder.
        RunError: If training fails, or the results cannot be written.
        StoppedRun: After SIGTERM or Ctrl-C; the state was saved.
    """
    require_readable_splits(plan)
    accelerator = start_accelerator(plan)
    with contextlib.ExitStack() as stack:
        peers.from_main(lambda: _claim_folder(plan, stack))
        with lost_peers(peers.rank, peers.size):
            log_plan(plan, accelerator, estimate(plan, accelerator))
        is_new = peers.from_main(lambda: latest_checkpoint(plan.folder.checkpoints) is None)
        model = build_initial_model(plan, peers)
        trackers = stack.enter_context(contextlib.closing(_open_trackers(plan, peers)))
        with heartbeat(peers), lost_peers(peers.rank, peers.size), _pushed_checkpoints(plan) as on_checkpoint:
            if plan.config.finetune.fit_head and is_new:
                fit_head(plan, model, accelerator, peers)
            outcome = train(plan, model, accelerator, peers, trackers, on_checkpoint)
        record = peers.from_main(lambda: write_results(plan, outcome, accelerator, trackers))
    if close:
        accelerator.end_training()
    return record


def build_initial_model(plan: Plan, peers: Peers) -> torch.nn.Module:
    """Return the model of a run in its initial state, equal in every process."""
    config = plan.config
    torch.manual_seed(config.seed)
    model = peers.together(
        lambda: build_model(plan.source, plan.splits.label_names, config.drop_rate, config.drop_path)
    )
    if isinstance(model, ResNeXt) and not plan.source.pretrained:
        initialize(model, config.seed)
    if peers.size > 1:  # pretrained weights may differ between hosts
        model.load_state_dict(peers.share_tensors(model.state_dict))
    return model


def _open_trackers(plan: Plan, peers: Peers) -> Trackers:
    """Return the trackers of the run; other processes than the main one have none."""
    path = plan.folder.path.resolve()
    name = path.name if plan.config.data.folds is None else f"{path.parent.name}-{path.name}"
    return Trackers(
        tracker_names(plan.config.track) if peers.is_main else (),
        plan.folder.trackers,
        project=slug(plan.splits.dataset_id),
        name=slug(name),
        config=public_settings(plan.config, plan.splits),
    )


def require_readable_splits(plan: Plan) -> None:
    """Raise RequestError if a split to evaluate on has no readable image."""
    for part, images in plan.splits.evaluated.items():
        require_readable(evaluation_samples(images, plan.input, plan.config.loader.max_image_pixels), part)


def start_accelerator(plan: Plan) -> "Accelerator":
    """Start Accelerate, and configure threads, memory and determinism of this process."""
    deterministic = bool(plan.config.deterministic)
    accelerator = build_accelerator(plan.precision, deterministic)
    set_threads(plan.config.threads, accelerator.device.type)
    keep_memory(accelerator.device.type)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS for deterministic algorithms
    torch.use_deterministic_algorithms(deterministic)
    # filling uninitialized memory costs time, and no code here reads it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a property
    torch.backends.cudnn.benchmark = not deterministic
    return accelerator


def _claim_folder(plan: Plan, stack: contextlib.ExitStack) -> None:
    """Create and lock the run folder, and write its initial files.

    Raises:
        RequestError: If another process uses the folder, or has changed it since planning.
        RunError: If the Hub refuses access, or a fetched checkpoint is damaged.
    """
    config, folder = plan.config, plan.folder
    _create_folder(folder)
    require_writable_paths(folder)
    stack.enter_context(RunLock(folder))
    remove_leftovers(folder.path)
    remove_leftovers(folder.checkpoints)
    if folder.state() != plan.folder_state:
        raise RequestError(f"{printable(folder)} was changed by another command; rerun this command")
    if config.publish.repo_id and (config.publish.push_to_hub or config.publish.push_checkpoints):
        open_repository(config.publish.repo_id, config.publish.private)
    # when a finished run is extended, its record no longer describes the folder
    if os.path.lexists(folder.record):
        os.replace(folder.record, folder.previous_record)
    write_atomic(folder.config, _yaml(config.to_flat()))
    if plan.resume_from is not None and latest_checkpoint(folder.checkpoints) is None:
        restore_run(plan.resume_from, folder)
        if latest_checkpoint(folder.checkpoints) is None:
            raise RunError("the downloaded checkpoint is damaged, so the run cannot be resumed from it")


def require_writable_paths(folder: RunFolder) -> None:
    """Check that nothing else is in the way of the results, which would otherwise only fail after training.

    Most files are written aside and then replace the existing file, even a link. Files that are written in place must
    not be links, since that would change a file elsewhere.

    Raises:
        RequestError: If something is in the way.
    """
    remedy = f"remove it, or choose another {setting('output_dir')}"
    for path in (folder.model, folder.plots, folder.checkpoints, folder.trackers):
        replaceable = path.is_symlink() and path in (folder.model, folder.plots)
        if os.path.lexists(path) and not path.is_dir() and not replaceable:
            raise RequestError(f"{printable(path)} is not a folder; {remedy}")
    replaced = [folder.config, folder.metrics, folder.predictions, folder.test_predictions, folder.confusion]
    replaced.append(folder.previous_record)
    for path in (*replaced, folder.lock, *folder.unreadable_lists):
        if path.is_symlink() and path in replaced:
            continue
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise RequestError(f"{printable(path)} is not a regular file; {remedy}")


def _create_folder(folder: RunFolder) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"the run folder {printable(folder)} cannot be created: {error.strerror or one_line(error)}; choose "
            f"another {setting('output_dir')}"
        ) from error


def publish_run(plan: Plan, record: RunRecord) -> Publication:
    """Publish a finished run according to its settings.

    Raises:
        RunError: If publishing fails; the run itself is kept.
    """
    hub = plan.config.publish
    return publish(plan.folder.model, record, hub.repo_id, hub.license, private=hub.private)


@contextlib.contextmanager
def _pushed_checkpoints(plan: Plan) -> Iterator[Callable[[Path], None]]:
    """Yield a function that uploads a checkpoint if `push_checkpoints` is set; wait for the last upload at the end."""
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
    if not is_printable(text.replace("\n", "")):  # yaml escapes all special characters or none
        text = str(yaml.safe_dump(content, sort_keys=False))
    return text
