"""The whole of it: `bench/hostile.py` finds no request that costs others more than it may."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_hostile_requests_cost_others_nothing(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    kept = pytestconfig.cache
    work = kept.mkdir("hostile") if kept is not None else tmp_path
    command = [sys.executable, str(ROOT / "bench" / "hostile.py"), "--quick", "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
