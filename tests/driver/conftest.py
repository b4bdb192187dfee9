"""Lets the tests of this folder import `sample_manifest` from tests/artifact, and `other_user` from here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))
sys.path.insert(0, str(Path(__file__).parent))
