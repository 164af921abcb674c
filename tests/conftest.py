"""Lets every test import what tests share, `small`, wherever it stands, and keeps timing out of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("myriad", deadline=None)  # how long an example takes says something about the machine, not about the code
settings.load_profile("myriad")
