"""The examples of fine-tuning with other trainers run, and what they save has the accuracy that they print."""

import re
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from PIL import Image
from pytest import fixture, mark, skip
from safetensors.torch import load_file
from support.processes import ROOT, TINY, run_process, write_images

import resnext_hub

PAGE = (ROOT / "docs" / "how-to" / "other-trainers.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGE, re.M | re.S))
RESULT = EXAMPLES.pop("Use the result")

AFTERWARDS = {
    "transformers": """
again = AutoModelForImageClassification.from_pretrained("flowers-model")
assert list(again.config.id2label.values()) == classes
assert all(map(torch.equal, again.state_dict().values(), model.cpu().state_dict().values()))
"""
}
"""What else holds after an example."""

SHADES = {"daisy": 60, "rose": 110, "tulip": 160}

pytestmark = mark.slow


@fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder `flowers`, and the run `photos-resnext_g32`, which was trained on similar images of other classes."""
    root = tmp_path_factory.mktemp("other-trainers")
    for split, count, darker in (("train", 20, 0), ("validation", 12, 7)):
        for name, shade in SHADES.items():
            write_images(root / "flowers" / split / name, count, shade - darker)
            write_images(root / "photos" / split / f"no {name}", count, shade - darker + 3)
    flags = (*TINY, "--model", "resnext26_g32", "--dataset", root / "photos", "--image-size", 32, "--batch-size", 20)
    flags += ("--max-steps", 24, "--lr", 0.01, "--eval-every", 8, "--merge-groups", "off")
    done = run_process("scripts/train.py", *flags, "--output-dir", root / "runs" / "photos-resnext_g32")
    assert done.returncode == 0, done.stderr
    return root


def test_the_page_has_an_example_for_each_trainer() -> None:
    assert list(EXAMPLES) == ["PyTorch", "Lightning", "transformers", "fastai"]


@mark.parametrize("trainer", list(EXAMPLES))
def test_an_example_fine_tunes_and_saves_a_model_that_loads_with_the_printed_accuracy(
    trainer: str, folder: Path, tmp_path: Path
) -> None:
    package = {"PyTorch": "torch"}.get(trainer, trainer.lower())
    if find_spec(package) is None:
        skip(f"{package} is not installed")
    for name in ("flowers", "runs"):
        (tmp_path / name).symlink_to(folder / name)
    Image.new("RGB", (40, 48), (110,) * 3).save(tmp_path / "rose.jpg")
    start = f"import os, torch, resnext_hub; os.chdir({str(tmp_path)!r}); torch.manual_seed(0)\n"
    done = run_process("-c", start + EXAMPLES[trainer] + RESULT + AFTERWARDS.get(trainer, ""))
    assert done.returncode == 0, done.stderr
    (printed,) = re.findall(r"^accuracy (\d\.\d{4})$", done.stdout, re.M)

    classifier = resnext_hub.load(tmp_path / "flowers-model")
    assert list(classifier.label_names) == sorted(SHADES)
    paths = sorted((folder / "flowers" / "validation").glob("*/*.png"))
    right = [
        prediction.guesses[0].label == path.parent.name
        for prediction, path in zip(classifier.predict(paths), paths, strict=True)
    ]
    assert f"{sum(right) / len(right):.4f}" == printed
    before = load_file(folder / "runs" / "photos-resnext_g32" / "model" / "model.safetensors")
    after = load_file(tmp_path / "flowers-model" / "model.safetensors")
    assert not torch.equal(before["layer1.0.conv2.weight"], after["layer1.0.conv2.weight"])  # all layers were trained
    model = timm.create_model(f"local-dir:{tmp_path / 'flowers-model'}", pretrained=True)
    assert (model.num_classes, list(model.pretrained_cfg["input_size"])) == (3, [3, 32, 32])
