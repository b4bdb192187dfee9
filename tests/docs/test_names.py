"""What README, CONTRIBUTING and docs/ name exists: files, links, commands, flags, make targets, modules, variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_names import ROOT, wrong

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    path = ROOT / page
    missing = wrong(path.read_text(encoding="utf-8"), path)
    if missing:
        pytest.fail("there is no\n" + "\n".join(missing), pytrace=False)


WRONG = [
    ("see [the tour](docs/no-tour.md)", "docs/no-tour.md"),
    ("see [it](README.md#no-such-heading)", "README.md#no-such-heading"),
    ("a line in `passes/registri.py`", "passes/registri.py"),
    ("`frontend/no_aten*.py`, matching nothing", "frontend/no_aten*.py"),
    ("a folder, `tests/no_such_folder/`", "tests/no_such_folder/"),
    ("run `make tset`", "make tset"),
    ("    . .venv/bin/activate && make tset", "make tset"),
    ("`xllm-sreve --port 1`", "xllm-sreve"),
    ("`xllm-serve --prot 1`", "xllm-serve --prot"),
    ("    xllm-trace x | xllm-opt - --laod wrong.py", "xllm-opt --laod"),
    ("`xllm-compile verify --chekpoint`", "xllm-compile verify --chekpoint"),
    ("`xllm-compile show --report x.html`", "xllm-compile show --report"),
    ("the flag `--quantise`", "--quantise"),
    ("`python bench/coverage.py --olny X`", "bench/coverage.py --olny"),
    ("`python -m xllm_compiler.tools.no_such`", "python -m xllm_compiler.tools.no_such"),
    ("set `XLLM_NO_SUCH`", "XLLM_NO_SUCH"),
    ("    from xllm_compiler import LLM, NoSuch", "xllm_compiler.NoSuch"),
    ("    from xllm_compiler.no_such import LLM", "xllm_compiler.no_such"),
]


@pytest.mark.parametrize(("line", "name"), WRONG)
def test_a_wrong_name_is_told(line: str, name: str) -> None:
    assert wrong(f"# A page\n{line}\n", ROOT / "PAGE.md") == [f"PAGE.md:2: {name}"]


RIGHT = [
    "`passes/registry.py`, `xllm_compiler/ir/ops/`, `quant.py`, `frontend/quantized*.py`, `tests/passes/<pass>/*.xir`",
    "    make demo && xllm-compile path/to/checkpoint -o my-artifact --quantize int8 --max-kl inf  # --no-flag",
    "`XLLM_MAX_NUM_SEQS` and `--max-num-seqs`; `my_pass.py`; `application/json`; `/v1/models`",
    "    xllm-trace path/to/checkpoint | xllm-opt - --load my_pass.py -p my-pass,@cpu --report report.html",
    "    from xllm_compiler import LLM, SamplingParams",
]


@pytest.mark.parametrize("line", RIGHT)
def test_a_right_name_is_not(line: str) -> None:
    assert wrong(line, Path(ROOT / "PAGE.md")) == []


def test_the_readme_counts_families_as_the_list_does() -> None:
    listed = re.search(r"(\d+) equal, .* of (\d+) families", (ROOT / "docs" / "supported-models.md").read_text("utf-8"))
    assert listed is not None
    assert f"[{listed[1]} of {listed[2]} families]" in (ROOT / "README.md").read_text("utf-8")
