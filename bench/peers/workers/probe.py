"""The limits of the machine, in a process of their own, so that their buffers are nobody else's memory."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from limits import Probe


def main() -> None:
    """Answer until stdin closes."""
    probe = Probe(int(json.loads(sys.argv[1])["threads"]))
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        answer = {"read": statistics.median(probe.read_bandwidth() for _ in range(5))}
        for name in ("bf16", "int8"):
            answer[name] = statistics.median(probe.arithmetic(f"{name}_dots") for _ in range(3))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
