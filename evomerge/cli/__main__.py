import sys

from evomerge.cli.entry import main

sys.exit(main())
