# Everything a contributor runs. `make` alone lists the targets; each does its own set-up first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# pip would compile some ten thousand modules, most of which nobody ever imports (40 s); importing these compiles the rest.
COMPILED := hotset, httpx, hypothesis, matplotlib.pyplot, onnxruntime, safetensors.torch, scipy.stats, starlette, torch

# Tests start many short-lived processes: without bytecode each would compile what it imports again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup test check format bench demo clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Create .venv with everything pinned, and `hotset` in .venv/bin

# Done once, and again when what is to be installed changes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "hotset needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off --no-compile -c constraints.txt -e '.[dev,onnx]'
	$(BIN)/python -c 'import $(COMPILED)'
	@touch $@

test: check ## Run `check`, then every test, and hold the coverage floors (90% overall, scheduling 100%)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses auto --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(BIN)/coverage report --include='src/hotset/scheduling/*' --fail-under=100

check: setup ## Lint, formatting, types and the one-way imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Apply the formatting and the lint fixes that need no thought
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup ## Run every benchmark; each prints its figures beside the bound it is measured against
	@for benchmark in benchmarks/bench_*.py; do echo "== $$benchmark"; $(BIN)/python "$$benchmark"; done

demo: setup ## Deploy real models on virtual GPUs too small for them all, call them, compare the policies
	$(BIN)/python scripts/demo.py

clean: ## Remove the environment and everything the tools left behind
	rm -rf $(VENV) build dist htmlcov reports .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests examples benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
