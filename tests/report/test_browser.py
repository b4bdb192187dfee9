"""The page in a real browser: a headless Chromium loads it from its file, and a mouse and a keyboard use it.

Run by `pytest -m browser` or `make test-all`. What it needs besides the extra `browser` is in browser.py; where that is
missing these tests fail and say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from model_text import TWO_STREAMS, model_text
from watched import run_watched

from xllm_compiler.ir.loc import Loc
from xllm_compiler.passes.base import Remark
from xllm_compiler.report.page import write_report
from xllm_compiler.report.timeline import write_timeline
from xllm_compiler.targets.cpu import Cpu

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("browser") / "stderr.txt")
    yield started
    started.close()


EVIL = "<script>document.title='owned'</script><b>"


def write(path: Path, text: str, pipeline: str | None = None, title: str = "tiny") -> dict[str, Any]:
    """Writes a report and returns its data as the page has it."""
    ran = run_watched(text) if pipeline is None else run_watched(text, pipeline)
    write_report(path, ran.module, ran.history, ran.report, title, Cpu.machine, tries=ran.tries)
    blob = path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    data: dict[str, Any] = json.loads(blob)
    return data


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[tuple[Browser, dict[str, Any]]]:
    """The report of the small model, open; afterwards nothing may have been asked of the network or gone wrong."""
    path = tmp_path / "report.html"
    data = write(path, model_text())
    before = browser.tell(log=True)
    browser.open(path)
    yield browser, data
    after = browser.tell(log=True)
    assert after["console"][len(before["console"]) :] == []
    assert after["requests"][len(before["requests"]) :] == [f"file://{path}"]


Page = tuple[Browser, dict[str, Any]]


def test_every_section_has_something_to_show(page: Page, tmp_path: Path) -> None:
    browser, data = page
    assert browser.texts("h2") == [
        "Summary",
        "Graph by layer",
        "What each pass changed",
        "Memory plan",
        "Schedule",
        "Rewrites: hits and misses",
        "Cost estimates",
    ]
    assert browser.texts("nav a") == ["Summary", "Graph", "Passes", "Memory", "Timeline", "Rewrites", "Costs"]
    assert browser.js("document.title") == "tiny"
    assert browser.count("#compare tbody tr") == len(data["scenarios"]) == 3
    assert browser.count("#facts tr") == len(data["facts"])
    assert browser.texts("#layers > details > summary .name") == ["model.embed", "model.layers.0", "model", "lm_head"]
    (alike,) = browser.texts("#layers > details.alike > summary")
    assert alike.endswith("2 layers like it: model.layers.1 to model.layers.2")
    assert browser.count("#runs details.run") == sum(p["changed"] for p in data["passes"])
    assert browser.count("#memory-svg .b") == len(data["funcs"][0]["memory"]["buffers"])
    assert browser.count("#memory-svg line.peak") == 1
    assert browser.count("#timeline-svg .b") == len(data["funcs"][0]["timeline"][0]["slots"])
    assert browser.count("#costs table") == 2 and browser.count("#rewrites details.rules") >= 4
    browser.shot(tmp_path / "light.png")


def test_a_layer_opens_and_a_value_marks_its_definition_and_uses(page: Page) -> None:
    browser, data = page
    ops = data["funcs"][0]["ops"]
    assert browser.count("#graph .op") == 0, "closed layers cost nothing"
    browser.click('#layers > details[data-layer="1"] > summary')
    shown = [i for i in data["funcs"][0]["layers"][1]["ops"] if not ops[i]["weight"]]
    assert browser.js("[...document.querySelectorAll('#layers .op')].map((e) => +e.dataset.op)") == shown
    value = next(op["out"][0] for op in ops if op["op"] == "nn.add_rms_norm" or op["op"] == "nn.rms_norm")
    browser.click(f'#layers .op button[data-v="{value}"]')
    marked = "[...document.querySelectorAll('#layers .op.{}')].map((e) => +e.dataset.op)"
    assert browser.js(marked.format("def")) == [i for i, op in enumerate(ops) if value in op["out"]]
    assert browser.js(marked.format("use")) == [i for i, op in enumerate(ops) if value in op["in"] and i in shown]
    assert value in browser.texts("#value")[0] and "defined by" in browser.texts("#value")[0]
    browser.tell(key="Escape")
    assert browser.js(marked.format("def")) == [] and browser.js("document.getElementById('value').hidden") is True


def test_the_value_panel_leads_to_uses_in_closed_layers(page: Page) -> None:
    browser, data = page
    ops = data["funcs"][0]["ops"]
    browser.click('#layers > details[data-layer="0"] > summary')
    browser.click('#layers .op button[data-v="%x0"]')
    use = next(i for i, op in enumerate(ops) if "%x0" in op["in"])
    browser.click(f'#value button[data-go="{use}"]')
    assert browser.js("+document.querySelector('.op.here').dataset.op") == use
    assert browser.js("document.activeElement.className") == "info"


def test_an_op_tells_its_source_rules_and_formulas(page: Page) -> None:
    browser, data = page
    i = next(i for i, op in enumerate(data["funcs"][0]["ops"]) if op["op"] == "nn.linear_glu")
    browser.click('#layers > details[data-layer="1"] > summary')
    browser.click(f'.op[data-op="{i}"] .info')
    said = dict(zip(browser.texts(f'.op[data-op="{i}"] dt'), browser.texts(f'.op[data-op="{i}"] dd'), strict=True))
    assert said["source"] == "model.layers.0.mlp (modeling_tiny.py:33)"
    assert said["rules"] == "fuse-glu/gated-product"
    assert said["bytes"] == "448*N + 40960 = 40.4 KiB" and said["operations"] == "41280*N = 41.3 Kop"
    browser.click(f'.op[data-op="{i}"] .info')
    assert browser.count(f'.op[data-op="{i}"] dl') == 0


def test_the_filter_finds_words_anywhere_in_an_op(page: Page) -> None:
    browser, data = page
    browser.click("#filter")
    browser.tell(keys="fuse-qkv layers.2")
    ops = data["funcs"][0]["ops"]
    wanted = [
        i for i, op in enumerate(ops) if "fuse-qkv/stack-projections" in op["lineage"] and "layers.2" in op["source"]
    ]
    hits = [i for i in wanted if not ops[i]["weight"]]
    assert browser.comes("[...document.querySelectorAll('#matches .op')].map((e) => +e.dataset.op)", hits) == hits != []
    assert browser.texts("#found") == [f"{len(hits)} ops"] and browser.js("document.getElementById('layers').hidden")
    browser.click("#weights")
    assert browser.count("#matches .op") == len(wanted) > len(hits)
    browser.click("#filter")
    browser.tell(key="Escape")
    assert browser.count("#matches .op") == 0 and browser.js("document.getElementById('layers').hidden") is False


def test_a_pass_opens_its_diff(page: Page) -> None:
    browser, data = page
    run = next(p for p in data["passes"] if p["name"] == "fuse-glu")
    assert browser.count(f'details[data-run="{run["index"]}"] .diff') == 0
    browser.click(f'details[data-run="{run["index"]}"] > summary')
    lines = [kind + " " + text for s in run["sections"] for kind, text in s["lines"] if kind in "+-"]
    assert browser.texts(f'details[data-run="{run["index"]}"] :is(.add, .del)') == lines
    assert any("nn.linear_glu" in line for line in lines if line.startswith("+"))
    assert browser.texts(f'details[data-run="{run["index"]}"] h3') == ["model.layers.0, and alike in 2 other layers"]


def test_hovering_a_buffer_tells_its_lifetime_and_formulas(page: Page, tmp_path: Path) -> None:
    browser, data = page
    memory = data["funcs"][0]["memory"]
    i = max(range(len(memory["buffers"])), key=lambda n: memory["at"][0]["size"][n])
    browser.tell(move=browser.place(f'#memory-svg [data-i="{i}"]'))
    (tip,) = browser.texts("#tip")
    b = memory["buffers"][i]
    assert b["name"] in tip and b["offset"] in tip and b["size"] in tip
    assert f"in use by ops {b['start']} to {b['end']}" in tip
    browser.shot(tmp_path / "memory.png")
    browser.click("#memory-body > details > summary")
    assert browser.count("#memory-body tbody tr") == len(memory["buffers"])


def test_pictures_by_keyboard(page: Page) -> None:
    browser, data = page
    slots = data["funcs"][0]["timeline"][0]["slots"]
    browser.js("document.getElementById('timeline-svg').focus()")
    for _ in range(3):
        browser.tell(key="Right")
    op = data["funcs"][0]["ops"][slots[2][0]]
    assert browser.count("#timeline-svg .current") == 1 and op["op"] in browser.texts("#tip")[0]
    browser.tell(key="Return")
    assert browser.js("+document.querySelector('.op.here').dataset.op") == slots[2][0]


def test_zoom_keeps_the_bars(page: Page) -> None:
    browser, data = page
    bars = browser.count("#timeline-svg .b")
    width = browser.js("document.getElementById('timeline-svg').clientWidth")
    browser.click('#timeline-body [data-zoom="2"]')
    assert browser.js("document.getElementById('timeline-svg').clientWidth") > 1.9 * width
    assert browser.count("#timeline-svg .b") == bars == len(data["funcs"][0]["timeline"][0]["slots"])


def test_other_sizes_change_every_number(page: Page) -> None:
    browser, data = page
    before = browser.texts("#cards b"), browser.texts("#costs tbody td.num"), browser.texts("#memory-body .note")
    browser.click("#steps label:nth-of-type(3)")
    after = browser.texts("#cards b"), browser.texts("#costs tbody td.num"), browser.texts("#memory-body .note")
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert browser.count("#timeline-svg .b") == len(data["funcs"][0]["timeline"][2]["slots"])
    assert "N=512" in browser.texts("#timeline-body .note")[0]


def test_a_miss_shows_the_condition_that_failed(page: Page) -> None:
    browser, _ = page
    assert browser.js("document.querySelector('details[data-pass=\"fuse-add-norm\"]').open") is True
    assert any("if not isinstance(add, Add)" in text for text in browser.texts('[data-pass="fuse-add-norm"] summary'))
    browser.click('[data-pass="fuse-add-norm"] details.reason > summary')
    assert "%y0 = nn.rms_norm" in browser.texts('[data-pass="fuse-add-norm"] li')[0]


def test_streams_have_lanes_and_waits_have_arrows(browser: Browser, tmp_path: Path) -> None:
    data = write(tmp_path / "streams.html", TWO_STREAMS, "assign-streams,plan-memory")
    browser.open(tmp_path / "streams.html")
    timeline = data["funcs"][0]["timeline"][0]
    assert browser.count("#timeline-svg .b") == len(timeline["slots"])
    assert [t for t in browser.texts("#timeline-svg text") if "stream" in t or "@" in t] == timeline["streams"]
    assert browser.count("#timeline-svg .flow") == sum(slot[4] >= 0 for slot in timeline["slots"]) == 2
    browser.js("document.getElementById('timeline').scrollIntoView()")
    browser.shot(tmp_path / "streams.png")


def test_functions_are_looked_at_one_at_a_time(browser: Browser, tmp_path: Path) -> None:
    second = TWO_STREAMS[TWO_STREAMS.index("func @step") :].replace("@step", "@draft").replace("linear(%z", "linear(%x")
    data = write(tmp_path / "two.html", TWO_STREAMS + second, "assign-streams,plan-memory")
    browser.open(tmp_path / "two.html", size=[1280, 900])
    assert browser.js("document.getElementById('pick').hidden") is False and len(data["funcs"]) == 2
    assert browser.texts("#func option") == ["@step", "@draft"]
    choose = "(f => {{ f.selectedIndex = {}; f.dispatchEvent(new Event('change')) }})(document.getElementById('func'))"
    for i, (name, operand) in enumerate((("@step", "%z"), ("@draft", "%x"))):
        browser.js(choose.format(i))
        assert name in browser.texts("#model-note")[0] and browser.count("#layers .op") == 0
        browser.click("#layers details > summary")
        linear = next(n for n, op in enumerate(data["funcs"][i]["ops"]) if "%b" in op["out"])
        assert f"%b = nn.linear({operand}, %w" in browser.texts(f'.op[data-op="{linear}"]')[0]


def test_a_module_without_a_plan_says_so(browser: Browser, tmp_path: Path) -> None:
    write(tmp_path / "plain.html", model_text(1), "dce")
    browser.open(tmp_path / "plain.html")
    assert browser.texts("#memory-body") == ["The module has no memory plan: pass plan-memory was not run."]
    assert browser.texts("#runs .idle") == ["no change: 01 dce"] and browser.count("#timeline-svg .b") > 5


def test_remarks_are_misses_in_words(browser: Browser, tmp_path: Path) -> None:
    ran = run_watched(model_text(1))
    place = Loc("m.py", 9, "model.layers.0")
    ran.report.ctx.remarks.append(Remark("fuse-glu", "%p0 = t.mul", "the gate <is> a view", place))
    write_report(tmp_path / "remarks.html", ran.module, ran.history, ran.report, "tiny", Cpu.machine, tries=ran.tries)
    browser.open(tmp_path / "remarks.html")
    cells = browser.texts("#rewrites [aria-label=Remarks] td")
    assert cells == ["fuse-glu", "the gate <is> a view", "%p0 = t.mul", "model.layers.0 (m.py:9)"]


def test_markup_in_names_and_sources_is_shown_and_not_obeyed(browser: Browser, tmp_path: Path) -> None:
    write(tmp_path / "evil.html", model_text(1, file=EVIL).replace("model.embed.weight", f"model{EVIL}"), title=EVIL)
    before = len(browser.tell(log=True)["console"])
    browser.open(tmp_path / "evil.html")
    assert browser.js("document.title") == EVIL and browser.texts("h1") == [EVIL]
    browser.click('#layers > details[data-layer="0"] > summary')
    browser.click("#layers .op .info")
    assert EVIL in browser.texts("#layers dd")[0]
    assert browser.count("b:not(.code):not(.card b):not(#tip b)") == 0, "an element that the page did not make"
    assert browser.js("document.title") == EVIL and browser.tell(log=True)["console"][before:] == []


def test_dark_follows_the_system(browser: Browser, tmp_path: Path) -> None:
    write(tmp_path / "dark.html", model_text())
    dark = Browser(tmp_path / "stderr.txt", "--dark")
    colours = []
    try:
        for b in (browser, dark):
            b.open(tmp_path / "dark.html", size=[1280, 900])
            found = b.js("(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))")
            colours += [sum(map(int, colour[4:-1].split(","))) for colour in found]
        dark.shot(tmp_path / "dark.png")
    finally:
        dark.close()
    light_paper, light_ink, dark_paper, dark_ink = colours
    assert light_paper > 700 and light_ink < 150 and dark_paper < 150 and dark_ink > 600


def test_a_narrow_window_scrolls_only_inside_pictures_and_tables(browser: Browser, tmp_path: Path) -> None:
    write(tmp_path / "narrow.html", model_text())
    browser.open(tmp_path / "narrow.html", size=[420, 800])
    assert browser.js("document.documentElement.scrollWidth") <= 420
    browser.shot(tmp_path / "narrow.png")


def test_nothing_moves_by_itself(page: Page) -> None:
    """Chromium's own measure of layout shifts, on load and when other sizes are chosen."""
    browser, _ = page
    browser.js(
        "(() => { window.moved = []; new PerformanceObserver((list) => { for (const e of list.getEntries())"
        " window.moved.push(...e.sources.map(({node, previousRect: a, currentRect: b}) => `${node?.id || node}"
        " from ${a.x},${a.y} to ${b.x},${b.y}`)) }).observe({type: 'layout-shift', buffered: true}) })()"
    )
    browser.click("#steps label:nth-of-type(2)")
    browser.click("#steps label:nth-of-type(1)")
    assert browser.js("PerformanceObserver.supportedEntryTypes.includes('layout-shift')") is True
    assert browser.js("window.moved") == []


def test_labels_can_be_read(browser: Browser, tmp_path: Path) -> None:
    """WCAG's contrast of 4.5 between each label in a picture and what it stands on, and of text on paper."""
    write(tmp_path / "page.html", model_text())
    browser.open(tmp_path / "page.html", size=[1280, 900])
    names = ["linear", "kv", "norm", "move", "math", "comm"]
    pairs = [("label", name) for name in names] + [
        ("ink", "wait"),
        ("ink", "paper"),
        ("soft", "paper"),
        ("soft", "sheet"),
    ]
    pairs += [("accent", "sheet"), ("accent", "mark"), ("paper", "hit"), ("del-ink", "del"), ("add-ink", "add")]
    read = "((s, names) => names.map((n) => s.getPropertyValue('--' + n).trim()))(getComputedStyle(document.body), {})"
    dark = Browser(tmp_path / "stderr.txt", "--dark")
    try:
        dark.open(tmp_path / "page.html")
        for b in (browser, dark):
            for front, back in pairs:
                one, other = (luminance(c) for c in b.js(read.format(json.dumps([front, back]))))
                ratio = (max(one, other) + 0.05) / (min(one, other) + 0.05)
                assert ratio >= 4.5, f"{front} on {back}: {ratio:.2f}{' in the dark' if b is dark else ''}"
    finally:
        dark.close()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rgb or #rrggbb."""
    digits = colour.removeprefix("#")
    digits = "".join(d + d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.slow
def test_a_large_model_stays_quick(browser: Browser, tmp_path: Path) -> None:
    """Two thousand ops: drawn within a second, filtered within a fifth of one. Generous: the machine has neighbours."""
    data = write(tmp_path / "large.html", model_text(80), "dce")
    assert len(data["funcs"][0]["ops"]) > 2000
    browser.open(tmp_path / "large.html")
    drawn = browser.js("performance.getEntriesByType('navigation')[0].domComplete")
    assert drawn < 1000, f"{drawn:.0f} ms until the page stood"
    start = "(() => { const t = performance.now(); document.getElementById('filter').value = 'bf16';"
    took = browser.js(start + "document.getElementById('weights').click(); return performance.now() - t })()")
    assert browser.count("#matches .op") == 500 and took < 400, f"{took:.0f} ms to filter"


READ_TRACE = """(() => {
  const model = new tr.Model();
  new tr.importer.Import(model, new tr.importer.ImportOptions()).importTraces([%s]);
  return {
    warnings: model.importWarnings.map((w) => w.message),
    processes: model.getAllProcesses().map((p) => p.name),
    threads: model.getAllThreads().map((t) => [t.name, t.sliceGroup.slices.length]),
    counters: model.getAllCounters().map((c) => [c.name, c.numSamples]),
    arrows: model.flowEvents.map((f) => [f.startSlice.title, f.endSlice.title]),
    milliseconds: model.bounds.max - model.bounds.min,
  };
})()"""


def test_chromiums_trace_viewer_reads_a_timeline(browser: Browser, tmp_path: Path) -> None:
    """chrome://tracing is part of the browser: its importer makes its model of our events."""
    ran = run_watched(TWO_STREAMS, "assign-streams,plan-memory")
    write_timeline(tmp_path / "t.json", ran.module, Cpu.machine, dims={"N": 64})
    text = (tmp_path / "t.json").read_text(encoding="utf-8")
    events = json.loads(text)["traceEvents"]
    browser.open("chrome://tracing")
    model = browser.js(READ_TRACE % json.dumps(text))
    last = max(e["ts"] + e.get("dur", 0) for e in events if e["ph"] == "X")
    assert model.pop("milliseconds") == pytest.approx(last / 1000)
    assert model == {
        "warnings": [],
        "processes": ["@step, one of 4 equal ranks"],
        "threads": [["stream 0", 4], ["stream 1", 1], ["link @tp", 1]],
        "counters": [["arena bytes in use", sum(e["ph"] == "C" for e in events)]],
        "arrows": [["nn.linear %a", "sched.wait"], ["comm.all_reduce_start %f", "comm.wait %c"]],
    }
