# make train [ARGS="key=value ..."]   set everything up and run
# make test  [ARGS="tests/buffer"]    the whole test suite, or a part
# make check                          format, lint, types, docs, tests
# make docs                           the documentation as a site, in site/
# make lock  [ARGS=--upgrade]         resolve the dependencies into launch/locks, keeping or raising versions
# make matrix                         set-up, tests and a run from a fresh clone, with every Python that is found
#   PYTHON=NAME_OR_PATH chooses the interpreter, ENGINE=cpu|cuda the vLLM to install; see docs/installation.md
.PHONY: setup train test check lint docs format lock matrix clean

PYTHON_ENV := .venv/bin/python
export PYTHON ENGINE

setup:
	@bash launch/setup.sh

train: setup
	@$(PYTHON_ENV) launch/cluster.py $(ARGS)

# Tests of single parts share the cores; those of whole runs have the machine to themselves.
test: setup
ifdef ARGS
	@$(PYTHON_ENV) -m pytest $(ARGS)
else
	@$(PYTHON_ENV) -m pytest -m "not system" -n auto --maxprocesses 4
	@$(PYTHON_ENV) -m pytest -m system
endif

lint: setup
	@$(PYTHON_ENV) -m ruff format --check .
	@$(PYTHON_ENV) -m ruff check .
	@$(PYTHON_ENV) -m mypy

# Strict: a broken link ends it. mkdocs-material announces its successor at every build otherwise.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(PYTHON_ENV) -m mkdocs build --quiet

check: lint docs test

format: setup
	@$(PYTHON_ENV) -m ruff format .
	@$(PYTHON_ENV) -m ruff check --fix .

lock: setup
	@PYTHONPATH=. $(PYTHON_ENV) launch/lock.py $(ARGS)

matrix:
	@bash .ci/matrix

clean:
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache .hypothesis
