# The commands of README and CONTRIBUTING. Each sets up .venv first, from pyproject.toml and constraints.txt.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Parallel tests: one process per core, each with one torch thread.
JOBS ?= auto

.PHONY: demo test test-quick lint bench clean setup

demo: $(STAMP)
	$(BIN)/edge-runtime demo

test: $(STAMP) lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# For the loop of daily work: without the tests marked slow, and without types, which `make lint` checks.
test-quick: $(STAMP)
	$(BIN)/ruff check --quiet .
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.speed
	$(BIN)/python -m tests.benchmarks.wire
	$(BIN)/python -m tests.benchmarks.probes
	$(BIN)/python -m tests.benchmarks.service
	$(BIN)/python -m tests.benchmarks.reality
	$(BIN)/python -m tests.benchmarks.planning
	$(BIN)/python -m tests.benchmarks.ngram_cache

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cloud,export,scale,test]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
