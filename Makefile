# make picture PROMPT="a red apple on a blue background"   set everything up and make a picture
# make test                                                set everything up and run every check
# The versions in constraints.txt need Python 3.11 or later.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
PROMPT ?= a red apple on a blue background
ARGS   ?=

PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: picture test lint unit env train-env bench parity clean

picture: $(VENV)/.core
	@$(VENV)/bin/sfumato "$(PROMPT)" $(ARGS)

test: lint unit

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

unit: $(VENV)/.dev
	$(VENV)/bin/pytest

env: $(VENV)/.dev

# What retraining the built-in model needs besides (see docs/builtin-model.md).
train-env: $(VENV)/.train

# Pictures timed beside diffusers and, where they are installed, OpenVINO (pip install openvino nncf) and
# stable-diffusion.cpp (pip install stable-diffusion-cpp-python, a compilation of ten minutes): with Stable Diffusion 1.5
# at full size hours, 20 GB of memory with all of them, 12 GB of disk. ARGS="--only builtin" measures the built-in model
# alone, in minutes; other parts, also at other times, are added to the same table.
bench: $(VENV)/.dev
	$(VENV)/bin/python benchmarks/bench.py $(ARGS)

# Full-size networks with random weights beside diffusers: an hour, 17 GB of memory, 25 GB of disk.
# ARGS="--only sd15" measures one model; loading is measured whether or not a bound was missed.
parity: $(VENV)/.dev
	@failed=0; \
	$(VENV)/bin/python benchmarks/parity.py --again $(ARGS) || failed=1; \
	$(VENV)/bin/python benchmarks/loading.py || failed=1; \
	exit $$failed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Each stamp is renewed when the package's requirements change.
$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV) (about a minute, once)..." >&2
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.core

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[train,dev]"
	@touch $@ $(VENV)/.core $(VENV)/.dev

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
