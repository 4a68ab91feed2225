# Every target works in a fresh clone: Python 3.11 or newer, pip and make are all it takes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the tests, with a thread each: their tensors are too small for more.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help venv demo serve test test-unit test-e2e test-slow soak lint docs format fields clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(STAMP) ## create the virtual environment and install everything into it

demo: $(STAMP) ## start everything, ask the example questions, stop
	$(BIN)/dllm-serve demo

serve: $(STAMP) ## run the service until Ctrl-C
	$(BIN)/dllm-serve serve

test: test-unit test-e2e ## what a change must pass; ten minutes on two cores

test-unit: $(STAMP) ## its tests of the parts
	$(PYTEST) -m "not slow" --maxschedchunk 1 tests/unit

test-e2e: $(STAMP) ## its tests of the whole service, with a real tritonserver
	$(PYTEST) -m "not slow" --dist loadfile --no-loadscope-reorder tests/e2e

# Property tests run again, with all their examples.
test-slow: $(STAMP) ## the other tests; a quarter of an hour
	$(PYTEST) -m "slow or hypothesis" --hypothesis-profile full --maxschedchunk 1 tests/unit
	$(PYTEST) -m slow --dist loadfile --no-loadscope-reorder tests/e2e

soak: $(STAMP) ## 10,000 jobs while workers are killed and clients vanish
	$(BIN)/python -m benchmarks.soak

lint: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(STAMP) ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fields: $(STAMP) ## write all lists of sampling fields, and of settings' names
	$(BIN)/python -m tools.fields
	$(BIN)/python -m tools.setting_names

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

# Where pip is configured to find packages, as options of uv, which reads no configuration of pip's.
# From several indexes uv takes the best version, as pip does, and not the first one's.
define UV_INSTALL
$(BIN)/python -m pip config list \
	| sed -nE "s/^[^=]*\.((extra-)?index-url|find-links)='(.*)'\$$/\1 \3/p" \
	| while read -r name values; do printf -- "--$$name %s " $$values; done \
	| xargs uv pip install --python $(BIN)/python --index-strategy unsafe-best-match
endef
INSTALL := $(if $(shell command -v uv),$(UV_INSTALL),$(BIN)/python -m pip install --progress-bar on)

# The stamp is written last, so that an interrupted installation starts again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dLLM-Serve needs Python 3.11 or newer; name one with: make PYTHON=python3.11")'
	@echo "==> virtual environment in $(VENV), with $$($(PYTHON) --version)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing dLLM-Serve with everything it needs; the first time takes minutes"
	$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@
