"""Examine a dataset before training: `python scripts/check.py path/to/images`."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
