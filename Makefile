# Everything from a bare clone: needs Python 3.11 or newer, pip's package index for the first call, and make.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Bytecode is kept: without it every process of every test compiles the package and each file of tests anew.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS := -n 2 --dist loadfile
# One more than there are processors: of slow tests that run at once, one or two wait for processes.
MORE_WORKERS := -n 3 --dist loadfile

.PHONY: demo test check slow full docs release clean

demo: $(VENV)/.installed  ## the main job on embedded defaults: no network, no files
	@$(BIN)/fedloom demo

test: $(VENV)/.developing  ## the tests, within five minutes
	@$(PYTEST) $(WORKERS)

check: $(VENV)/.developing  ## formatting, lint, types, layers, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) $(WORKERS)

slow: $(VENV)/.developing  ## the tests that take minutes: kills, real processes, a sample of the full ones
	$(PYTEST) $(MORE_WORKERS) --no-loadscope-reorder -m "slow and (sample or not full) and not serial"
	$(PYTEST) -m "slow and (sample or not full) and serial" $$(grep -rl "mark.serial" --include="test_*.py" tests)

full: SHELL := /bin/bash
full: $(VENV)/.developing  ## sweeps, long fuzzing, marathons of kills: up to two hours; its log is kept
	@mkdir -p benchmarks/results
	@set -o pipefail; { git log -1 --format="commit %H"; date --utc "+%F %H:%M UTC"; \
		$(PYTEST) -m full --durations=0 --durations-min=1 -rP --show-capture=stdout --tb=short; } 2>&1 \
		| tee benchmarks/results/full.log
	@set -o pipefail; { git log -1 --format="commit %H"; date --utc "+%F %H:%M UTC"; \
		OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/mutants.py 2>/dev/null; } \
		| tee benchmarks/results/mutants.log

docs: $(VENV)/.developing  ## the documentation as a site in site/; warnings are errors
	@$(PIP) install --constraint constraints.txt --editable '.[docs]'
	@$(BIN)/python docs/reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html"

release: $(VENV)/.developing  ## all checks, then a wheel that runs the demo in an empty environment
	$(BIN)/python tests/release.py
	$(MAKE) check
	@rm -rf dist build/release
	$(PIP) wheel --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip --disable-pip-version-check --quiet install \
		--constraint constraints.txt dist/fedloom-*.whl
	cd build && release/bin/fedloom --version && release/bin/fedloom demo --set output.folder=release/demo
	@ls dist

clean:
	rm -rf $(VENV) build site dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "fedloom needs Python 3.11 or newer; none was found"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedloom needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # half a one would pass for done next time

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing fedloom into $(VENV) (once, about two minutes and 2 GB)"
	@$(PIP) install --no-compile --constraint constraints.txt --editable .
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all processors; pip takes one. Some are templates
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV) (once, about a minute)"
	@$(PIP) install --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@
