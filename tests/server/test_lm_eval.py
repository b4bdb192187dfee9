"""lm-evaluation-harness on a running server: log-likelihoods over `local-completions`, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# No context ends in a space: the harness moves those into the continuation, where tokenizers want them.
CASES = [
    ("import os\nimport", " sys\n"),
    ("import os\nimport", " zebra\n"),
    ("def f(self):\n    return", " self"),
    ("for i in range(", "10):"),
    ("class A:\n    def __init__(self", "):\n        pass"),
    ("x = [1, 2, 3", "]\n"),
    ("if x is not None", ":\n"),
    ("héllo = '", "wörld'"),
]


def test_loglikelihoods_are_those_of_transformers(real_server: Any) -> None:
    lm_eval = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    lm = lm_eval.LocalCompletionsAPI(
        base_url=real_server.url + "/v1/completions",
        model="bundled",
        tokenizer_backend="auto",  # finds our /tokenizer_info and /tokenize
        max_length=512,
        batch_size=3,
    )
    assert lm.tokenizer_backend == "remote"
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=case, idx=i) for i, case in enumerate(CASES)]
    got = lm.loglikelihood(requests, disable_tqdm=True)
    want = reference(CASES)
    for (score, greedy), (expected, expected_greedy, margin) in zip(got, want, strict=True):
        assert score == pytest.approx(expected, abs=0.15, rel=0.02)  # our bf16 against float32
        if margin > 0.1:
            assert greedy == expected_greedy


def reference(cases: list[tuple[str, str]]) -> list[tuple[float, bool, float]]:
    """(log-likelihood, whether greedy, smallest gap between the two best) by transformers in float32."""
    import torch
    import transformers

    bundled = Path(__file__).resolve().parents[2] / "models" / "bundled"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32)
    out = []
    for context, continuation in cases:
        whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        score, greedy, margin = 0.0, True, float("inf")
        for at in range(start, len(whole)):
            row = logprobs[at - 1]
            top = row.topk(2).values
            score += float(row[whole[at]])
            greedy = greedy and int(row.argmax()) == whole[at]
            margin = min(margin, float(top[0] - top[1]))
        out.append((score, greedy, margin))
    return out
