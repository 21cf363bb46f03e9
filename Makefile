# `make test` and `make demo` need nothing before them: Python 3.11+ with venv, make, gcc and git.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: help venv test slow demo format coverage clean

help:
	@echo "make test      check everything: lint, format, types, import rules, tests"
	@echo "make slow      run the tests that train for long: once before a release"
	@echo "make demo      the whole story on handwritten digits, on the CPU"
	@echo "make format    fix formatting and what ruff can fix"
	@echo "make coverage  run the tests and report the lines they miss; under 92% is an error"
	@echo "make venv      only create .venv"
	@echo "make clean     remove .venv and caches"

venv: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev,onnx,parquet,tensorboard]'
	touch $@

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 -m 'not slow'

slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow

demo: $(READY)
	$(BIN)/elr demo --overwrite

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: $(READY)
	$(BIN)/coverage run -m pytest -n 2
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing --skip-covered

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage .coverage.* dist
