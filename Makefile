# Everything from a bare clone: needs Python 3.11 or newer, pip's package index for the first call, and make.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check slow clean

demo: $(VENV)/.installed  ## the main job on embedded defaults: no network, no files
	@$(BIN)/fedloom demo

test: $(VENV)/.developing  ## the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: $(VENV)/.developing  ## formatting, lint, types, layers, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

slow: $(VENV)/.developing  ## the tests that take minutes: kills, real processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "fedloom needs Python 3.11 or newer; none was found"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedloom needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # half a one would pass for done next time

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing fedloom into $(VENV) (once, about two minutes and 2 GB)"
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV) (once, about a minute)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@
