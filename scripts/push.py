"""Publish a run: `python scripts/push.py runs/NAME --repo-id owner/name --license apache-2.0`."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
