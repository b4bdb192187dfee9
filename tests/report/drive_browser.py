"""Drives a headless Chromium (QtWebEngine) for tests: commands as JSON lines on stdin, one JSON answer each on stdout.

    {"open": PATH, "size": [W, H]}  loads a file or a chrome:// page; answers {"ok": true} once it is loaded
    {"js": TEXT}                    evaluates an expression; answers {"value": ...}
    {"click": [X, Y]}               the real mouse, in pixels of the page's viewport; {"move": ..} hovers
    {"keys": TEXT}                  types; {"key": "Tab"} presses one named key
    {"shot": PATH}                  writes a PNG of what is visible
    {"log": true}                   answers {"console": [...], "requests": [...]} since the start

With `--dark` pages see a dark desktop. A process of its own, so that a browser that dies takes no test run with it.
Where a library is missing it says which and exits with 3.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["QT_QPA_PLATFORM"] = "offscreen"
# The sandbox needs rights that containers and root lack; the pages are our own.
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"
FLAGS = "--no-sandbox --disable-gpu --disable-dev-shm-usage"
DARK = "--blink-settings=preferredColorScheme=0"  # what a page sees of a dark desktop
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = f"{FLAGS} {DARK}" if "--dark" in sys.argv else FLAGS

try:
    from PySide6.QtCore import QEventLoop, QPoint, Qt, QTimer, QUrl
    from PySide6.QtTest import QTest
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication
except ImportError as missing:
    print(missing, file=sys.stderr)
    sys.exit(3)


class Requests(QWebEngineUrlRequestInterceptor):
    """Notes what the page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def interceptRequest(self, info: Any) -> None:
        self.urls.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    """Notes what the page writes to its console, errors included."""

    console: list[str]

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.console.append(f"{level.name}: {message} (line {line})")


class Driver:
    def __init__(self) -> None:
        self.app = QApplication([sys.argv[0]])
        self.view = QWebEngineView()
        self.page = Page(self.view)
        self.page.console = []
        self.requests = Requests()
        self.page.profile().setUrlRequestInterceptor(self.requests)
        self.view.setPage(self.page)

    def wait(self, start: Any, seconds: float = 30.0) -> Any:
        """Calls `start(done)` and runs Qt until done(value) is called; the value."""
        loop, got = QEventLoop(), []

        def done(value: Any = None) -> None:
            got.append(value)
            loop.quit()

        QTimer.singleShot(int(seconds * 1000), loop.quit)
        start(done)
        if not got:
            loop.exec()
        if not got:
            raise TimeoutError(f"no answer within {seconds} s")
        return got[0]

    def settle(self, seconds: float = 0.12) -> None:
        """Lets the page draw."""
        self.wait(lambda done: QTimer.singleShot(int(seconds * 1000), done))

    def script(self, text: str) -> Any:
        return self.wait(lambda done: self.page.runJavaScript(text, 0, done))

    def resize(self, width: int, height: int) -> None:
        """The page that is open learns of it before the next one is loaded: on a busy machine it would be late, and
        move what that one has drawn."""
        self.view.resize(width, height)
        self.view.show()
        end = time.monotonic() + 30
        while self.script("innerWidth") != width:
            if time.monotonic() > end:
                raise TimeoutError(f"the page is not {width} pixels wide within 30 s")
            self.settle(0.02)

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        target = self.view.focusProxy()
        match command:
            case {"open": str(path)}:
                self.resize(*command.get("size", (1280, 900)))

                def start(done: Any) -> None:
                    self.page.loadFinished.connect(done, Qt.ConnectionType.SingleShotConnection)
                    self.page.load(QUrl(path) if path.startswith("chrome://") else QUrl.fromLocalFile(path))

                ok = self.wait(start)
                self.settle()
                return {"ok": ok}
            case {"js": str(text)}:
                script = (
                    f"(() => {{ try {{ return JSON.stringify({{value: ({text})}}) }}"
                    " catch (e) { return JSON.stringify({error: String(e)}) } })()"
                )
                answer: dict[str, Any] = json.loads(self.script(script))
                return answer
            case {"click": [x, y]}:
                QTest.mouseClick(target, Qt.MouseButton.LeftButton, pos=QPoint(round(x), round(y)))
            case {"move": [x, y]}:
                QTest.mouseMove(target, QPoint(round(x), round(y)))
            case {"keys": str(text)}:
                QTest.keyClicks(target, text)
            case {"key": str(name)}:
                QTest.keyClick(target, getattr(Qt.Key, f"Key_{name}"))
            case {"shot": str(path)}:
                self.settle(0.3)
                return {"ok": self.view.grab().save(path)}
            case {"log": _}:
                return {"console": self.page.console, "requests": self.requests.urls}
            case _:
                return {"error": f"no such command: {command}"}
        self.settle()
        return {"ok": True}


def main() -> None:
    driver = Driver()
    for line in sys.stdin:
        try:
            answer = driver.run(json.loads(line))
        except TimeoutError as late:
            answer = {"error": str(late)}
        print(json.dumps(answer), flush=True)
    driver.view.deleteLater()


main()
