# make train [ARGS="key=value ..."]   set everything up and run
# make test                           the whole test suite
# make check                          format, lint, types, tests
.PHONY: train test check lint format clean

PYTHON_ENV := .venv/bin/python

.venv/.ready: pyproject.toml launch/setup.sh
	@bash launch/setup.sh

train: .venv/.ready
	@$(PYTHON_ENV) launch/cluster.py $(ARGS)

# Tests of single parts share the cores; those of whole runs have the machine to themselves.
test: .venv/.ready
ifdef ARGS
	@$(PYTHON_ENV) -m pytest $(ARGS)
else
	@$(PYTHON_ENV) -m pytest -m "not system" -n auto --maxprocesses 4
	@$(PYTHON_ENV) -m pytest -m system
endif

lint: .venv/.ready
	@$(PYTHON_ENV) -m ruff format --check .
	@$(PYTHON_ENV) -m ruff check .
	@$(PYTHON_ENV) -m mypy

check: lint test

format: .venv/.ready
	@$(PYTHON_ENV) -m ruff format .
	@$(PYTHON_ENV) -m ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
