"""Run several commands one after the other in each process of one launcher, which starts only once for all of them.

Usage: `LAUNCHER tests/support/runs_in_a_row.py COMMANDS`, where COMMANDS is a JSON list of lists of words.
"""

import json
import sys

from accelerate.state import AcceleratorState, GradientState

from resnext_hub.cli.main import main

for words in json.loads(sys.argv[1]):
    code = main(words)
    if code:
        sys.exit(code)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
