# Every target works in a fresh clone: Python 3.11 or newer, pip and make are all it takes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the tests, with a thread each: their tensors are too small for more.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help venv demo serve test test-unit test-e2e soak lint format fields clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(STAMP) ## create the virtual environment and install everything into it

demo: $(STAMP) ## start everything, ask the example questions, stop
	$(BIN)/dllm-serve demo

serve: $(STAMP) ## run the service until Ctrl-C
	$(BIN)/dllm-serve serve

test: test-unit test-e2e ## all tests

test-unit: $(STAMP) ## tests of the parts
	$(PYTEST) --maxschedchunk 1 tests/unit

test-e2e: $(STAMP) ## tests of the whole service, with a real tritonserver
	$(PYTEST) --dist loadfile --no-loadscope-reorder tests/e2e

soak: $(STAMP) ## 10,000 jobs while workers are killed and clients vanish
	$(BIN)/python -m benchmarks.soak

lint: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fields: $(STAMP) ## write all lists of sampling fields from the engine's table
	PYTHONPATH=model_repository/dllm/1 $(BIN)/python -m tools.fields

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

# The stamp is written last, so that an interrupted installation starts again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dLLM-Serve needs Python 3.11 or newer; name one with: make PYTHON=python3.11")'
	@echo "==> virtual environment in $(VENV), with $$($(PYTHON) --version)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing dLLM-Serve with everything it needs; the first time takes minutes"
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@
