# `make` lists what there is. Every target makes its own .venv first, once, and again when
# pyproject.toml or lock.txt changes: exact versions of everything, so that a clone made next year gets the same.
PYTHON ?= python3
PRESET ?= tiny_gemma_en
COLAB_FREEZE ?= ../shared/colab/pip-freeze-cpu-2026-08-19.txt
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint lock.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-full test-peers test-colab lint notebooks bench lock set-repo test-browser

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "%-13s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.dev  ## watch LoRA change what a Gemma does (two minutes; PRESET=gemma_2b_en for the real one)
	@GEMMA_LORA_PRESET="$(PRESET)" $(BIN)/python tests/notebooks.py demo

test: .venv/.dev  ## unit tests, doctests, and the notebooks compared with what is committed
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not full and not peers"
	$(BIN)/python tests/notebooks.py test

test-full: .venv/.peers  ## the long counts: more seeds, more examples
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest -n 2 --dist loadfile

test-peers: .venv/.peers  ## the same results from Transformers and PEFT
	$(BIN)/python -m pytest -m peers tests/peers

test-colab:  ## the set-up cell, the tests and the notebooks on the versions that Colab has (Python 3.13)
	$(PYTHON) tests/colab.py "$(COLAB_FREEZE)"

test-browser: .venv/.browser  ## run the notebooks in JupyterLab and Chromium, and photograph them, light and dark
	$(BIN)/python tests/browser.py

lint: .venv/.dev  ## style of code and notebooks, and no token in any of them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/find_tokens.py README.md notebooks

notebooks: .venv/.peers  ## execute the notebooks and save them, and their pages under artifacts/
	$(BIN)/python tests/notebooks.py save

bench: .venv/.peers  ## measure what the README's tables say: results, and speed beside the peers (an hour)
	$(BIN)/python tests/benchmarks/small_world.py
	$(BIN)/python tests/benchmarks/training.py

lock: .venv/.dev  ## resolve the newest versions that go together, for Python 3.11 to 3.13, and write lock.txt
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --all-extras --fork-strategy fewest \
		--upgrade --no-annotate --no-emit-index-url --custom-compile-command "make lock" --output-file lock.txt

set-repo:  ## write the public address of the repository wherever it is needed: REPO=owner/name
	@$(PYTHON) tests/set_repo.py "$$REPO"

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and 'gemma_lora needs Python 3.11 to 3.13: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv --clear .venv

.venv/.dev: pyproject.toml lock.txt | .venv/bin/python
	$(INSTALL) --editable ".[dev]"
	@touch $@

.venv/.browser: .venv/.dev
	$(INSTALL) --editable ".[dev,browser]"
	@touch $@

.venv/.peers: .venv/.dev
	$(INSTALL) --editable ".[dev,peers]"
	@touch $@
