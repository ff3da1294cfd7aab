# Every target sets up .venv by itself. `make` alone says what there is.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Threads that spin while they wait for each other cost more than they bring on two shared cores.
export OMP_WAIT_POLICY := passive

.PHONY: help venv demo test test-gpu bench lint clean

help: ## say what the targets do
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

test: $(READY) ## lint, type check and run every test that needs no GPU
	ruff check .
	ruff format --check .
	mypy
	python -m pytest -m "not gpu" -n 2 --dist worksteal

test-gpu: $(READY) ## run the tests that need a CUDA device
	python -m pytest -m gpu

bench: $(READY) ## measure; prints tables with machine and versions
	python -m benchmarks.networks
	python -m benchmarks.renderer
	python -m benchmarks.augment
	python -m benchmarks.materialize
	python -m benchmarks.training
	python -m benchmarks.loader
	python -m benchmarks.robustness --source synthetic:200@9

lint: $(READY) ## put formatting and imports in order
	ruff check --fix .
	ruff format .

clean: ## remove what demo and tests made, keep .venv
	rm -rf demo/data demo/models demo/reports .pytest_cache .mypy_cache .ruff_cache .hypothesis
