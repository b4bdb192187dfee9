"""The page without a browser: self-contained, escaped, deterministic, and its data right."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from model_text import TWO_STREAMS, model_text
from watched import Ran, run_watched

from xllm_compiler.analysis.cost import Costs
from xllm_compiler.analysis.simulate import simulate
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.instruments import History
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.report.data import report_data
from xllm_compiler.report.page import ReportPage, page, write_report
from xllm_compiler.report.sizes import complete, scenarios
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.testing.corpus import entry

CPU = Cpu.machine
SECTIONS = ["summary", "graph", "passes", "memory", "timeline", "rewrites", "costs"]


class Reader(html.parser.HTMLParser):
    """Collects the elements, and the text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style", "title"):
            self.inside.append((self._open, data))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def data_of(ran: Ran, title: str = "tiny", **more: Any) -> dict[str, Any]:
    return report_data(ran.module, ran.history, ran.report, title, CPU, tries=ran.tries, **more)


def test_the_page_needs_nothing_but_itself(ran: Ran) -> None:
    text = page(data_of(ran))
    read = Reader(text)
    assert [a["id"] for tag, a in read.elements if tag == "section"] == SECTIONS
    for tag, attrs in read.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert "src" not in attrs and "style" not in attrs and not any(k.startswith("on") for k in attrs), attrs
        assert attrs.get("href", "#").startswith("#"), attrs
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "") and "https:" not in text
    for banned in ("@import", "url(", "fetch(", "XMLHttpRequest", "innerHTML", "insertAdjacentHTML", "eval("):
        assert banned not in text, banned


def test_the_policy_names_the_script_and_the_style_that_are_there(ran: Ran) -> None:
    read = Reader(page(data_of(ran)))
    policy = next(a["content"] for tag, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    style = next(text for tag, text in read.inside if tag == "style")
    script = [text for tag, text in read.inside if tag == "script"][-1]

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert policy == f"default-src 'none'; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'"


def test_what_the_script_reads_of_the_data_is_there(ran: Ran) -> None:
    """A key that is renamed on one side only leaves the page empty, which otherwise only a browser sees."""
    data = data_of(ran)
    script = [text for tag, text in Reader(page(data)).inside if tag == "script"][-1]
    read = set(re.findall(r"\bdata\.(\w+)", script))
    assert {"facts", "funcs", "scenarios"} <= read <= set(data), read - set(data)


EVIL = "</script><script>alert(1)</script><!--<b>{{script}}\u2028"


def test_text_from_files_stays_text() -> None:
    """A loc, a parameter's name, a title: none of them may open an element or end the data."""
    source = model_text(1, file=EVIL).replace("model.embed.weight", f"model.embed{EVIL}")
    ran = run_watched(source)
    clean, dirty = (Reader(page(data_of(r, title))) for r, title in ((run_watched(model_text(1)), "tiny"), (ran, EVIL)))
    assert [tag for tag, _ in dirty.elements] == [tag for tag, _ in clean.elements]
    data = json.loads(next(text for tag, text in dirty.inside if tag == "script"))
    assert data["title"] == EVIL
    assert data["funcs"][0]["ops"][1]["source"] == f"model.embed ({EVIL}:6)"
    assert json.dumps(f"model.embed{EVIL}", ensure_ascii=False) in data["funcs"][0]["ops"][0]["text"]
    assert [text for tag, text in dirty.inside if tag == "title"] == [EVIL]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        module = parse_module(model_text(), "model.xir")
        watch = ReportPage(tmp_path / f"{name}.html", "tiny", CPU, dims={"N": 5, "B": 2})
        run_pipeline(
            "fuse-glu,dce,assign-streams,plan-memory",
            module,
            PassContext(listeners=[watch.tries]),
            instruments=[watch],
        )
    written = (tmp_path / "a.html").read_bytes()
    assert written == (tmp_path / "b.html").read_bytes() and b"seconds" not in written.split(b'id="data">')[1][:200_000]
    assert b"as asked" in written


def test_layers_that_are_alike_are_known(ran: Ran) -> None:
    func = data_of(ran)["funcs"][0]
    layers = {x["name"]: (len(x["ops"]), func["layers"][x["same"]]["name"]) for x in func["layers"]}
    count = layers["model.layers.0"][0]
    assert count > 10
    assert layers["model.layers.1"] == layers["model.layers.2"] == (count, "model.layers.0")
    assert list(layers) == ["model.embed", "model.layers.0", "model.layers.1", "model.layers.2", "model", "lm_head"]
    assert sorted(i for x in func["layers"] for i in x["ops"]) == list(range(len(func["ops"])))


def test_an_op_carries_what_the_page_shows(ran: Ran) -> None:
    func = data_of(ran)["funcs"][0]
    i, op = next((i, x) for i, x in enumerate(func["ops"]) if x["op"] == "nn.linear_glu")
    assert op["text"].startswith("%p0 = nn.linear_glu(%m0, %concat") and op["types"] == ["bf16[N, 160]"]
    assert (op["out"], op["source"]) == (["%p0"], "model.layers.0.mlp (modeling_tiny.py:33)")
    assert op["lineage"] == ["fuse-glu/gated-product"] and not op["weight"]
    assert op["formulas"] == ["448*N + 40960", "41280*N", "0"]
    cost = func["costs"][0]
    assert (cost["bytes"][i], cost["flops"][i], cost["limit"][i]) == (448 + 40960, 41280, "memory")
    weight = next(x for x in func["ops"] if x["op"] == "t.concat")
    assert weight["weight"] and weight["formulas"] == []


def test_memory_is_the_plan_at_each_size(ran: Ran) -> None:
    data = data_of(ran, dims={"N": 100, "B": 4})
    func, memory = data["funcs"][0], data["funcs"][0]["memory"]
    assert data["scenarios"][0]["name"] == "as asked" and data["scenarios"][0]["dims"]["N"] == 100
    for at, total in zip(memory["at"], func["totals"], strict=True):
        spans = [
            (b["start"], b["end"], o, o + s)
            for b, o, s in zip(memory["buffers"], at["offset"], at["size"], strict=True)
        ]
        assert max(end for *_, end in spans) <= total["arena"] and at["peak"] <= total["arena"]
        for n, (a, z, lo, hi) in enumerate(spans):
            for b, y, other_lo, other_hi in spans[:n]:
                assert z < b or y < a or hi <= other_lo or other_hi <= lo, "two buffers in use at the same bytes"
        in_use = sum(hi - lo for a, z, lo, hi in spans if a <= at["peak_at"] <= z)
        assert in_use == at["peak"]


def test_a_buffer_lives_until_the_last_reader_of_a_view(ran: Ran) -> None:
    """%a0 is read by nobody but the projection of its reshape."""
    func = data_of(ran)["funcs"][0]
    ops = func["ops"]
    buffer = next(b for b in func["memory"]["buffers"] if b["name"] == "%a0")
    view, reader = (next(i for i, op in enumerate(ops) if name in op["in"]) for name in ("%a0", "%f0"))
    assert (buffer["end"], buffer["users"]) == (reader, [buffer["start"], view, reader])
    assert (ops[view]["op"], ops[reader]["op"]) == ("t.reshape", "nn.linear")


def test_timeline_rows_are_the_simulated_slots() -> None:
    ran = run_watched(TWO_STREAMS, "assign-streams,plan-memory")
    func, steps = data_of(ran)["funcs"][0], scenarios(ran.module)
    slots = simulate(ran.module.func(), steps[0].dims, CPU)
    t = func["timeline"][0]
    assert t["streams"] == ["stream 0", "stream 1", "link @tp"] and len(t["slots"]) == len(slots)
    waits = {func["ops"][t["slots"][i][0]]["op"]: t["slots"][i] for i in t["waits"]}
    assert set(waits) == {"sched.wait", "comm.wait"}
    assert func["ops"][t["slots"][waits["comm.wait"][4]][0]]["op"] == "comm.all_reduce_start"
    assert func["ops"][t["slots"][waits["sched.wait"][4]][0]]["op"] == "nn.linear"


def test_totals_are_the_cost_model(ran: Ran) -> None:
    data, costs = data_of(ran), Costs(ran.module.func())
    for step, total in zip(scenarios(ran.module), data["funcs"][0]["totals"], strict=True):
        assert total["flops"] == costs.total(step.dims).flops and total["weights"] == costs.total(step.dims).weights
        assert total["us"] == pytest.approx(costs.seconds(step.dims, CPU) * 1e6, abs=0.001)
        assert sum(total["spent"].values()) == pytest.approx(total["us"], abs=0.01)


def test_hits_and_misses_with_the_condition_that_failed(ran: Ran) -> None:
    rules = {r["rule"]: r for r in data_of(ran)["rules"]}
    glu = rules["fuse-glu/gated-product"]
    assert (glu["tried"], glu["fired"], glu["reasons"]) == (3, 3, [])
    norm = rules["fuse-add-norm/add-norm"]
    assert norm["fired"] == 0 and norm["file"] == "fuse_add_norm.py"
    (reason,) = norm["reasons"]
    assert reason["source"].startswith("if not isinstance(add, Add)") and reason["count"] == norm["tried"] == 6
    assert reason["examples"][0].startswith("%y0 = nn.rms_norm, model.layers.0.norm")
    assert len(reason["examples"]) == 3


def test_watching_rules_changes_nothing_and_leaves_no_trace_function() -> None:
    before = sys.gettrace()
    watched = run_watched(model_text())
    assert sys.gettrace() is before
    module, history = parse_module(model_text(), "model.xir"), History(loc=True)
    run_pipeline(
        "fuse-glu,fuse-qkv,fuse-epilogue,fuse-add-norm,dce,assign-streams,plan-memory", module, instruments=[history]
    )
    assert [text for _, text in history.texts] == [text for _, text in watched.history.texts]


def test_without_a_plan_or_passes() -> None:
    ran = run_watched(model_text(1), "dce")
    data = data_of(ran)
    assert data["funcs"][0]["memory"] is None and data["funcs"][0]["totals"][0]["arena"] is None
    assert [p["changed"] for p in data["passes"]] == [False] and data["rules"] == []
    none = run_watched(model_text(1), "")
    assert data_of(none)["passes"] == []


def test_sizes() -> None:
    module = parse_module(model_text(1), "m.xir")
    assert complete(module, {"N": 20, "B": 3}) == {"N": 20, "B": 3, "S": 3, "P": 3, "context": 0}
    assert complete(entry("written/mesh").module(), {}).keys() == {"N"}, "a rank dim is no size"
    assert complete(module, {"N": 20, "context": 5000})["context"] == 1024 - 20, "a request is no longer than its table"
    assert [s.name for s in scenarios(module)] == ["decode, 1 request", "decode, 8 requests", "prefill, 512 tokens"]
    small = parse_module(model_text(1).replace("dim N in [1, 512]", "dim N in [1, 8]"), "m.xir")
    assert [s.name for s in scenarios(small)] == ["decode, 1 request", "decode, 8 requests"]
    other = parse_module(
        "xir 1 stage=graph\ndim M in [8, 48] % 8\nfunc @f(%x: f32[M]) -> (f32[M]) {\n  return %x\n}\n", "m.xir"
    )
    assert [(s.name, s.dims["M"]) for s in scenarios(other)] == [("sizes", 48)]


@pytest.mark.parametrize(
    ("dims", "message", "help"),
    [
        ({"N": 0}, "N=0 is out of range", "N is in [1, 512]"),
        ({"Q": 1}, "the module has no dim Q", "it has N, B, S, P, context"),
        ({"context": -1}, "context=-1 is out of range", "context is in 0 or more"),
    ],
)
def test_sizes_that_make_no_sense(dims: dict[str, int], message: str, help: str) -> None:
    with pytest.raises(XllmError) as wrong:
        scenarios(parse_module(model_text(1), "m.xir"), dims)
    assert (wrong.value.message, wrong.value.help) == (message, help)


def test_a_page_that_cannot_be_written(tmp_path: Path, ran: Ran) -> None:
    with pytest.raises(XllmError, match="cannot write: Is a directory"):
        write_report(tmp_path, ran.module, ran.history, ran.report, "tiny", CPU)
