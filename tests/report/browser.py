"""A headless Chromium for tests, in a process of its own (drive_browser.py), and how to talk to it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

NEEDED = (
    "The browser tests need PySide6-WebEngine (pip install -e '.[browser]') and the libraries that Chromium is linked "
    "with. On Debian 12: apt-get install libnss3 libegl1 libgl1 libgbm1 libxkbcommon0 libxkbfile1 libxcomposite1 "
    "libxdamage1 libxrandr2 libxtst6 libasound2 libdbus-1-3 libfontconfig1 libglib2.0-0 libgssapi-krb5-2 libudev1"
)

DRIVER = Path(__file__).parent / "drive_browser.py"


class Browser:
    """A headless Chromium in a process of its own, and how to talk to it."""

    def __init__(self, log: Path, *flags: str, python: Sequence[str] = (sys.executable,)) -> None:
        self.log = log
        self._errors = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [*python, str(DRIVER), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def tell(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait(timeout=20)
            said = self.log.read_text(encoding="utf-8")
            pytest.fail(f"the browser ended with {self._process.returncode}:\n{said}\n{NEEDED}", pytrace=False)
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, f"{command}: {answer['error']}"
        return answer

    def open(self, path: Path | str, **how: Any) -> None:
        assert self.tell(open=str(path), **how) == {"ok": True}

    def js(self, expression: str) -> Any:
        return self.tell(js=expression).get("value")

    def comes(self, expression: str, expected: Any, seconds: float = 20.0) -> Any:
        """The value of an expression once it is `expected`, or what it still is after `seconds`: for what the page puts
        off until nobody types any more."""
        end = time.monotonic() + seconds
        while (value := self.js(expression)) != expected and time.monotonic() < end:
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """A real click on the middle of the first such element, which is scrolled to before."""
        self.tell(click=self.place(selector))

    def place(self, selector: str) -> list[float]:
        where = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.left + r.width / 2, r.top + r.height / 2] })()"
        )
        assert where is not None, f"nothing on the page is {selector}"
        return list(where)

    def texts(self, selector: str) -> list[str]:
        return list(self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"))

    def count(self, selector: str) -> int:
        return int(self.js(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def shot(self, path: Path) -> None:
        assert self.tell(shot=str(path)) == {"ok": True}
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._errors.close()
