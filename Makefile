# make train: set up and train the shapes model; make test: set up and test. Everything lives in .venv and in experiments/.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,slurm,sensitivity
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow check

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)  ## a virtual environment in .venv with everything that training and tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"error: Python {v[0]}.{v[1]} found, 3.11 or later needed: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[$(EXTRAS)]' 2> >(grep -v ' is ignored: it is neither' >&2)
	@touch $@

train: setup  ## train the shapes model on this machine (about 10 minutes on 2 cores); continues after an interruption
	@$(BIN)/python -m t2v.train experiment=shapes $(ARGS)

test: setup  ## tests that need no GPU and fetch nothing (under 8 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: setup  ## longer tests: chaos, full size, SLURM (40 minutes at most)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --timeout 1800 $(ARGS)

check: setup  ## lint, format, types, import directions
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
