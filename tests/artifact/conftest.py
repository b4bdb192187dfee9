"""Lets the tests of this folder import `sample_manifest`, and `toy_artifact` from tests/runtime."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
