"""What a machine can do at most: the limits that costs are held against. Targets describe theirs (`targets/`)."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.errors import XllmError


@dataclass(frozen=True, slots=True)
class Machine:
    """Limits per second, and seconds. `flops`: in the dtype of the model; `launch`: of starting one op; `link` and
    `hop`: bandwidth of one rank to its neighbours, in one direction, and the time of one message."""

    name: str
    flops: float
    bandwidth: float
    launch: float
    link: float = 1e9
    hop: float = 1e-5

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth", "link"):
            if not getattr(self, field) > 0:
                raise XllmError("option", f"machine {self.name}: {field} is {getattr(self, field)}, not above 0")
        if self.launch < 0 or self.hop < 0:
            raise XllmError("option", f"machine {self.name}: a time is negative")
