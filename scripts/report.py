"""Draw all plots of a run, and a page that shows them: `python scripts/report.py runs/NAME`."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
