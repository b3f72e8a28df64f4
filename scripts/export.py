"""Write a trained network for another runtime: `python scripts/export.py runs/NAME --format onnx`."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
