"""``python -m panda``."""

import sys

from panda.cli.main import main

sys.exit(main())
