"""What the commands do, as Python functions."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from resnext_hub.errors import RequestError, setting
from resnext_hub.hub.publish import Publication
from resnext_hub.inference.classifier import Classifier, load
from resnext_hub.processes.peers import join
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.training.evaluation import AnyEvaluation
from resnext_hub.training.keywords import TrainSettings

if TYPE_CHECKING:
    from resnext_hub.inference.inputs import ImageInput
    from resnext_hub.inference.prediction import Prediction, Unread
    from resnext_hub.runs.fold_results import CrossValidation
    from resnext_hub.runs.train import TrainRequest


def train(
    *,
    recipe: str | None = None,
    config: "str | os.PathLike[str] | None" = None,
    output_dir: "str | os.PathLike[str] | None" = None,
    resume: bool | None = None,
    resume_from: str | None = None,
    **settings: Unpack[TrainSettings],
) -> RunFolder:
    """Train a model and return its run folder; the Python equivalent of `resnext-hub train`.

        run = resnext_hub.train(recipe="finetune", dataset="photos", model="resnext_g32", epochs=10)
        classifier = resnext_hub.load(run.path)

    Under `torchrun` or `accelerate launch`, call this function in every process.

    Args:
        recipe: Name of a recipe, such as `finetune` (`resnext-hub recipes` lists them); if not given, `quickstart` if
            no dataset is named either.
        config: A YAML file of settings, such as a run's config.yaml; it overrides the recipe.
        output_dir: The run folder; `runs/DATASET-MODEL` if not given.
        resume: Whether to resume the run in the folder. None resumes it if there is one; False raises an error if there
            is one.
        resume_from: `hub:owner/name`, to resume from the checkpoint that a run left on the Hub.
        settings: Settings of the command, named like its flags but with underscores; they override the recipe and the
            file.

    Returns:
        The run folder; a run that is already finished is not trained again.

    Raises:
        RequestError: If the request is invalid; nothing was computed.
        RunError: If training fails; the last checkpoint is kept.
        StoppedRun: After SIGTERM or Ctrl-C; the state was saved.
    """
    from resnext_hub.runs.folds import requested_folds
    from resnext_hub.runs.train import train_run

    request = replace(_request(settings, recipe, config, output_dir), resume=resume, resume_from=resume_from)
    folds = requested_folds(request)
    if folds is not None:
        raise RequestError(
            f"{setting('folds', folds)} trains several models; use cross_validate, or add {setting('fold', 1)} to "
            "train only one of them"
        )
    return train_run(request, join()).plan.folder


def cross_validate(
    *,
    recipe: str | None = None,
    config: "str | os.PathLike[str] | None" = None,
    output_dir: "str | os.PathLike[str] | None" = None,
    **settings: Unpack[TrainSettings],
) -> "CrossValidation":
    """Train a model for each fold of a training split and return the results; the Python equivalent of `train --folds`.

        result = resnext_hub.cross_validate(recipe="finetune", dataset="photos", folds=5)
        print(result.accuracy, result.low, result.high)

    Args:
        recipe: A recipe, as for `train`.
        config: A YAML file of settings; it overrides the recipe.
        output_dir: Folder that contains the run folders; `runs/DATASET-MODEL-folds-N` if not given.
        settings: Settings of `resnext-hub train`, named like its flags but with underscores; `folds` is the number of
            folds.

    Returns:
        The results of all folds; runs that are already finished are not trained again.

    Raises:
        RequestError: If the request is invalid; nothing was computed.
        RunError: If training fails; the last checkpoint is kept.
        StoppedRun: After SIGTERM or Ctrl-C; the state was saved.
    """
    from resnext_hub.runs.folds import requested_folds, train_folds

    request = _request(settings, recipe, config, output_dir)
    folds = requested_folds(request)
    if folds is None:
        raise RequestError(
            f"cross-validation needs {setting('folds')}, such as 5, and does not accept {setting('fold')}"
        )
    return train_folds(request, folds, join()).result


def _request(
    settings: TrainSettings,
    recipe: str | None,
    config: "str | os.PathLike[str] | None",
    output_dir: "str | os.PathLike[str] | None",
) -> "TrainRequest":
    from resnext_hub.runs.train import TrainRequest

    return TrainRequest(
        asked=dict(settings),
        recipe=recipe,
        file=None if config is None else Path(config),
        output_dir=None if output_dir is None else Path(output_dir),
    )


def evaluate(
    run: "str | os.PathLike[str]", *, split: Literal["evaluation", "test"] = "evaluation", threads: str = "auto"
) -> AnyEvaluation:
    """Evaluate the model folder of a finished run.

    Args:
        run: The run folder.
        split: The split to evaluate on.
        threads: Number of CPU threads, or `auto`.

    Raises:
        RequestError: If there is no finished run, the run had no such split, or its dataset is missing or has changed.
    """
    from resnext_hub.runs.evaluate import evaluate_run

    evaluations, _ = evaluate_run(Path(run), threads, only=split)
    return evaluations[split]


def predict(
    model: "Classifier | str | os.PathLike[str]",
    images: "ImageInput | Sequence[ImageInput]",
    *,
    top: int | None = None,
    threshold: float | None = None,
    accept_precision: float | None = None,
) -> "list[Prediction | Unread]":
    """Classify images.

    Args:
        model: A classifier, or anything that `load` accepts.
        images: An image or a sequence of images, each given as a path, encoded bytes, a PIL image or a uint8 array.
        top: Number of classes to return for each image; if not given, only the most probable class or, if an image can
            have several labels, all labels that reach their thresholds.
        threshold: Minimum probability of the returned classes, 0 to 1; if an image can have several labels, this
            replaces their thresholds.
        accept_precision: Fraction of the accepted answers that should be correct, between 0 and 1; answers that are not
            probable enough for this precision are marked as unsure.

    Returns:
        For each image, its most probable classes, or the reason why it cannot be decoded.
    """
    classifier = model if isinstance(model, Classifier) else load(os.fspath(model))
    return classifier.predict(images, top=top, threshold=threshold, accept_precision=accept_precision)


def publish(
    run: "str | os.PathLike[str]",
    repo_id: str,
    *,
    license: str,
    private: bool = False,
    create_pr: bool = False,
    revision: str = "main",
    dry_run: bool = False,
    overwrite_card: bool = False,
) -> Publication:
    """Upload the model folder of a finished run to the Hub in one commit, and read it back.

    Args:
        run: The run folder.
        repo_id: `owner/name`; created if it does not exist.
        license: License of the weights, an ID from the Hub's list.
        private: Create the repository as private if it does not exist.
        create_pr: Open a pull request instead of committing.
        revision: Branch to commit to.
        dry_run: List the files without uploading them.
        overwrite_card: Replace the README.md on the Hub even if it was edited there.

    Raises:
        RequestError: If the request is incomplete, or the folder does not contain the recorded model.
        RunError: If the Hub rejects the request, cannot be reached, or returns different bytes.
    """
    from resnext_hub.hub.publish import publish as upload

    folder = RunFolder(Path(run))
    return upload(
        folder.model,
        RunRecord.load(folder.record),
        repo_id,
        license,
        private=private,
        create_pr=create_pr,
        revision=revision,
        dry_run=dry_run,
        overwrite_card=overwrite_card,
    )
