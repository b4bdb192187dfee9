"""Where there is no browser, its tests fail with what to install; they do not skip."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from browser import NEEDED, Browser


def test_a_missing_browser_is_a_failure_that_says_what_to_install(tmp_path: Path) -> None:
    python = (sys.executable, "-I", "-S")  # without installed packages
    lacking = Browser(tmp_path / "stderr.txt", python=python)
    try:
        with pytest.raises(pytest.fail.Exception) as failed:
            lacking.open("chrome://version")
    finally:
        lacking.close()
    assert str(failed.value) == f"the browser ended with 3:\nNo module named 'PySide6'\n\n{NEEDED}"
