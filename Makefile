# Everything on a machine that has only Python >= 3.11: `make demo` and `make test` set up .venv themselves.
# PYTHON chooses the interpreter that makes it, e.g. `make test PYTHON=python3.13`.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Stealing keeps neighbours on one worker, so that a module's fixtures are made once.
JOBS ?= 2

.PHONY: help setup fmt lint test test-slow test-families test-fuzz test-js test-optimum test-latest test-adapters docs demo bench bench-full plots \
	wheel-check release-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv with everything that the other targets need

# An environment with the extras EXTRAS, within the constraints file among its prerequisites.
define set-up
	@test -n "$(PYTHON)" || { echo "trimserve needs Python >= 3.11: install it, or pass PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "setting up $(@D) (a few minutes, once)"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(filter constraints%,$^) -e '.[$(EXTRAS)]' --group dev
	@touch $@
endef

# Made again when a requirement changes; the stamp keeps every other call quick.
$(READY): EXTRAS := cpu,export,demo
$(READY): pyproject.toml constraints.txt
	$(set-up)

fmt: $(READY)  ## format and fix the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)  ## pages and figures against their rows, ruff, mypy --strict, the order of imports
	$(BIN)/python -m bench.readme --check
	$(BIN)/python -m bench.plot --check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(READY)  ## the whole suite but its slow tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow and not fuzz and not families'

test-slow: $(READY)  ## the slow tests and those that read real data
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'slow or realdata'

test-families: $(READY)  ## every family that people deploy, beside its library (half an hour)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m families

test-fuzz: $(READY)  ## hardening with its large counts: 30,000 damages, 200 kills, 4,000 calls from threads (half an hour)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m fuzz tests/hardening

# optimum-onnx, which needs transformers 4.57, and nothing of the builder.
OPTIMUM := .venv-optimum

$(OPTIMUM)/.ready: EXTRAS := cpu,export-optimum
$(OPTIMUM)/.ready: pyproject.toml constraints-optimum.txt
	$(set-up)

test-optimum: $(OPTIMUM)/.ready  ## what only optimum-onnx exports, and a sample of the rest beside it
	$(OPTIMUM)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'optimum and not slow and not realdata and not fuzz'

# What a user installs today, without our pins; torch alone is held, as in the other environments.
LATEST := .venv-latest

$(LATEST)/.ready: EXTRAS := cpu,export
$(LATEST)/.ready: pyproject.toml constraints-latest.txt
	$(set-up)

test-latest: $(LATEST)/.ready  ## a sample of the matrix with the newest versions of every package
	@$(LATEST)/bin/python -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(transformers|tokenizers|onnx|onnxruntime|onnx-ir|onnxscript|torch|numpy) '
	$(LATEST)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow and not fuzz and not families' \
		tests/export/test_exporters.py tests/export/test_matrix.py tests/export/verify/test_source.py

test-adapters: $(READY)  ## LangChain, LlamaIndex and FAISS themselves: trimserve.integrations, and the guides
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group adapters
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/integrations tests/docs

# Its tests export beside optimum-onnx (tests/support/legs.py).
test-js: $(OPTIMUM)/.ready  ## transformers.js under Node on folders of ours
	cd tests/js && npm ci --ignore-scripts --no-audit --no-fund
	$(OPTIMUM)/bin/python -m pytest tests/export/layouts/test_layouts.py -k transformers_js

# The site needs none of the heavy packages, and builds in an environment of its own.
DOCS := .venv-docs

$(DOCS)/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "trimserve needs Python >= 3.11: install it, or pass PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e . --group docs
	@touch $@

docs: $(DOCS)/.ready  ## the documentation as a site that works offline, build/site/index.html; every link checked
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	$(DOCS)/bin/python .ci/check-site build/site

demo: $(READY)  ## trim a real MiniLM to the standard library's docstrings, into demo-out/
	$(BIN)/python examples/demo.py

bench: $(READY)  ## every benchmark with few repetitions, results in build/bench
	$(BIN)/python -m bench.suite --quick

bench-full: demo  ## every benchmark, within an hour on 2 cores; results, tables and figures in the tree
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench.suite

plots: $(READY)  ## draw the figures and write the measured tables again
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.readme

wheel-check: $(READY)  ## install the built wheel in a clean environment and call it
	.ci/check-wheel $(BIN)/python

release-check:  ## sdist and wheel built, checked, and installed in clean environments on every Python at hand
	.ci/check-release $(PYTHON)

clean:  ## remove what the targets made, .venv included
	rm -rf $(VENV) $(OPTIMUM) $(LATEST) $(DOCS) build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
