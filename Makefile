# `make` lists what there is. Every target makes its own .venv first, once, and again when pyproject.toml changes.
PYTHON ?= python3
PRESET ?= tiny_gemma_en
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-full test-peers lint notebooks bench

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "%-13s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.dev  ## watch LoRA change what a Gemma does (two minutes; PRESET=gemma_2b_en for the real one)
	@GEMMA_LORA_PRESET="$(PRESET)" $(BIN)/python tests/notebooks.py demo

test: .venv/.dev  ## unit tests, doctests, and the notebooks compared with what is committed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not full and not peers"
	$(BIN)/python tests/notebooks.py test

test-full: .venv/.dev  ## the long counts: more seeds, more examples
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest -n 2 --dist loadfile -m "not peers"

test-peers: .venv/.peers  ## the same results from Transformers and PEFT
	$(BIN)/python -m pytest -m peers tests/peers

lint: .venv/.dev  ## style of code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: .venv/.dev  ## execute the notebooks and save them, and their pages under artifacts/
	$(BIN)/python tests/notebooks.py save

bench: .venv/.dev  ## measure what the README's table of results says
	$(BIN)/python tests/benchmarks/small_world.py

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and 'gemma_lora needs Python 3.11 to 3.13: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv --clear .venv

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

.venv/.peers: .venv/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,peers]"
	@touch $@
