"""Train a model: `accelerate launch scripts/train.py [flags]`."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
