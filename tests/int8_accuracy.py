"""Measure what int8 costs in accuracy, and what returning layers to float32 costs in speed.

`python tests/int8_accuracy.py RUN…` quantizes the model of each run for OpenVINO twice: until at most 0.3 points of
accuracy are lost with 95 % confidence, and all layers without any limit. It prints the loss on the evaluation split,
and the speed of both files and of the one without quantization: the median of interleaved rounds on batches of 16
images.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import openvino
import torch

from resnext_hub.export.runtime import export
from resnext_hub.inference.classifier import Classifier, load
from resnext_hub.runs.calibration import prepare_int8

MAX_DROP = 0.3
BATCH_SIZE = 16
ROUNDS = 7
SECONDS = 2.0
"""Duration of the measurement of a file in a round."""


def write_files(classifier: Classifier, folder: Path) -> dict[str, Path]:
    """Write the three files, and print the accuracy of those in int8."""
    files = {"not quantized": export(classifier, "openvino", folder / "float.xml", raw=True).path}
    for name, most in (("all in int8", 100.0), (f"at most {MAX_DROP} points lost", MAX_DROP)):
        start = time.perf_counter()
        done = export(
            classifier, "openvino", folder / f"{most}.xml", int8=prepare_int8(classifier, None, most), raw=True
        )
        print(f"  {name}: {done.int8} ({time.perf_counter() - start:.0f} s)", flush=True)
        files[name] = done.path
    return files


def measured(files: dict[str, Path], pixels: np.ndarray) -> dict[str, list[float]]:
    """Return the speed of files in images per second, for each of several interleaved rounds."""
    core = openvino.Core()
    compiled = {name: core.compile_model(path, "CPU") for name, path in files.items()}
    speeds: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(ROUNDS):
        for name, model in compiled.items():
            model({0: pixels})
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < SECONDS:
                model({0: pixels})
                count += 1
            speeds[name].append(count * len(pixels) / (time.perf_counter() - start))
    return speeds


def main() -> None:
    """Print the measurements of each run."""
    torch.set_num_threads(2)
    for run in map(Path, sys.argv[1:]):
        classifier = load(run)
        print(f"{run.name}: {classifier.source.architecture}, {classifier.input.input_size[-1]} px", flush=True)
        pixels = np.random.default_rng(0).normal(size=(BATCH_SIZE, *classifier.input.input_size)).astype(np.float32)
        with tempfile.TemporaryDirectory() as scratch:
            speeds = measured(write_files(classifier, Path(scratch)), pixels)
        for name, found in speeds.items():
            median, least, most = statistics.median(found), min(found), max(found)
            print(f"  {name}: {median:.0f} images/s ({least:.0f} to {most:.0f})", flush=True)
        full, repaired = speeds["all in int8"], speeds[f"at most {MAX_DROP} points lost"]
        ratio = statistics.median(a / b for a, b in zip(repaired, full, strict=True))
        print(f"  speed relative to all in int8: {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
