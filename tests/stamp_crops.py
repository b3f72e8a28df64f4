"""Write 10,000 JPEG files to time `resnext-hub check` on: `python tests/stamp_crops.py FOLDER`.

They are random crops of the images of `planted_twins.py`, enlarged to about 500 x 375 pixels, in one folder per topic.
"""

import random
import sys
from pathlib import Path

from PIL import Image
from planted_twins import STAMPS, stamps

COUNT = 10_000


def main() -> None:
    """Write the files."""
    generator = random.Random(0)
    found = list(stamps(STAMPS))
    for index in range(COUNT):
        name, image = found[index % len(found)]
        width, height = (max(1, round(side * generator.uniform(0.4, 0.9))) for side in image.size)
        left, top = generator.randint(0, image.width - width), generator.randint(0, image.height - height)
        size = (generator.randint(450, 550), generator.randint(340, 410))
        crop = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
        path = Path(sys.argv[1]) / name.partition("-")[0] / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, quality=generator.randint(75, 95))


if __name__ == "__main__":
    main()
