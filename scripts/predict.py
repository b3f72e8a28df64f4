"""Classify pictures: `python scripts/predict.py runs/NAME picture.jpg folder/`."""

import sys

from resnext_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
