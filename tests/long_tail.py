"""Measure what corrections of an imbalance gain: `python tests/long_tail.py FOLDER [SEEDS]`.

The training split of Fashion-MNIST (Debian's package dataset-fashion-mnist) gets a long tail: class k keeps its first
6000 / 100^(k / 9) images, so the largest class has 100 times as many as the smallest. A small model is trained without
a correction and with each of them, with every seed, and evaluated on the balanced test split. Dataset and runs are
written to FOLDER; a run that is there already is not repeated.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from flipped_labels import SOURCE, write_idx

from resnext_hub.cli.main import main as run_command
from resnext_hub.record import RunRecord

RATIO = 100

FLAGS = (
    "--model", "test_resnet", "--image-size", "32", "--epochs", "6", "--eval-every", "3", "--scale", "0.6", "1",
    "--label-smoothing", "0", "--warmup-epochs", "0.5", "--threads", "1", "--best-by", "macro-recall",
)  # fmt: skip

CORRECTIONS = {
    "none": (),
    "balanced sampling": ("--sampling", "balanced"),
    "logit adjustment": ("--logit-adjustment", "1"),
    "class weights": ("--class-weights", "auto"),
}


def tail_of(labels: np.ndarray, ratio: float) -> np.ndarray:
    """Return the rows that remain in a long tail: of class k of n, the first `ratio` ** (-k / (n - 1))."""
    classes = int(labels.max()) + 1
    kept = [
        np.flatnonzero(labels == label)[: round((labels == label).sum() * ratio ** (-label / (classes - 1)))]
        for label in range(classes)
    ]
    return np.sort(np.concatenate(kept))


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes in the format of MNIST, compressed."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">u4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def write_tail(folder: Path) -> Path:
    """Write the dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        images, labels = (read_idx(SOURCE / f"{split}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
        rows = tail_of(labels, RATIO) if split == "train" else np.arange(len(labels))
        write_idx(folder / f"{split}-images-idx3-ubyte", images[rows])
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels[rows])
    return folder


def main() -> None:
    """Train all runs, and print macro recall, and accuracy if the test images were as imbalanced as the training."""
    folder, seeds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    data = write_tail(folder / "fashion-tail")
    for name, flags in CORRECTIONS.items():
        rows = []
        for seed in range(seeds):
            run = folder / f"{name.replace(' ', '-')}-{seed}"
            words = ["train", "--dataset", str(data), *FLAGS, *flags, "--seed", str(seed), "--output-dir", str(run)]
            if run_command(words):
                sys.exit(1)
            record = RunRecord.load(run / "record.json")
            matrix, counts = record.evaluation.matrix, np.array(record.dataset.train_counts)
            recalls = matrix.diagonal() / matrix.sum(axis=1)
            rows.append((recalls.mean(), recalls[-3:].mean(), (recalls * counts).sum() / counts.sum()))
        mean = 100 * np.mean(rows, axis=0)
        each = " ".join(f"{100 * macro:.2f}" for macro, *_ in rows)
        print(
            f"{name}: macro recall {mean[0]:.2f} % ({each}), three rarest classes {mean[1]:.2f} %, "
            f"accuracy with the classes as frequent as in training {mean[2]:.2f} %"
        )


if __name__ == "__main__":
    main()
