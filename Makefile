# Every target sets up .venv if needed. `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# With few cores, OpenMP threads that spin while waiting slow down the others.
export OMP_WAIT_POLICY := passive

.PHONY: help venv demo test test-all test-gpu coverage check lint docs bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

venv: $(READY) ## set up .venv with pinned versions

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(READY) ## render eyes, build shards, train, score and export three networks (minutes)
	dvc repro demo/dvc.yaml
	python -m pipeline.summarize demo

test: check ## lint, check types and layers, and run the tests that are not long
	python -m pytest -m "not gpu and not long" -n 2 --dist worksteal

test-all: check ## `make test`, with the long tests (random kills, the whole demo, benchmarks)
	python -m pytest -m "not gpu" -n 2 --dist worksteal

test-gpu: $(READY) ## run the tests that need a CUDA device
	python -m pytest -m gpu

coverage: $(READY) ## run the tests of `make test` and report the lines that none of them runs
	python -m pytest -m "not gpu and not long" -n 2 --dist worksteal --cov

check: $(READY) ## lint, check spelling, types and layers; change nothing
	ruff check .
	ruff format --check .
	codespell
	mypy
	lint-imports --no-cache --no-logo

lint: $(READY) ## fix formatting, import order and what else ruff can
	ruff check --fix .
	ruff format .
	codespell

docs: $(READY) ## build the documentation site in site/, without network
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

bench: $(READY) ## measure speed and accuracy; prints tables with the machine and versions
	python -m benchmarks.networks
	python -m benchmarks.renderer
	python -m benchmarks.augment
	python -m benchmarks.materialize
	python -m benchmarks.training
	python -m benchmarks.loader
	python -m benchmarks.robustness --source synthetic:200@9

clean: ## remove the output of demo, docs and tests, keep .venv
	rm -rf demo/data demo/models demo/reports demo/dvc.lock site .coverage .import_linter_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
