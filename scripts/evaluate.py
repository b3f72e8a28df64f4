"""Evaluate a run again: `python scripts/evaluate.py runs/NAME`."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
