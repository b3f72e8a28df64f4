"""Plots: names in any script, bounded memory, and failures that never make a run fail."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import datasets
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from pytest import approx, mark, raises
from support.processes import TINY, write_images
from support.records import a_record

from resnext_hub.cards.model_card import render_card
from resnext_hub.data.images import IndexedImages
from resnext_hub.facts import CalibrationFacts
from resnext_hub.plots.confusion import plot_confusion
from resnext_hub.plots.curves import plot_curves
from resnext_hub.plots.lettering import choose_lettering
from resnext_hub.plots.reliability import Confidences
from resnext_hub.plots.samples import percent, plot_samples, thumbnail
from resnext_hub.plots.study import Curve
from resnext_hub.plots.write import save_plot, write_plots
from resnext_hub.record import RunRecord
from resnext_hub.text import is_printable
from resnext_hub.training.evaluation import Evaluation

Command = Callable[..., tuple[int, str, str]]

NAMES = [
    ["$", "$$", "$$$"],
    ["$5_$10", "$10_$20", r"\frac{$1$}"],
    ["猫", "犬と猫", "고양이"],
    ["قطة", "חתול", "แมว"],
    ["😀", "a\u200db\ufe0f", "\U000e0001"],
    ["golden retriever dog", "Siberian husky dog", "x" * 300],
    ["a\nb", "\x1b[1mc", "\udce9\u202e"],
]

STEP, EVALUATION = ({"step": 1, "epoch": 1.0}, {"step": 1, "epoch": 1.0, "eval_loss": 1.0, "eval_top1": 0.5})
STEP |= {"loss": 2.0, "lr": 0.1}


def stored(size: tuple[int, int]) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def gallery(count: int, classes: int = 3, size: tuple[int, int] = (40, 30)) -> tuple[IndexedImages, Evaluation]:
    """Return `count` images and an evaluation that misclassifies every third of them."""
    labels = np.arange(count) % classes
    rows = datasets.Dataset.from_dict({"image": [stored(size)] * count})
    predictions = np.where(np.arange(count) % 3 == 1, (labels + 1) % classes, labels)
    evaluation = Evaluation(
        indices=np.arange(count),
        labels=labels,
        predictions=predictions,
        probabilities=np.linspace(0.001, 0.999, count, dtype=np.float32),
        losses=np.ones(count),
        ranks=np.zeros(count, dtype=np.int64),
        unreadable=[],
        total=count,
    )
    return IndexedImages(rows, "image", np.arange(count), labels), evaluation


def drawn(draw: Callable[[], Figure], names: tuple[str, ...]) -> None:
    # as in `save_plot`: some versions of matplotlib choose the font of a text when it is made, others when it is drawn
    with matplotlib.rc_context({"font.family": list(choose_lettering(names).families)}):
        draw().savefig(io.BytesIO(), dpi=60)


@mark.parametrize("names", NAMES, ids=lambda names: ascii(names[0])[:20])
def test_names_of_any_script_are_drawn_without_a_warning(names: list[str]) -> None:
    letters, history = choose_lettering(tuple(names)), [STEP, EVALUATION]
    record = a_record(names=names, history=history)
    many = a_record(names=names * 20, confusion=[[(0, 2)], *([(n, 1)] for n in range(1, 60))], history=history)
    images, evaluation = gallery(5)
    for draw in (
        lambda: plot_confusion(record, letters),
        lambda: plot_confusion(many, letters),
        lambda: plot_samples(images, evaluation, names, letters),
    ):
        drawn(draw, tuple(names))


def test_a_name_without_a_font_is_escaped_after_its_index() -> None:
    names = ("cat", "\U0001fbf9 x")  # a segmented digit, which hardly any font has
    letters = dataclasses.replace(choose_lettering(names), characters=choose_lettering(names).characters - {0x1FBF9})
    assert [letters.name(names, index, 20) for index in range(2)] == ["cat", "1: \\U0001fbf9 x"]
    assert letters.name(names, 1, 6) == "1: \\U…"
    assert "escaped" in letters.note(names)
    assert letters.note(names[:1]) == ""


def test_a_percentage_is_0_or_100_only_if_exact() -> None:
    shown = [percent(part) for part in (0.0, 0.001, 0.01, 0.5, 0.99, 0.9999, 1.0)]
    assert shown == ["0 %", "<1 %", "1 %", "50 %", "99 %", ">99 %", "100 %"]


@mark.parametrize("count", [1, 2, 7, 24, 60])
def test_a_gallery_is_as_wide_as_its_images(count: int) -> None:
    images, evaluation = gallery(count)
    figure = plot_samples(images, evaluation, ["a", "b", "c"], choose_lettering(("a", "b", "c")))
    shown = [image.get_extent() for axes in figure.axes for image in axes.images]
    assert len(shown) == min(count, 24)
    assert figure.get_figwidth() == approx(1.9 * min(count, 6))
    for number, (left, right, bottom, top) in enumerate(shown):
        assert 0 <= left < right <= figure.get_figwidth()
        assert 0 <= top < bottom <= figure.get_figheight()
        assert (right - left) / (bottom - top) == approx(40 / 30)
        for other in shown[:number]:
            assert right <= other[0] or other[1] <= left or bottom <= other[3] or other[2] <= top


def test_gallery_images_are_thumbnails_and_a_missing_image_is_white() -> None:
    assert max(thumbnail(stored((900, 500)), 10**8).size) == 256
    assert thumbnail({"bytes": None, "path": "nowhere"}, 10**8).getextrema() == ((255, 255),) * 3


def test_a_gallery_of_large_images_holds_only_thumbnails() -> None:
    images, evaluation = gallery(6, size=(900, 700))
    figure = plot_samples(images, evaluation, list("abc"), choose_lettering(tuple("abc")))
    assert {max(image.get_array().shape) for axes in figure.axes for image in axes.images} == {256}


@mark.parametrize("history", [[STEP], [EVALUATION], [STEP, EVALUATION]])
def test_a_curve_of_one_point_has_an_unclipped_marker(history: list[dict]) -> None:
    figure = plot_curves(a_record(history=history), choose_lettering(("a",)))
    drawn(lambda: figure, ("a",))
    for line in (line for axes in figure.axes for line in axes.lines):
        assert not line.get_clip_on()
        assert line.get_marker() not in ("", "None")


def test_many_classes_are_plotted_as_their_most_confused_pairs() -> None:
    names = [f"kind {n}" for n in range(500)]
    confusion = [[(n, 3)] for n in range(500)]
    confusion[7], confusion[9] = [(7, 1), (400, 5)], [(9, 1), (10, 2)]
    figure = plot_confusion(a_record(names=names, confusion=confusion), choose_lettering(tuple(names)))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["kind 7 as kind 400", "kind 9 as kind 10"]
    perfect = plot_confusion(
        a_record(names=names, confusion=[[(n, 1)] for n in range(500)]), choose_lettering(tuple(names))
    )
    assert "all images were classified correctly" in [text.get_text() for text in perfect.axes[0].texts]


FAILURES = [
    OSError(28, "No space left on device"),
    ValueError("bad"),
    MemoryError(),
    RuntimeError("In FT2Font"),
    KeyError("x"),
]


@mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failed_plot_leaves_no_file(error: Exception, tmp_path: Path) -> None:
    def fail(_: object) -> object:
        (tmp_path / "plot.png").write_bytes(b"half")
        raise error

    assert not save_plot(tmp_path / "plot.png", ("a",), fail)
    assert list(tmp_path.iterdir()) == []
    with raises(KeyboardInterrupt):
        save_plot(tmp_path / "plot.png", ("a",), lambda _: (_ for _ in ()).throw(KeyboardInterrupt))


def test_a_card_shows_the_plots_that_were_drawn(tmp_path: Path) -> None:
    record = a_record()  # no metrics, so no curves
    drawn = write_plots(record, tmp_path)
    assert drawn == ["confusion_matrix.png"] == [path.name for path in tmp_path.iterdir()]
    card = render_card(dataclasses.replace(record, plots=drawn))
    assert "plots/confusion_matrix.png" in card
    assert "plots/curves.png" not in card
    (tmp_path / "confusion_matrix.png").unlink()
    (tmp_path / "confusion_matrix.png").mkdir()
    assert write_plots(record, tmp_path) == []


def test_a_card_shows_reliability_diagrams_if_the_weights_are_calibrated(tmp_path: Path) -> None:
    panel = Confidences(title="As trained", probabilities=np.full(9, 0.9), right=np.arange(9) < 5)
    record = a_record()
    record = dataclasses.replace(
        record,
        plots=write_plots(record, tmp_path, [panel, panel]),
        evaluation=dataclasses.replace(record.evaluation, uncalibrated_error=0.25),
    )
    assert record.plots == ["confusion_matrix.png", "reliability.png"]
    assert "reliability.png" not in render_card(record)
    card = render_card(dataclasses.replace(record, calibration=CalibrationFacts(temperature=1.5, images=60)))
    assert "calibration error 25.00 % before calibration, 10.00 % after](plots/reliability.png)" in card


def test_a_run_with_odd_names_and_damaged_logs_finishes(tmp_path: Path, command: Command) -> None:
    images, run = tmp_path / "im\u202eages", tmp_path / 'r "😀\\ 1'
    for name, shade in (("$", 60), ("$$", 110), ("猫\n", 160)):
        write_images(images / name, 6, shade)
    flags = ("train", *TINY, "--dataset", images, "--image-size", 32, "--batch-size", 6)
    flags += ("--eval-fraction", 0.5, "--checkpoint-every", 1, "--output-dir", run)
    assert command(*flags, "--max-steps", 1)[0] == 0
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b"\xff\x00\n" + b"{}\n" + metrics.read_bytes())
    (run / "unreadable-0.jsonl").write_bytes(b"null\n\xff\n")
    code, out, err = command(*flags, "--max-steps", 2)
    assert code == 0, err
    exec("\n".join(line.strip() for line in out.splitlines() if line.startswith("    ")), {})
    assert is_printable((run / "config.yaml").read_text().replace("\n", ""))
    assert "Traceback" not in err
    assert "ignored 2 damaged lines" in err
    record = RunRecord.load(run / "record.json")
    assert [line["step"] for line in record.history if "eval_loss" in line][-1] == 2
    assert record.plots == ["curves.png", "confusion_matrix.png"]
    assert (run / "plots" / "samples.png").is_file()


def test_curves_of_a_study_are_at_the_epochs_of_evaluations_and_training_errors_are_means_since_the_last_one() -> None:
    def history(shift: float) -> list[dict[str, float]]:
        return [
            {"epoch": 0.05, "top1": 0.4 + shift},
            {"epoch": 0.1, "top1": 0.6 + shift},
            {"epoch": 0.1, "eval_top1": 0.7 + shift},
            {"epoch": 0.2, "top1": 0.8 + shift},
            {"epoch": 0.2, "eval_top1": 0.75 + shift},
        ]

    curve = Curve.of("1x64d", [history(0.0), history(0.1)])
    assert [tuple(round(x, 6) for x in point) for point in curve.training] == [(0.1, 45, 40, 50), (0.2, 15, 10, 20)]
    assert [tuple(round(x, 6) for x in point) for point in curve.validation] == [(0.1, 25, 20, 30), (0.2, 20, 15, 25)]
