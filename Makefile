# make quickstart   environment, then the main job: four allocators on SmolLM2, some minutes on two cores
# make test         environment with the dev extra, then linters, types and tests
# make engines      llama.cpp, vLLM, MLX, auto-round, GPTQModel, each in an environment of its own, for the tests that load exports
# make lint         formatting, linters and types alone
# make format       formats the code and mends what the linter can mend
# make results      every table and figure of docs/results.md that needs a GPU; what is there already is kept
# make results-cpu  those that two CPU cores make
# make docs         the documentation as a website in site/; a warning is an error
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test engines lint format docs results results-cpu clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m evosweep +experiment=quickstart

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

engines: $(VENV)/.installed-dev
	$(BIN)/python -m tests.engines.install

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

results: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.results --machine gpu

results-cpu: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.results --machine cpu

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "evosweep needs Python 3.11 or newer; say which: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[dashboard]"
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[docs]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/.installed $(VENV)/.installed-docs

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache site
