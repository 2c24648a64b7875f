# `make help` lists what there is. Everything happens inside .venv; nothing outside of this folder is touched.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# What an installation is made from; the code itself is read where it lies.
INSTALLED := pyproject.toml constraints.txt hatch_build.py $(wildcard src/provq/ops/native/*.cpp src/provq/ops/native/*.h)

.PHONY: help demo test test-slow lint bench docs clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/with-report  ## Train four arms on two photographs and write runs/demo/report.html (3 to 4 minutes)
	$(BIN)/provq compare demo --learning-rates 1 --out runs/demo --html runs/demo/report.html

test: .venv/with-dev lint  ## Run everything that continuous integration runs
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/with-dev  ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: .venv/with-dev  ## Check style, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv/with-dev  ## Time quantizers against their peers, and see that they agree (about ten minutes)
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/quantizers.py

docs: .venv/with-dev  ## Check the pages: links lead somewhere, examples run, commands exist
	$(BIN)/python -m pytest tests/test_documents.py

clean:  ## Remove the environment and every cache
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache src/provq/ops/native/*.so

.venv/with-report: $(INSTALLED)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[report]'
	touch $@

.venv/with-dev: $(INSTALLED)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Two peers whose quantizers are oracles of tests; what else they pull in, other versions of torch first, is not needed.
	$(BIN)/python -m pip install --quiet --no-deps moshi==0.2.13 encodec==0.1.1
	touch $@
