"""Tests import the helpers beside this file by name, from any folder below."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# A machine that others share is slow now and then, and that is no failure.
settings.register_profile("panda", deadline=None)
settings.load_profile("panda")
