"""Try a trained model on a page: `python scripts/demo.py runs/NAME`."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
