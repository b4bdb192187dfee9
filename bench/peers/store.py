"""The record of a run: samples by peer, format and row, limits by round, and what is absent and why. One JSON file.

Written after every sample, whole and at once, so that a run can be broken off anywhere and taken up again.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

CLEAN = 0.15
"""CPU cores that others may have used during a sample that counts as undisturbed."""


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages * size / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


class Store:
    """The record, in memory and in its file. Keys of samples are peer, format, row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "machine": machine(),
            "threads": 0,
            "limits": [],
            "samples": {},
            "absent": {},
            "failures": {},
            "versions": {},
            "labels": {},
            "how": {},
        }
        if path.exists():
            self.data.update(json.loads(path.read_text()))

    def save(self) -> None:
        """Write the file, or leave the one that was there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.data, indent=1) + "\n")
        draft.replace(self.path)

    def _place(self, kind: str, peer: str, form: str) -> dict[str, Any]:
        place: dict[str, Any] = self.data[kind].setdefault(peer, {}).setdefault(form, {})
        return place

    def samples(self, peer: str, form: str, row: str) -> list[dict[str, Any]]:
        """All samples of a row, oldest first."""
        found: list[dict[str, Any]] = self.data["samples"].get(peer, {}).get(form, {}).get(row, [])
        return found

    def add(self, peer: str, form: str, row: str, sample: dict[str, Any]) -> None:
        """One more; a failure of the row that was noted before is forgotten."""
        self._place("samples", peer, form).setdefault(row, []).append(sample)
        self.data["failures"].get(peer, {}).get(form, {}).pop(row, None)
        self.save()

    def fail(self, peer: str, form: str, row: str, why: str) -> None:
        """The row could not be measured."""
        self._place("failures", peer, form)[row] = why
        self.save()

    def failure(self, peer: str, form: str, row: str) -> str | None:
        """Why the row has no figure, if that is known."""
        absent: str | None = self.data["absent"].get(peer, {}).get(form)
        why: str | None = self.data["failures"].get(peer, {}).get(form, {}).get(row)
        return absent or why

    def absent(self, peer: str, form: str, why: str | None) -> None:
        """The peer has no such format here, or (None) has one after all."""
        if why is None:
            self.data["absent"].get(peer, {}).pop(form, None)
        else:
            self.data["absent"].setdefault(peer, {})[form] = why
        self.save()

    def forget(self, peer: str) -> None:
        """Drop everything measured of a peer."""
        for kind in ("samples", "absent", "failures"):
            self.data[kind].pop(peer, None)
        self.save()

    def median(self, peer: str, form: str, row: str) -> float | None:
        """Of the undisturbed samples, or of all where there is none."""
        samples = self.samples(peer, form, row)
        clean = [s["value"] for s in samples if s["others"] <= CLEAN]
        values = clean or [s["value"] for s in samples]
        return statistics.median(values) if values else None

    def disturbed(self, peer: str, form: str, row: str) -> bool:
        """Whether no sample of the row was undisturbed."""
        samples = self.samples(peer, form, row)
        return bool(samples) and all(sample["others"] > CLEAN for sample in samples)

    def limit(self, name: str) -> float:
        """The median of a limit over all rounds: "read", "bf16" or "int8"; of undisturbed readings if there are any."""
        readings = self.data["limits"]
        values = [r[name] for r in readings if r["others"] <= CLEAN] or [r[name] for r in readings]
        return float(statistics.median(values)) if values else 0.0
