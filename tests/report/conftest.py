"""What the tests of this folder share: the small model, through its pipeline."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from model_text import model_text
from watched import Ran, run_watched


@pytest.fixture(scope="session")
def ran() -> Ran:
    return run_watched(model_text())
