"""Progress and tables as text."""

from __future__ import annotations

import io

import pytest

from xllm_compiler.tools.console import ConsoleProgress, size, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_per_phase_when_not_a_terminal() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    with progress.phase("trace"):
        progress.advance("half", 0.5)
    progress.note("something")
    with pytest.raises(ValueError), progress.phase("lower"):
        raise ValueError
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("trace ") and lines[1] == "note: something"
    assert "\r" not in stream.getvalue()


def test_a_terminal_shows_work_in_progress() -> None:
    stream = Terminal()
    progress = ConsoleProgress(stream)
    with progress.phase("lower"):
        for i in range(1, 101):
            progress.advance("weights", i / 100)
    text = stream.getvalue()
    assert "lower ..." in text and "lower 100% weights" in text
    assert text.count("%") < 100  # not every call is worth a line


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_table_aligns() -> None:
    assert table([("a", "1"), ("bcd", "10")], right=(1,)) == "  a     1\n  bcd  10"
    assert table([]) == ""
