"""`python -m evomerge` runs the command `evomerge`."""

import sys

from evomerge.cli import main

sys.exit(main())
