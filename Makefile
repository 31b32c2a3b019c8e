# Each target sets up .venv first; requires Python >= 3.10, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help verify test test-timm lint format benchmark docs

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is required: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.eval: pyproject.toml | $(BIN)/python
	@echo "Installing kn_zoo with the evaluation extra into $(VENV) (PyTorch needs about 6 GB) ..."
	@$(PIP) -e '.[eval]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing kn_zoo with the development tools into $(VENV) (PyTorch needs about 6 GB) ..."
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.eval

verify: $(VENV)/.eval  ## recompute the accuracy of the checkpoints here (downloads CIFAR-100)
	$(BIN)/python eval/verify.py --embedded --download

# One file per worker: module fixtures are set up once. One thread per worker: two would compete.
test: $(VENV)/.dev  ## run the tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-timm: $(VENV)/.dev  ## run timm's model tests on every network of kn_zoo
	$(BIN)/python tests/models/timm_suite.py

lint: $(VENV)/.dev  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.dev  ## measure the cost of normalization (eight minutes on a GPU)
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
