"""The roofline picture: one panel per format, everybody on it, as SVG that reads on dark and light pages.

Owns drawing only. Across: operations for a byte of weights, which rises from decode of one request to a long prompt.
Up: operations a second. The roof is what the machine was measured to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from peers.report import OURS, TITLES
from peers.shape import ROWS, Row, Shape
from peers.store import Store

WIDTH, HEIGHT = 960, 430
LEFT, TOP, BOTTOM, GAP = 58, 56, 96, 14
PANEL = (WIDTH - LEFT - 12 - 2 * GAP) / 3
INK = "#808890"
GRID = 'stroke="#808890" stroke-opacity="0.28"'
LOW_X, HIGH_X, LOW_Y, HIGH_Y = 0.7, 12000.0, 3.0, 2000.0
COLOURS = {
    OURS: "#e5484d",
    "llama.cpp": "#3b82f6",
    "openvino": "#16a394",
    "openvino-cb": "#72b01d",
    "onnxruntime": "#d68a00",
    "vllm": "#a855f7",
    "vllm-compile": "#c084fc",
    "transformers": "#8b6f5c",
    "transformers-compile": "#b89f8c",
}
SHORT = {"decode-1": "b1", "decode-8": "b8", "decode-32": "b32", "prefill-512": "512", "prefill-2048": "2048"}


def _x(panel: int, intensity: float) -> float:
    share = math.log(intensity / LOW_X) / math.log(HIGH_X / LOW_X)
    return LEFT + panel * (PANEL + GAP) + share * PANEL


def _y(giga: float) -> float:
    share = math.log(max(giga, LOW_Y) / LOW_Y) / math.log(HIGH_Y / LOW_Y)
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 11, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, more: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {more}/>'


def _panel(store: Store, shape: Shape, panel: int, form: str) -> Iterator[str]:
    left = LEFT + panel * (PANEL + GAP)
    yield _text(left + PANEL / 2, TOP - 14, TITLES[form], size=13, more=' font-weight="600"')
    for giga in (10, 100, 1000):
        yield _line(left, _y(giga), left + PANEL, _y(giga), GRID)
        if panel == 0:
            yield _text(left - 6, _y(giga) + 4, f"{giga:,}", "end")
    peak = store.limit("bf16" if form == "bf16" else "int8") or store.limit("bf16")
    read = store.limit("read")
    knee = peak / read
    start = max(LOW_X, LOW_Y * 1e9 / read)
    roof = [(start, read * start / 1e9), (knee, peak / 1e9), (HIGH_X, peak / 1e9)]
    points = " ".join(f"{_x(panel, x):.1f},{_y(y):.1f}" for x, y in roof)
    yield f'<polyline points="{points}" fill="none" stroke="{INK}" stroke-width="1.8"/>'
    name = "bf16 arithmetic" if form == "bf16" else "int8 arithmetic"
    yield _text(left + PANEL - 4, _y(peak / 1e9) - 6, f"{name} {peak / 1e9:,.0f} G/s", "end", 10)
    turn = math.degrees(math.atan2(_y(read / 1e9) - _y(read / 1e8), _x(panel, 10) - _x(panel, 1)))
    x, y = _x(panel, 3.2), _y(3.2 * read / 1e9) - 8
    yield _text(
        x, y, f"memory {read / 1e9:.0f} GB/s", size=10, more=f' transform="rotate({-turn:.1f} {x:.1f} {y:.1f})"'
    )
    for row in ROWS:
        if row.name in SHORT:
            yield from _column(store, shape, panel, form, row)


def _column(store: Store, shape: Shape, panel: int, form: str, row: Row) -> Iterator[str]:
    x = _x(panel, shape.intensity(row, form))
    yield _line(x, TOP, x, HEIGHT - BOTTOM, f'{GRID} stroke-dasharray="2 3"')
    yield _text(x, HEIGHT - BOTTOM + 15, SHORT[row.name], size=10)
    work = sum(shape.operations(row)) / shape.tokens(row)
    # ours last, so that it lies on top
    for peer in sorted(COLOURS, key=lambda name: name == OURS):
        value = store.median(peer, form, row.name)
        if value is None:
            continue
        radius = 5 if peer == OURS else 3.6
        title = f"{peer}, {row.title.removesuffix(', tok/s')}, {TITLES[form]}: {value:.1f} tok/s"
        yield (
            f'<circle cx="{x:.1f}" cy="{_y(value * work / 1e9):.1f}" r="{radius}" fill="{COLOURS[peer]}" '
            f'fill-opacity="0.85"><title>{escape(title)}</title></circle>'
        )


def _legend(store: Store) -> Iterator[str]:
    shown = [peer for peer in COLOURS if store.data["samples"].get(peer)]
    x, y = float(LEFT), HEIGHT - 14
    for peer in shown:
        yield f'<circle cx="{x + 5:.1f}" cy="{y - 4}" r="{5 if peer == OURS else 3.6}" fill="{COLOURS[peer]}"/>'
        yield _text(x + 14, y, peer, "start")
        x += 30 + 6.3 * len(peer)


def draw(store: Store, shape: Shape) -> str:
    """The SVG file's text."""
    axis = HEIGHT - BOTTOM + 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" fill="{INK}" role="img">',
        f"<title>Decode and prefill on {escape(store.data['machine']['cpu'])} against its limits</title>",
        _text(
            LEFT, 18, f"{store.data['machine']['cpu']}, {store.data['threads']} threads, Qwen3-0.6B shape", "start", 12
        ),
        _text(
            14,
            (TOP + HEIGHT - BOTTOM) / 2,
            "G operations/s",
            more=f' transform="rotate(-90 14 {(TOP + HEIGHT - BOTTOM) / 2})"',
        ),
        _text(
            LEFT + (WIDTH - LEFT) / 2,
            axis,
            "operations per byte of weights: decode of 1, 8, 32 requests; prefill of 512, 2,048",
        ),
    ]
    for panel, form in enumerate(TITLES):
        parts += _panel(store, shape, panel, form)
    parts += _legend(store)
    return "\n".join([*parts, "</svg>"]) + "\n"
