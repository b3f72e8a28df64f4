"""Measure unsure answers and the OOD score on Fashion-MNIST: `python tests/unsure_answers.py FOLDER`.

It trains a small ResNeXt on all ten classes, and one on the five with odd numbers. Then it fits, for 20 seeds, the
lowest probabilities of accepted answers to a part of the test images, and measures the precision on the others; and it
compares the OOD scores of test images with those of handwritten digits and of the classes that were left out.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from flipped_labels import SOURCE, write_idx
from long_tail import read_idx
from PIL import Image
from pyarrow import parquet
from pytorch_ood.metrics import AUROC
from small_data import RESNEXT
from timm.models import save_for_hf

from resnext_hub.inference.classifier import load
from resnext_hub.inference.prediction import Prediction
from resnext_hub.record import RunRecord
from resnext_hub.training.acceptance import REPORTED, fit_acceptance, measure_acceptance

TRAINING_IMAGES = 30_000
SEEDS = 20


def write_classes(folder: Path, classes: list[int]) -> None:
    """Write the images of some classes as a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", TRAINING_IMAGES), ("t10k", 10_000)):
        images, labels = (read_idx(SOURCE / f"{split}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
        rows = np.flatnonzero(np.isin(labels, classes))
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:most])
        write_idx(folder / f"{split}-images-idx3-ubyte", images[rows])
        write_idx(folder / f"{split}-labels-idx1-ubyte", np.searchsorted(classes, labels[rows]).astype(np.uint8))


def train(folder: Path, name: str, classes: list[int]) -> Path:
    """Train a model on some classes, unless that was done before; return the run folder."""
    run = folder / name
    if not (run / "record.json").is_file():
        write_classes(folder / f"{name}-data", classes)
        torch.manual_seed(0)
        overlay = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"}
        model = timm.create_model(
            "resnext50_32x4d", num_classes=len(classes), pretrained_cfg_overlay=overlay, **RESNEXT
        )
        save_for_hf(model, folder / "untrained", model_args=RESNEXT, safe_serialization=True)
        flags = ["--image-size", 32, "--scale", 0.6, 1, "--epochs", 4, "--optimizer", "adamw", "--lr", 2e-3]
        flags += ["--weight-decay", 0.05, "--warmup-epochs", 0.5, "--eval-every", 4, "--no-pretrained"]
        words = [
            "resnext-hub",
            "train",
            "--dataset",
            folder / f"{name}-data",
            "--model",
            f"local-dir:{folder}/untrained",
        ]
        subprocess.run([*map(str, [*words, *flags]), "--output-dir", str(run)], check=True)
    return run


def print_precision(run: Path) -> None:
    """Print how often each requested precision was met over the seeds, and the mean coverage."""
    table = parquet.read_table(run / "predictions.parquet")
    probabilities = table["probability"].to_numpy()
    right = table["label"].to_numpy() == table["prediction"].to_numpy()
    print(f"accuracy {100 * right.mean():.1f} % of {len(right)}")
    for size in (500, 2000):
        for asked in REPORTED:
            met, coverage = 0, []
            for seed in range(SEEDS):
                order = np.random.default_rng(seed).permutation(len(right))
                fitted = fit_acceptance(probabilities[order[:size]], right[order[:size]])
                rest = probabilities[order[size:]], right[order[size:]]
                found = [facts for facts in measure_acceptance(fitted, *rest) if facts.precision == asked]
                met += all(facts.right >= asked * facts.answered for facts in found)
                coverage.append(sum(facts.answered / facts.count for facts in found))
            print(f"{size} images, precision {asked:g}: met {met} of {SEEDS}, accepted {100 * np.mean(coverage):.1f} %")


def print_left_out(run: Path, classes: list[int]) -> None:
    """Print the AUROC of test images against those of the other classes, by OOD score and by largest probability."""
    images, labels = (read_idx(SOURCE / f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    rows = np.random.default_rng(0).permutation(len(images))[:4000]
    found = [
        one for one in load(run).predict([Image.fromarray(images[row]) for row in rows]) if isinstance(one, Prediction)
    ]
    left_out = torch.from_numpy(~np.isin(labels[rows], classes))
    for name, scores in (
        ("OOD score", [prediction.ood_score for prediction in found]),
        ("largest probability", [-prediction.guesses[0].probability for prediction in found]),
    ):
        metric = AUROC()
        metric.update(torch.tensor(scores), torch.where(left_out, -1, 0))
        print(f"left-out classes by {name}: AUROC {metric.compute()['AUROC']:.3f}")


def main() -> None:
    """Train, and print the table."""
    folder, odd = Path(sys.argv[1]), [1, 3, 5, 7, 9]
    every = train(folder, "all", list(range(10)))
    print_precision(every)
    for run in (every, some := train(folder, "odd", odd)):
        for facts in RunRecord.load(run / "record.json").ood:
            print(
                f"{run.name}: {facts.dataset}: {facts.auroc:.3f}, by largest probability {facts.max_softmax_auroc:.3f}"
            )
    print_left_out(some, odd)


if __name__ == "__main__":
    main()
