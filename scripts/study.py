"""Compare cardinality, width and depth at controlled cost; see --help."""

import sys

from resnext_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
