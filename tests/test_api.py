"""The Python functions do what the commands do."""

import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from pytest import fixture, mark, raises
from support.runs import weights

import resnext_hub
from resnext_hub.record import RunRecord
from resnext_hub.run_folder import RunFolder
from resnext_hub.training.config import flat_fields
from resnext_hub.training.keywords import TrainSettings

TINY = dict(model="test_resnet", mixed_precision="no", warmup_epochs=0, threads="1", max_steps=10, lr=0.01)
"""Settings of a short run of a tiny model on the digits."""


@fixture(scope="module")
def run(tmp_path_factory) -> Iterator[RunFolder]:
    threads = torch.get_num_threads()
    yield resnext_hub.train(**TINY, output_dir=tmp_path_factory.mktemp("api") / "run")
    torch.set_num_threads(threads)


def test_train_returns_a_finished_run_folder(run: RunFolder) -> None:
    record = RunRecord.load(run.record)
    assert (record.steps, record.processes, record.evaluation.count) == (10, 1, 360)
    again = resnext_hub.train(**TINY, output_dir=run.path)  # computes nothing
    assert again == run
    assert RunRecord.load(run.record) == record


def test_train_reads_a_configuration_file(run: RunFolder, tmp_path: Path) -> None:
    other = resnext_hub.train(config=run.config, output_dir=tmp_path / "run")
    for name, tensor in weights(run.path).items():
        assert torch.equal(tensor, weights(other.path)[name]), name


@mark.parametrize("folder", ["path", "model"])
def test_load_reads_what_train_leaves(run: RunFolder, folder: str) -> None:
    classifier = resnext_hub.load(getattr(run, folder))
    for name, tensor in classifier.model.state_dict().items():
        assert torch.equal(tensor, weights(run.path)[name]), name


def test_evaluate_repeats_the_recorded_counts(run: RunFolder) -> None:
    evaluation, recorded = resnext_hub.evaluate(run.path, threads="1"), RunRecord.load(run.record).evaluation
    assert (evaluation.correct, evaluation.count) == (recorded.correct, recorded.count)


def test_predict_takes_a_classifier_or_a_path_and_one_image_or_several(run: RunFolder, tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32, 3), 90, dtype=np.uint8)).save(tmp_path / "image.png")
    (tmp_path / "unreadable.png").write_bytes(b"no image")
    images = [tmp_path / "image.png", tmp_path / "unreadable.png"]
    classifier = resnext_hub.load(run.path)
    found = resnext_hub.predict(classifier, images, top=3)
    assert found == resnext_hub.predict(run.path, images, top=3) == classifier.predict(images, top=3)
    assert [one.image for one in found] == images
    assert resnext_hub.predict(classifier, images[0]) == resnext_hub.predict(classifier, images[:1])


def test_publish_with_dry_run_lists_the_files(run: RunFolder) -> None:
    publication = resnext_hub.publish(run.path, "me/digits", license="mit", dry_run=True)
    assert publication.address is None
    assert {"README.md", "config.json", "model.safetensors"} <= {name for name, _ in publication.files}


@mark.parametrize(
    ("settings", "field", "value"),
    [
        (dict(lr=-1), "lr", "-1.0"),
        (dict(keep_checkpoints=0), "keep_checkpoints", "0"),
        (dict(optimizer="adamv"), "optimizer", "adamv"),
        (dict(mixed_precision="fp8"), "mixed_precision", "fp8"),
        (dict(checkpoint_every="10s"), "checkpoint_every", "10s"),
        (dict(recipe="finetuen"), "recipe", "finetuen"),
    ],
)
def test_errors_carry_the_setting_and_its_value(
    settings: dict[str, object], field: str, value: str, tmp_path: Path
) -> None:
    with raises(resnext_hub.RequestError) as caught:
        resnext_hub.train(**TINY | settings, output_dir=tmp_path / "run")
    assert (caught.value.field, caught.value.value) == (field, value)
    assert f"{field}={value}" in str(caught.value)
    assert f"--{field.replace('_', '-')} {value}" in caught.value.for_command_line()
    assert not (tmp_path / "run").exists()


def test_other_settings_in_a_used_folder_are_an_error_of_that_setting(run: RunFolder) -> None:
    with raises(resnext_hub.RequestError, match="contains a different run: seed was 0 and is now 4") as caught:
        resnext_hub.train(**TINY, seed=4, output_dir=run.path)
    assert caught.value.field == "seed"


def test_an_unfinished_run_is_neither_evaluated_nor_published(tmp_path: Path) -> None:
    with raises(resnext_hub.RequestError):
        resnext_hub.evaluate(tmp_path)
    with raises(resnext_hub.RequestError):
        resnext_hub.publish(tmp_path, "me/digits", license="mit", dry_run=True)


def test_the_keywords_of_train_are_the_fields_of_the_configuration() -> None:
    fields = SimpleNamespace(__annotations__={name: field.type for name, field in flat_fields().items()})
    assert typing.get_type_hints(TrainSettings) == typing.get_type_hints(fields)  # without the ranges
