"""The record as Markdown: ours beside the best peer and the machine's limit, then everybody, then what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peers.shape import ROWS, Row, Shape
from peers.store import Store

OURS = "xllm"
TITLES = {"bf16": "bf16", "int8": "8 bits", "int4": "4 bits"}


def limit_of(store: Store, shape: Shape, row: Row, form: str) -> float | None:
    """Tokens a second that the limits measured in this run allow."""
    if not store.data["limits"]:
        return None
    return shape.limit(row, form, store.limit("read"), store.limit("bf16"), store.limit("int8"))


def best_peer(store: Store, row: Row, form: str) -> tuple[str, float] | None:
    """The peer with the best median, ours left out."""
    found = [(peer, store.median(peer, form, row.name)) for peer in store.data["samples"] if peer != OURS]
    known = [(peer, value) for peer, value in found if value is not None]
    if not known:
        return None
    return (max if row.more_is_better else min)(known, key=lambda pair: pair[1])


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for line in lines:
        yield "| " + " | ".join(line) + " |"


def _ours_line(store: Store, shape: Shape, row: Row, form: str) -> list[str] | None:
    ours, best = store.median(OURS, form, row.name), best_peer(store, row, form)
    if ours is None and best is None:
        return None
    limit = limit_of(store, shape, row, form)
    ratio = "-"
    if ours is not None and best is not None:
        ratio = f"{ours / best[1] if row.more_is_better else best[1] / ours:.2f}"
    shown = f"{best[0]} {number(best[1])}" if best else "-"
    of_limit = [f"{value / limit:.0%}" if value is not None and limit else "-" for value in (ours, best and best[1])]
    return [f"{row.title}, {TITLES[form]}", number(limit), number(ours), of_limit[0], shown, of_limit[1], ratio]


def _everybody(store: Store, shape: Shape, form: str) -> Iterator[str]:
    peers = [peer for peer in store.data["samples"] if store.data["samples"][peer].get(form)]
    if not peers:
        return
    yield f"\n{TITLES[form]}:\n"
    lines = []
    for row in ROWS:
        cells = []
        for peer in peers:
            mark = " (c)" if row.kind != "memory" and store.disturbed(peer, form, row.name) else ""
            cells.append(number(store.median(peer, form, row.name)) + mark)
        lines.append([row.title, number(limit_of(store, shape, row, form)), *cells])
    yield from table(["", "limit", *peers], lines)


def _missing(store: Store) -> Iterator[str]:
    for peer, forms in store.data["absent"].items():
        for form, why in forms.items():
            yield f"- {peer}, {TITLES[form]}: not available: {why}"
    for peer, forms in store.data["failures"].items():
        for form, rows in forms.items():
            for why in dict.fromkeys(rows.values()):
                names = ", ".join(row for row, reason in rows.items() if reason == why)
                yield f"- {peer}, {TITLES[form]}, {names}: {why}"


def markdown(store: Store, shape: Shape) -> str:
    """The whole report."""
    machine, lines = store.data["machine"], []
    rounds = 1 + max((reading["round"] for reading in store.data["limits"]), default=-1)
    size = f"{machine['cores']} cores, {machine['memory_gb']} GB"
    lines.append(f"{machine['cpu']}, {size}; {store.data['threads']} threads")
    if rounds:
        read, bf16, int8 = (store.limit(name) / 1e9 for name in ("read", "bf16", "int8"))
        lines.append(f"Limits in this run: read {read:.1f} GB/s, bf16 {bf16:.0f} GFLOP/s, int8 {int8:.0f} GOP/s.")
        lines.append(f"Medians of {rounds} rounds.\n")
    header = ["", "limit", "ours", "of limit", "best peer", "of limit", "ratio"]
    ours = [line for row in ROWS for form in TITLES if (line := _ours_line(store, shape, row, form)) is not None]
    lines += table(header, ours)
    for form in TITLES:
        lines += _everybody(store, shape, form)
    lines.append("\n(c): other processes used the machine during every sample.\n")
    lines += _missing(store)
    lines.append("")
    for peer, how in store.data["how"].items():
        versions = ", ".join(f"{name} {version}" for name, version in store.data["versions"].get(peer, {}).items())
        labels = "; ".join(f"{TITLES[form]}: {label}" for form, label in store.data["labels"].get(peer, {}).items())
        lines.append(f"- {peer} ({versions or 'this tree'}): {how}. {labels}")
    return "\n".join(lines) + "\n"
