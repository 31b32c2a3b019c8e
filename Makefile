# Each target does its own set-up in .venv; all that is needed is Python >= 3.10, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help verify test test-timm lint format benchmark docs

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.eval: pyproject.toml | $(BIN)/python
	@echo "Installing kn_zoo and what evaluation needs into $(VENV) (PyTorch is about 6 GB on disk) ..."
	@$(PIP) -e '.[eval]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing kn_zoo and its development tools into $(VENV) (PyTorch is about 6 GB on disk) ..."
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.eval

verify: $(VENV)/.eval  ## recompute the reported accuracy of the checkpoints in the package
	$(BIN)/python eval/verify.py --embedded --download

test: $(VENV)/.dev  ## the project's tests
	$(BIN)/python -m pytest

test-timm: $(VENV)/.dev  ## timm's own model tests, of the installed timm, on every model of ours
	$(BIN)/python tests/models/timm_suite.py

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.dev  ## measure the cost of normalization here (on a GPU: within eight minutes)
	$(BIN)/python eval/benchmark.py

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "Installing kn_zoo and what its documentation needs into $(VENV) (PyTorch is about 6 GB on disk) ..."
	@$(PIP) -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## write what is generated (tables, figures, model cards), build the site into site/
	$(BIN)/python -m kn_zoo.checkpoints.bundle
	$(BIN)/python eval/benchmark.py --render
	$(BIN)/python docs/render.py
	$(BIN)/mkdocs build --strict
