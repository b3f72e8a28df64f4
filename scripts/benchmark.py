"""Measure inference, training or the loader beside its peers; see --help."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
