"""docs/serving.md and docs/python.md are what their programs make of the code; the ranges stated there are enforced."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import python_api
import serving

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.server import protocol


@pytest.mark.parametrize("program", [serving, python_api])
def test_a_page_is_what_the_code_makes(program: ModuleType) -> None:
    made, written = program.page().splitlines(), program.PAGE.read_text(encoding="utf-8").splitlines()
    differing = [pair for pair in zip(written, made, strict=False) if pair[0] != pair[1]]
    assert made == written, f"run `python docs/{program.__name__}.py`; the first difference: {differing[:1]}"


def test_a_field_without_a_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = serving.inspect.getsource(protocol.DetokenizeRequest).replace('    """Token ids."""\n', "")
    monkeypatch.setattr(serving.inspect, "getsource", lambda struct: source)
    with pytest.raises(SystemExit, match=r"DetokenizeRequest\.tokens has no string"):
        serving.lines_of(protocol.DetokenizeRequest)


NUMBER = r"(-?[\d,]+(?:\.\d+)?)"
RANGES = {
    name: (bool(found[1]), float(found[2]), float(found[3]))
    for name, line in serving.lines_of(protocol.CompletionRequest).items()
    if (found := re.search(rf"(?<!\S)(Above )?{NUMBER} (?:up )?to {NUMBER}", line, re.IGNORECASE)) and name != "stop"
}


def test_most_ranges_were_read() -> None:
    assert RANGES["repetition_penalty"] == (True, 0.0, 100.0)
    assert RANGES["presence_penalty"] == (False, -2.0, 2.0)
    assert {"n", "temperature", "top_p", "min_p", "presence_penalty", "logprobs", "logit_bias"} <= set(RANGES)


@pytest.mark.parametrize("name", sorted(RANGES))
def test_a_range_is_the_one_that_is_enforced(name: str) -> None:
    above, low, high = RANGES[name]
    whole = name in ("n", "logprobs", "prompt_logprobs")

    def params(value: float) -> None:
        number = int(value) if whole else value
        SamplingParams(**{name: {1: number} if name == "logit_bias" else number})

    step = 1 if whole else 0.01
    params(high)
    params(low + step if above else low)
    for value in (high + step, low if above else low - step):
        with pytest.raises(XllmError):
            params(value)
