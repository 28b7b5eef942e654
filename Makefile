# Everything on a fresh machine with Python >= 3.10, a C++ compiler and make; nothing is written outside this
# folder (but for pip's own download cache). `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# Which torch: any pip requirement, such as TORCH=torch or TORCH='torch==2.12.*'. The default is not the newest: PyPI has
# 2.14 and 2.15 with CUDA only, 5 GB once installed, which every clean run would fetch.
TORCH ?= torch==2.13.0
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# More words for pytest: make test ARGS='-k fuse'
ARGS ?=

# The companions of the default torch. torchvision alone would bring its own torch, so its dependencies stay out.
ifeq ($(TORCH),torch==2.13.0)
TRITON ?= triton==3.7.1
TORCHVISION ?= --no-deps torchvision==0.28.0
else
TRITON ?= triton
TORCHVISION ?= torchvision
endif

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := $(STAMPS)/constraints.txt
WORD := $(shell printf '%s' '$(TORCH) $(TRITON) $(TORCHVISION)' | cksum | cut -d' ' -f1)

export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
# Inductor takes graphs from its cache though an operator's tags or fake kernel are others now.
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor/$(shell cat fused_attn/ops/*.py | cksum | cut -d' ' -f1)
export FUSED_ATTN_CACHE := $(CURDIR)/.cache/verdicts
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export HF_HUB_OFFLINE := 1
# Where there is no GPU, CUDA kernels are compiled for one, to see that they compile; setup.py would for those of wheels.
ifeq ($(shell command -v nvidia-smi),)
export TORCH_CUDA_ARCH_LIST ?= 9.0a+PTX
endif
export PYTEST_ADDOPTS := -o cache_dir=.cache/pytest
export RUFF_CACHE_DIR := .cache/ruff

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-quick test-long mutants pytest lint typecheck format bench build wheels clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14

demo: $(STAMPS)/bench  ## install into .venv and train a small network with its blocks original and fused
	$(BIN)/python -m fused_attn demo

docs: $(STAMPS)/docs  ## build the site of docs/ into build/docs/html; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -d build/docs/doctrees docs build/docs/html
	@echo build/docs/html/index.html

test: lint typecheck pytest  ## every check: source, types, tests (kernels, packaging, README and site)

lint: $(STAMPS)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	find csrc tests \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	    | xargs -0 $(BIN)/clang-format --dry-run -Werror

typecheck: $(STAMPS)/test
	$(BIN)/mypy

# One worker a core and one thread a worker; tests of threading ask for more themselves.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

pytest: $(STAMPS)/test
	$(PYTEST) --durations=15 $(ARGS)

test-quick: $(STAMPS)/test  ## the tests without those marked slow
	$(PYTEST) -m 'not slow and not long' $(ARGS)

test-long: $(STAMPS)/test  ## what `make test` leaves out: the other combinations of parameters, whole training runs
	$(PYTEST) -m long --durations=15 $(ARGS)

mutants: $(STAMPS)/test  ## plant faults one at a time in a copy and say which of them the tests see
	$(BIN)/python -m tests.mutants $(ARGS)

format: $(STAMPS)/test  ## rewrite the source in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	find csrc tests \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	    | xargs -0 $(BIN)/clang-format -i

bench: $(STAMPS)/bench $(STAMPS)/models  ## measure blocks and models against eager and torch.compile
	$(BIN)/python -m fused_attn bench

build: $(STAMPS)/native  ## compile csrc again where it changed

# CUDA=1 makes the one with the CUDA kernels, too.
wheels: $(STAMPS)/test  ## an sdist and wheels to publish, audited, in dist/
	$(BIN)/python -m tools.wheels cpu $(if $(CUDA),cuda)

clean:  ## remove what was built, the environment and the caches
	rm -rf $(VENV) .cache build dist *.egg-info fused_attn/_native.so fused_attn/_build_info.json

# ---- the environment: each step leaves a stamp, so that the next `make` skips it ----

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; set PYTHON=" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# The stamp's name holds the requirements, so another TORCH= installs again (and builds again).
$(STAMPS)/torch-$(WORD): | $(STAMPS)/venv
	rm -f $(STAMPS)/torch-* $(STAMPS)/models $(STAMPS)/native
	$(PIP) install '$(TORCH)' '$(TRITON)'
	$(PIP) freeze | grep -E '^(torch|triton)==' > $(CONSTRAINTS)
	touch $@

NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.*')
$(STAMPS)/native: $(STAMPS)/torch-$(WORD) $(NATIVE)
	@echo 'compiling csrc: two minutes or more; its output is in $(STAMPS)/build.log'
	@$(PIP) install -v --no-deps -e . > $(STAMPS)/build.log 2>&1 || { cat $(STAMPS)/build.log; exit 1; }
	@grep 'fused_attn: WARNING' $(STAMPS)/build.log || true
	touch $@

$(STAMPS)/bench: $(STAMPS)/native
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[bench]'
	touch $@

$(STAMPS)/docs: $(STAMPS)/native
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

$(STAMPS)/models: $(STAMPS)/torch-$(WORD)
	$(PIP) install -q -c $(CONSTRAINTS) $(TORCHVISION)
	$(PIP) install -q --no-deps 'timm >= 1.0.15' 'monai >= 1.5'
	$(PIP) install -q numpy pillow pyyaml huggingface_hub safetensors
	touch $@

$(STAMPS)/test: $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/models
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[bench,test]'
	touch $@
