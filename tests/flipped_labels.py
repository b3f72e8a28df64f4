"""Measure how many flipped labels `resnext-hub check RUN` finds: `python tests/flipped_labels.py FOLDER [SEED]`.

5 % of the training labels of Fashion-MNIST (Debian's package dataset-fashion-mnist) are changed to another class at
random, a small model is trained, and the labels that the check flags first are compared with those that were changed.
Dataset, run and findings are written to FOLDER.
"""

import contextlib
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from resnext_hub.cli.main import main as run_command

SOURCE = Path("/usr/share/datasets/fashion-mnist")
FRACTION = 0.05
CLASSES = 10

RECIPE = (
    "--model", "test_resnet", "--image-size", "32", "--crop-pct", "1", "--interpolation", "bilinear",
    "--scale", "0.7", "1", "--optimizer", "adamw", "--lr", "0.002", "--weight-decay", "0.05",
    "--epochs", "4", "--warmup-epochs", "0.2", "--eval-batch-size", "128",
)  # fmt: skip
"""A model with too few parameters, and too few epochs, to memorize wrong labels."""


def flip(labels: np.ndarray, fraction: float, classes: int, seed: int) -> np.ndarray:
    """Return labels of which a fraction was changed to another class at random."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(labels), round(fraction * len(labels)), replace=False)
    flipped = labels.copy()
    flipped[chosen] = (labels[chosen] + generator.integers(1, classes, len(chosen))) % classes
    return flipped


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an array of bytes in the format of MNIST."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def recall_at_k(findings: dict[str, Any], flipped: np.ndarray) -> float:
    """Return the share of flipped labels among the first K that were flagged.

    Args:
        findings: What `resnext-hub check RUN --json` prints.
        flipped: Whether the label of each row of the training split was flipped, `(N,)` bool; only rows that were
            trained on count.
    """
    rows = [found["row"] for found in findings["wrong_labels"] if found["trained_on"]]
    return float(flipped[rows[: flipped.sum()]].sum() / flipped.sum())


def main() -> None:
    """Write the dataset, train, check, and print recall and estimate."""
    folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    dataset, run = folder / "dataset", folder / "run"
    dataset.mkdir(parents=True, exist_ok=True)
    for path in SOURCE.glob("*-ubyte.gz"):
        if path.name != "train-labels-idx1-ubyte.gz" and not (dataset / path.name).exists():
            (dataset / path.name).symlink_to(path)
    with gzip.open(SOURCE / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read()[8:], np.uint8).astype(np.int64)
    noisy = flip(labels, FRACTION, CLASSES, seed)
    write_idx(dataset / "train-labels-idx1-ubyte", noisy)
    assert run_command(["train", "--dataset", str(dataset), *RECIPE, "--output-dir", str(run)]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_command(["check", str(run), "--json"]) == 0
    (folder / "findings.json").write_text(out.getvalue())
    findings = json.loads(out.getvalue())
    flipped = noisy != labels
    flagged = sum(found["trained_on"] for found in findings["wrong_labels"])
    print(
        f"{flipped.sum()} labels flipped, {findings['splits'][0]['estimated_wrong_labels']:.0f} estimated, {flagged} "
        f"flagged; recall at {flipped.sum()}: {recall_at_k(findings, flipped):.3f}"
    )


if __name__ == "__main__":
    main()
