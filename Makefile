# make train [ARGS="key=value ..."]   set everything up and start a run
# make test  [ARGS="tests/buffer"]    the whole test suite, or a part
# make check                          formatting, lint, types, docs, tests
# make docs                           build the documentation site in site/
# make lock  [ARGS=--upgrade]         resolve the dependencies into launch/locks; --upgrade takes new versions
# make matrix                         set-up, a run and the tests in a fresh clone, with every Python on this machine
#   PYTHON=NAME_OR_PATH chooses the interpreter, ENGINE=cpu|cuda the vLLM to install (docs/installation.md)
.PHONY: setup train test check lint docs format lock matrix clean

PYTHON_ENV := .venv/bin/python
export PYTHON ENGINE
# Python keeps what it has compiled, also where the variable forbids it: to compile PyTorch, vLLM and DeepSpeed again in
# every process takes more than half of its start.
export PYTHONDONTWRITEBYTECODE :=

setup:
	@bash launch/setup.sh

train: setup
	@$(PYTHON_ENV) launch/cluster.py $(ARGS)

# A worker takes 1 GB of memory, so there are at most four.
WORKERS := $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
# System tests start whole runs, so they run one at a time.
test: setup
ifdef ARGS
	@$(PYTHON_ENV) -m pytest $(ARGS)
else
	@$(PYTHON_ENV) -m pytest -m "not system" -n $(WORKERS) --dist worksteal
	@$(PYTHON_ENV) -m pytest -m system
endif

lint: setup
	@$(PYTHON_ENV) -m ruff format --check .
	@$(PYTHON_ENV) -m ruff check .
	@$(PYTHON_ENV) -m mypy

# Strict by mkdocs.yml: a broken link is an error. The variable silences an advertisement of mkdocs-material.
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
