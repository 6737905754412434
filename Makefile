# `make help` says what there is. The tests run three times: on this machine, and on two user-mode kernels of the lab.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help demo test trust lint types format clean lab

# Interpreter of the virtual environment: the newest is not needed, 3.11 is the oldest that works.
PYTHON ?= python3
STAMP := .venv/.stamp
RUN := .venv/bin/python -m

help: ## this list
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## show what it does, on this machine and in the lab
	.venv/bin/python demo/run.py

test: $(STAMP) ## all tests: here, on a kernel with rekey, on a kernel without; then coverage
	lab/test

trust: $(STAMP) ## the long forms of what speaks for trust: faults, floods, matrix, fuzzing, soak, the newest Python (two hours)
	lab/trust

lint: $(STAMP) ## ruff: mistakes and format
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(STAMP) ## mypy, strict
	$(RUN) mypy

format: $(STAMP) ## let ruff repair what it can
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

lab: ## get the lab's kernels, the test peers and the browser into the cache
	lab/build-kernel rekey
	lab/build-kernel norekey
	lab/peers
	lab/browser

clean: ## remove what the targets made here (the lab's cache is outside, and stays)
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find src tests lab -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: $(STAMP) ## the virtual environment with everything for development

$(STAMP): pyproject.toml
	@lab/make-venv "$(PYTHON)"
	@touch $@
