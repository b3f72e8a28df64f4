"""`resnext-hub report`: a page that needs nothing else, whatever kind of run it is about."""

import dataclasses
import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from pyarrow import parquet, table
from pytest import MonkeyPatch, TempPathFactory, approx, fixture, importorskip, mark, raises, skip
from support.digit_pairs import write_pairs
from support.processes import TINY, run_process, write_images
from support.records import DAMAGES, a_record
from support.runs import lines

from resnext_hub.data.images import IndexedImages
from resnext_hub.errors import RequestError
from resnext_hub.inference.classifier import load
from resnext_hub.record import RunRecord
from resnext_hub.report.outputs import compute_outputs, first_batch, first_inputs
from resnext_hub.report.page import render_page
from resnext_hub.report.stored import read_predictions
from resnext_hub.runs.reopen import reopen
from resnext_hub.training.temperature import calibration_error, certainties, cross_fitted

Command = Callable[..., tuple[int, str, str]]

PLOTS = {"curves", "batch", "confusion", "classes", "mistakes", "hits", "reliability", "embeddings"}

CHROMIUM = "/usr/bin/chromium"

FLAGS = (*TINY, "--image-size", 32, "--batch-size", 20, "--lr", 0.01)


class Page(HTMLParser):
    """The elements of a page that matter here."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def reported(command: Command, run: Path, *flags: object) -> Page:
    """Write the report of a run, and return its page."""
    code, out, _ = command("report", run, "--threads", 1, *flags)
    assert code == 0
    page = run / "plots" / "report" / "report.html"
    assert out == f"report: {page}\n"
    return Page(page)


def drawn(run: Path) -> set[str]:
    names = {path.stem for path in (run / "plots" / "report").glob("*.png")}
    light, dark = ({n.removesuffix(s) for n in names if n.endswith(s)} for s in ("-light", "-dark"))
    assert light == dark
    return light


@fixture(scope="module")
def mixing_run(tmp_path_factory: TempPathFactory) -> Path:
    """A run of a few steps with every augmentation that changes pixels, with the hashes of its inputs."""
    folder = tmp_path_factory.mktemp("mixing") / "run"
    flags = ("--mixup", 0.4, "--cutmix", 1, "--random-erasing", 0.5, "--auto-augment", "rand-m5", "--log-samples")
    done = run_process("scripts/train.py", *FLAGS, *flags, "--max-steps", 2, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@fixture(scope="module")
def marked_run(tmp_path_factory: TempPathFactory) -> Path:
    """A run whose class names are markup and scripts, with a test split, one-channel images and an unreadable one."""
    root = tmp_path_factory.mktemp("marked")
    names = ("<img src=x onerror=document.title='broken'>", '"><svg onload=document.title=1>', "猫 & {{ 7 * 7 }}")
    for number, name in enumerate(names):
        write_images(root / "photos" / name, 24, 60 + 50 * number)
    (root / "photos" / names[0] / "003.png").write_bytes(b"no image")
    flags = (*FLAGS, "--dataset", root / "photos", "--max-steps", 12, "--eval-fraction", 0.3, "--test-fraction", 0.3)
    flags += ("--max-bad-fraction", 0.5, "--no-group-duplicates", "--output-dir", root / "run")
    done = run_process("scripts/train.py", *flags)
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_the_page_of_a_run_holds_every_plot_and_the_key_figures(finished: Path, command: Command) -> None:
    page, record = reported(command, finished), RunRecord.load(finished / "record.json")
    assert drawn(finished) == PLOTS
    images = page.all("img")
    assert len(images) == len(PLOTS) == len(page.all("source"))
    assert all(len(image["alt"]) > 20 for image in images)
    assert page.all("html") == [{"lang": "en"}]
    assert f"{record.evaluation.correct}/{record.evaluation.count}" in page.text
    assert "images held out from train, on which the best weights were also selected by accuracy" in page.text
    assert record.command in page.text
    assert len(page.all("title")) == 1
    links = re.findall(r"""(?:src|srcset|href|url|action)\s*[=(]\s*["']?([^"'\s>)]*)""", page.source)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not page.all("script")
    before = {path.name: path.read_bytes() for path in (finished / "plots" / "report").iterdir()}
    reported(command, finished)
    again = {path.name: path.read_bytes() for path in (finished / "plots" / "report").iterdir()}
    assert again == before


def test_the_training_batch_is_the_one_that_the_run_was_trained_on(mixing_run: Path) -> None:
    run, classifier = reopen(mixing_run), load(mixing_run)
    splits = run.load_splits()
    images, targets = first_inputs(run, classifier, splits, 16)
    (first,) = [line for line in lines(mixing_run / "samples-0.jsonl") if line["step"] == 1]
    hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in images]
    assert len(hashes) == 16
    assert hashes == first["pixels"][:16]
    assert targets.shape == (16, 10)
    assert targets.sum(dim=1).tolist() == approx([1.0] * 16)
    batch = first_batch(run, classifier, splits, 16)
    assert batch.pixels.shape == (16, 32, 32, 3)
    assert np.ptp(batch.pixels) > 200


def test_the_diagrams_before_and_after_calibration_have_the_errors_of_the_record(finished: Path) -> None:
    record = RunRecord.load(finished / "record.json")
    assert record.calibration is not None
    assert record.evaluation.uncalibrated_error is not None
    run, classifier = reopen(finished), load(str(finished))
    images = run.load_splits().eval
    assert isinstance(images, IndexedImages)
    outputs = compute_outputs(run, classifier, images, 1000, torch.device("cpu"))
    as_trained = outputs.logits * record.calibration.temperature
    errors = [
        calibration_error(*certainties(logits, outputs.labels))
        for logits in (as_trained, cross_fitted(as_trained, outputs.labels))
    ]
    assert errors == approx([record.evaluation.uncalibrated_error, record.evaluation.calibration_error], abs=1e-5)


@mark.parametrize(
    ("best_by", "test", "expected"),
    [
        (
            "top1",
            False,
            "images held out from train, on which the best weights were also selected by accuracy",
        ),
        (
            "macro-f1",
            True,
            "the images of the test split, evaluated once; the best weights were selected by macro-F1 on images held",
        ),
        ("last", False, "images held out from train; the weights are those of the last step"),
        ("last", True, "the images of the test split; the weights are those of the last step"),
    ],
)
def test_the_page_says_which_split_selected_the_weights_and_which_measured_them(
    best_by: str, test: bool, expected: str
) -> None:
    record = a_record()
    record = dataclasses.replace(record, config=record.config | {"best_by": best_by})
    if test:
        facts = dataclasses.replace(record.dataset, test_split="test", test_count=record.evaluation.count)
        record = dataclasses.replace(record, dataset=facts, test=record.evaluation)
    assert f"<dd>{expected}" in render_page(record, [], {})


@mark.parametrize("tta", ["none", "flip"])
def test_the_logits_are_those_of_the_evaluation(tta: str, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    code, _, err = command("train", *FLAGS, "--max-steps", 2, "--tta", tta, "--output-dir", run)
    assert code == 0, err
    opened, classifier = reopen(run), load(run)
    images = opened.load_splits().eval
    outputs = compute_outputs(opened, classifier, images, len(images), torch.device("cpu"))
    found, right = certainties(outputs.logits, outputs.labels)
    stored = read_predictions(run / "predictions.parquet", 10, False, len(images))
    assert (right == ~stored.wrong).all()
    assert found == approx(stored.probabilities, abs=1e-5)


def test_the_split_that_measured_is_the_one_that_is_shown(marked_run: Path, command: Command) -> None:
    page, record = reported(command, marked_run), RunRecord.load(marked_run / "record.json")
    assert record.test is not None
    assert f"{record.test.correct}/{record.test.count}" in page.text
    assert "evaluated once; the best weights were selected by accuracy on other images held out from train" in page.text
    assert {"batch", "hits", "confusion"} <= drawn(marked_run)


def test_names_of_classes_are_text_whatever_they_contain(marked_run: Path, command: Command) -> None:
    page = reported(command, marked_run)
    assert len(page.all("img")) == len(page.all("source")) == len(drawn(marked_run))
    assert not page.all("svg")
    assert "<img src=x onerror=document.title='broken'>" in page.text
    assert "猫 & {{ 7 * 7 }}" in page.text
    (policy,) = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:")


def test_a_run_with_several_labels_has_plots_of_its_labels(tmp_path: Path, command: Command) -> None:
    pairs = write_pairs(tmp_path / "pairs", {"train": 64, "validation": 60})
    run = tmp_path / "run"
    code, _, err = command("train", *FLAGS, "--dataset", pairs, "--max-steps", 4, "--output-dir", run)
    assert code == 0, err
    page = reported(command, run)
    assert drawn(run) >= (PLOTS | {"average_precision"}) - {"confusion", "hits"}
    assert "The confusion matrix is not shown: an image can have several labels." in page.text
    assert "Mean average precision" in page.text


def test_a_streamed_run_has_a_report_without_images(tmp_path: Path, command: Command) -> None:
    import datasets

    images = {"image": [np.full((32, 32), 9 * n, np.uint8) for n in range(24)], "label": [n % 2 for n in range(24)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_dict(images, features=features)
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    run = tmp_path / "run"
    flags = ("--dataset", tmp_path / "data", "--streaming", "--max-steps", 3, "--output-dir", run)
    code, _, err = command("train", *FLAGS, *flags)
    assert code == 0, err
    code, _, err = command("report", run)
    assert code == 0
    assert err.splitlines() == [
        f"{run}: the report has no images: the dataset was streamed, so images cannot be looked up by index"
    ]
    assert drawn(run) == {"curves", "confusion", "classes", "reliability"}


def test_a_report_without_the_dataset_says_so(vehicles_run: Path, tmp_path: Path, command: Command) -> None:
    run = Path(shutil.copytree(vehicles_run, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"^dataset: .*$", f"dataset: {tmp_path / 'gone'}", config, flags=re.M))
    code, _, err = command("report", run)
    assert code == 0
    assert err.startswith(f"{run}: the report has no images: ")
    assert err.count("\n") == 1
    page = Page(run / "plots" / "report" / "report.html")
    assert drawn(run) == {"curves", "confusion", "classes", "reliability"}
    assert page.text.count("not shown: ") == 4
    assert str(tmp_path) in err
    assert str(tmp_path) not in page.text  # a page may be shared
    assert "vehicles" in page.text


def test_damaged_predictions_are_refused_in_one_line(vehicles_run: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "predictions.parquet", (vehicles_run / "predictions.parquet").read_bytes()
    columns = parquet.read_table(vehicles_run / "predictions.parquet").to_pydict()
    for damage in set(DAMAGES) - {"twice"}:  # parquet is read from its end
        path.write_bytes(DAMAGES[damage](whole))
        with raises(RequestError, match=r"^predictions.parquet is damaged \(.*\)$"):
            read_predictions(path, 3, False, 37)
    for name, value in (("prediction", 99), ("label", -1), ("index", 37), ("probability", 1.5)):
        parquet.write_table(table({**columns, name: [value] * len(columns[name])}), path)
        with raises(RequestError, match=r"^predictions.parquet does not match record.json of the run$"):
            read_predictions(path, 3, False, 37)
    for name in columns:
        parquet.write_table(table({other: columns[other] for other in columns if other != name}), path)
        with raises(RequestError, match="damaged"):
            read_predictions(path, 3, False, 37)


def test_missing_predictions_are_not_shown(vehicles_run: Path, tmp_path: Path, command: Command) -> None:
    run = Path(shutil.copytree(vehicles_run, tmp_path / "run"))
    (run / "predictions.parquet").unlink()
    page = reported(command, run)
    assert "Images are not shown: predictions.parquet is missing." in page.text
    assert PLOTS - drawn(run) <= {"mistakes", "hits", "reliability"}  # of few images there is no diagram either


def test_without_captum_the_images_have_no_overlays_and_the_page_says_why(
    vehicles_run: Path, tmp_path: Path, command: Command, monkeypatch: MonkeyPatch
) -> None:
    run = Path(shutil.copytree(vehicles_run, tmp_path / "run"))
    for name in ("captum", "captum.attr"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now says that there is no such module
    page = reported(command, run)
    assert 'Heat maps are not shown: captum is not installed; pip install "resnext-hub[report]".' in page.text
    assert "hits" in drawn(run)


def test_what_is_no_finished_run_is_refused_in_one_line(vehicles_run: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty").mkdir()
    unfinished = Path(shutil.copytree(vehicles_run, tmp_path / "unfinished"))
    (unfinished / "record.json").unlink()
    damaged = Path(shutil.copytree(vehicles_run, tmp_path / "damaged"))
    (damaged / "model" / "config.json").write_text("{")
    for run, text in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "is not a run folder"),
        (unfinished, "is not finished; rerun its training command"),
        (vehicles_run / "model", f"did you mean {vehicles_run}?"),
        (damaged, "config.json"),
    ):
        code, out, err = command("report", run)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert text in err
        assert not (run / "plots" / "report").exists()


def test_a_run_that_is_extended_replaces_its_report(tmp_path: Path, command: Command) -> None:
    write_images(tmp_path / "photos" / "a", 12, 60)
    write_images(tmp_path / "photos" / "b", 12, 160)
    run = tmp_path / "run"
    flags = ("train", *FLAGS, "--dataset", tmp_path / "photos", "--output-dir", run)
    assert command(*flags, "--max-steps", 2)[0] == 0
    reported(command, run, "--images", 3)
    code, _, err = command(*flags, "--max-steps", 4)
    assert code == 0
    assert "previous" not in err
    assert not (run / "plots" / "report").exists()
    assert dataclasses.asdict(RunRecord.load(run / "record.json"))["steps"] == 4


@mark.slow
def test_the_page_opens_in_a_browser_in_both_themes_without_a_request(marked_run: Path, command: Command) -> None:
    playwright = importorskip("playwright.sync_api")
    if not Path(CHROMIUM).is_file():
        skip("chromium is not installed")
    page = reported(command, marked_run)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        shown = {}
        for scheme in ("light", "dark"):
            context = browser.new_context(color_scheme=scheme, viewport={"width": 600, "height": 900})
            tab, requests, errors = context.new_page(), [], []
            tab.on("request", lambda request, seen=requests: seen.append(request.url))
            tab.on("pageerror", lambda error, seen=errors: seen.append(str(error)))
            address = (marked_run / "plots" / "report" / "report.html").as_uri()
            tab.goto(address)
            assert [url for url in requests if not url.startswith("data:")] == [address]
            assert errors == []
            assert tab.title() == "run: report"
            sizes = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
            assert len(sizes) == len(page.all("img"))
            assert all(complete and natural >= 2 * width > 900 for complete, natural, width in sizes)
            assert tab.evaluate("document.documentElement.scrollWidth") == 600  # nothing is wider than the page
            shown[scheme] = tab.evaluate(
                "[getComputedStyle(document.body).backgroundColor, ...[...document.images].map(i => i.currentSrc)]"
            )
        browser.close()
    assert all(light != dark for light, dark in zip(shown["light"], shown["dark"], strict=True))
