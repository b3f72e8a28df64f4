"""Measure how many planted copies `resnext-hub check` finds: `python tests/planted_twins.py`.

The images are those of Debian's package tuxpaint-stamps-default, on a white background, without those that are the
mirror image of another one; 200 copies are resized to 50-150 %, half of them mirrored, and compressed with JPEG quality
60-95.
"""

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from resnext_hub.check.survey import survey
from resnext_hub.data.config import DataConfig
from resnext_hub.data.duplicates import near_duplicates

STAMPS = Path("/usr/share/tuxpaint/stamps")
COPIES = 200
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def stamps(root: Path) -> Iterator[tuple[str, Image.Image]]:
    """Yield path and pixels of each image that is not a mirror image or of a single color."""
    for path in sorted(root.rglob("*.png")):
        if "_mirror" in path.name or "_flip" in path.name:
            continue
        image = Image.open(path).convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image)
        flat = background.convert("RGB")
        if flat.getcolors(maxcolors=1) is None:
            yield "-".join(path.relative_to(root).parts), flat


def plant(folder: Path, generator: random.Random) -> set[tuple[str, str]]:
    """Write images and copies; return the names of each pair."""
    found = list(stamps(STAMPS))
    for name, image in found:
        path = folder / name.partition("-")[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    pairs = set()
    for name, image in generator.sample(found, COPIES):
        scale = generator.uniform(0.5, 1.5)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        copy = image.resize(size, generator.choice(FILTERS))
        copy = ImageOps.mirror(copy) if generator.random() < 0.5 else copy
        twin = f"{name[:-4]}-copy.jpg"
        copy.save(folder / name.partition("-")[0] / twin, quality=generator.randint(60, 95))
        pairs.add((twin, name))
    print(f"{len(found)} images, {len(pairs)} copies")
    return pairs


def main() -> None:
    """Print recall, and the pairs that were not planted."""
    with tempfile.TemporaryDirectory() as place:
        planted = plant(Path(place), random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
        start = time.perf_counter()
        surveyed = survey(DataConfig(dataset=place))
        names = [facts.name.rpartition("/")[2] for facts in surveyed.images]
        pairs = {tuple(sorted((names[i], names[j]))) for i, j in near_duplicates(surveyed)}
        seconds = time.perf_counter() - start
    planted = {(min(pair), max(pair)) for pair in planted}
    print(f"found {len(pairs & planted)} of {len(planted)} copies in {seconds:.1f} s; other pairs:")
    for pair in sorted(pairs - planted):
        print("  " + " ~ ".join(pair))


if __name__ == "__main__":
    main()
