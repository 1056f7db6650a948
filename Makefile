# vlmx: make export MODEL=mobilevlm TARGET=tensorrt

SHELL := /bin/bash
.DEFAULT_GOAL := help

# any interpreter of 3.11: by that name, or a python3 that is one
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
PEERS := .venv-peers
READY_PEERS := $(PEERS)/.ready

MODEL ?= mobilevlm
TARGET ?= onnxruntime

# option of `vlmx export` -> variable, given only where the variable is set
flag = $(if $($(1)),--$(2) "$($(1))")
EXPORT_FLAGS = $(call flag,CHECKPOINT,checkpoint) $(call flag,VARIANT,variant) $(call flag,COMPRESS,compress) \
  $(call flag,QUANT,quant) $(call flag,CALIBRATION,calibration) $(call flag,OUT,out) $(call flag,DELEGATE,delegate) $(call flag,BUILDER,builder) $(call flag,MAX_MEMORY,max-memory) \
  $(if $(FORCE),--force) $(if $(ANEW),--anew)

help: ## list what make can do
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  variables of export: MODEL TARGET CHECKPOINT VARIANT COMPRESS QUANT CALIBRATION OUT FORCE ANEW DELEGATE BUILDER MAX_MEMORY"

export: $(READY) ## compile MODEL for TARGET (onnxruntime, executorch, coreml, tensorrt)
	@$(BIN)/vlmx export $(MODEL) --target $(TARGET) $(EXPORT_FLAGS)

test: $(READY_DEV) ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY_DEV) ## ruff, mypy and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

doctor: $(READY) ## what each target can do on this machine
	@$(BIN)/vlmx doctor

zoo: $(READY) ## train zoo/mobilevlm-nano again (hours; resumes)
	@$(BIN)/python -m zoo.train --out zoo/mobilevlm-nano

evaluate: $(READY) ## held-out accuracy of zoo/mobilevlm-nano, into docs/zoo.md
	@$(BIN)/python -m zoo.evaluate

agreement: $(READY) ## greedy answers of every runtime against eager on held-out questions, into docs/agreement.md
	@$(BIN)/python -m export.agreement

matrix: $(READY_DEV) ## every model up the ladder, every target, into docs/matrix.* (hours; RESUME=1 goes on, MODELS="a b" only these)
	@$(BIN)/python -m export.matrix $(if $(MODELS),--models $(MODELS)) $(call flag,MINUTES,minutes) $(if $(RESUME),--resume)

published: $(READY) ## every architecture at a published size, seconds and memory, into docs/benchmarks/published.* (an hour; RESUME=1 goes on)
	@$(BIN)/python -m export.published $(if $(MODELS),--models $(MODELS)) $(if $(RESUME),--resume)

frontier: $(READY) ## accuracy against latency of passes x recipes x targets, into docs/frontier.* (RESUME=1 goes on)
	@$(BIN)/python -m export.frontier $(call flag,COUNT,count) $(call flag,MINUTES,minutes) $(if $(RESUME),--resume)

bench-gpu: $(READY) ## TensorRT engines on this NVIDIA GPU beside torch, into docs/benchmarks/gpu.* (ten minutes; CHECKPOINT, TORCH_PYTHON)
	@$(BIN)/python -m export.gpu.bench $(call flag,CHECKPOINT,checkpoint) $(call flag,MINUTES,minutes) $(call flag,TORCH_PYTHON,torch-python)

bench-peers: $(READY_PEERS) ## ours beside llama.cpp, onnxruntime-genai and others, into docs/benchmarks (half an hour; resumes)
	@$(PEERS)/bin/python -m peers $(if $(ROUNDS),--rounds $(ROUNDS))

clean: ## remove the environment and caches (bundles stay)
	rm -rf $(VENV) $(PEERS) .mypy_cache .ruff_cache .pytest_cache *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	  || { echo "vlmx needs Python 3.11: install it, or set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "vlmx: creating the environment in $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)

$(READY): requirements.lock pyproject.toml | $(BIN)/python
	@echo "vlmx: installing the pinned packages of requirements.lock (about 2 GB, once; some minutes)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(READY_DEV): requirements-dev.lock $(READY)
	@echo "vlmx: installing what the tests need besides (requirements-dev.lock)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev.lock
	@touch $@

# an environment on top of the other: a link to its packages, and the peers'. What cannot be installed is tried again next time
$(READY_PEERS): peers/requirements.lock $(READY_DEV)
	@echo "vlmx: installing the peers in $(PEERS) (builds llama.cpp: some ten minutes of two cores, once)" >&2
	@$(BIN)/python -m venv --without-pip $(PEERS)
	@for of in $(BIN) $(PEERS)/bin; do $$of/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done \
	  | { read -r ours; read -r theirs; echo "import site; site.addsitedir('$$ours')" > "$$theirs/vlmx.pth"; }
	@missing=; for package in $$(grep -v '^#' peers/requirements.lock); do \
	  CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_PROJECT_INCLUDE=$(CURDIR)/peers/llama_cpp/build.cmake" $(BIN)/python -m pip --python $(PEERS)/bin/python install --quiet \
	    --disable-pip-version-check --no-deps "$$package" || { missing=1; echo "vlmx: $$package is not installed" >&2; }; \
	done; [ "$$missing" ] || touch $@

.PHONY: help export test lint doctor zoo evaluate agreement matrix published frontier bench-gpu bench-peers clean
