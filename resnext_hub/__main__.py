"""`python -m resnext_hub …` and `accelerate launch -m resnext_hub train …`."""

import sys

from resnext_hub.cli.main import main

sys.exit(main())
