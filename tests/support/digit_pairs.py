"""Images with several labels: two handwritten digits side by side, labeled with both."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 16
"""Height and width of an image in pixels; a digit has half of each."""


def digit_pairs(count: int, seed: int) -> tuple[list[Image.Image], list[list[int]]]:
    """Return images and their labels in ascending order: two digits, or one that occurs twice."""
    from sklearn.datasets import load_digits

    digits, targets = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(count):
        canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
        chosen = generator.integers(len(digits), size=2)
        for place, index in enumerate(chosen):
            top, left = int(generator.integers(SIDE // 2 + 1)), place * SIDE // 2
            canvas[top : top + 8, left : left + 8] = (digits[index].reshape(8, 8) * 255 / 16).astype(np.uint8)
        images.append(Image.fromarray(canvas))
        labels.append(sorted({int(targets[index]) for index in chosen}))
    return images, labels


def encoded(image: Image.Image) -> bytes:
    """Return an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(folder: Path, counts: dict[str, int], names: bool = True) -> Path:
    """Write a parquet file per split, with labels as lists of names such as `d3`, or of numbers."""
    import datasets

    for seed, (split, count) in enumerate(counts.items()):
        images, labels = digit_pairs(count, seed)
        rows: dict[str, Any] = {
            "image": [{"bytes": encoded(image), "path": None} for image in images],
            "labels": [[f"d{label}" for label in own] for own in labels] if names else labels,
        }
        kind = datasets.Value("string" if names else "int64")
        features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(kind)})
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
