"""Classify images: `python scripts/predict.py runs/NAME image.jpg folder/`."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
