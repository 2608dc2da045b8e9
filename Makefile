.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
FLOORS := .venv-floors/bin
# the tested set is for the tested Python; another one resolves its own within the floors
TESTED := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')

.PHONY: help setup demo test test-slow test-exact test-floors format check docs notebooks

help: ## Show these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TESTED) --editable '.[dev]'
	touch $@

setup: .venv/installed ## Create .venv and install everything in it

demo: setup ## Transfer against training from scratch, on embedded data (2 minutes)
	$(BIN)/tl compare configs/recipes/demo_compare.yaml --folder runs/demo-$$(date +%Y%m%d-%H%M%S)

test: setup ## Fast tests
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: setup ## Reference scores on TL_DATA_DIR, notebooks, several processes
	$(BIN)/python -m pytest -m slow

test-exact: setup ## Interrupted runs against undisturbed ones, to the bit
	$(BIN)/python -m pytest -m exact -n auto --dist worksteal

.venv-floors/installed: pyproject.toml tests/floors.txt
	$(PYTHON) -m venv --clear .venv-floors
	$(FLOORS)/python -m pip install --quiet -c tests/floors.txt --editable . pytest pytest-xdist
	touch $@

test-floors: .venv-floors/installed ## Commands with the lowest versions declared (Python 3.10 to 3.12)
	$(FLOORS)/python -m pytest -n auto --dist worksteal tests/test_cli.py

format: setup ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup ## Lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## Build the site of the documents into site/; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: setup ## Rewrite the notebooks from their .py pairs and execute them
	$(BIN)/jupytext --to ipynb notebooks/*.py
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb
