# Two commands: `make quickstart` and `make test`. Both set up .venv first, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find dataset_tools mild flows -name '*.py')
# One process more than there are processors: some tests wait for servers and for processes of their own.
PYTEST := $(BIN)/python -m pytest --numprocesses $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile --no-loadscope-reorder
.DEFAULT_GOAL := help

.PHONY: help quickstart test test-fast lint

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-11s %s\n", $$1, $$2}'

quickstart: .venv/.compiled ## build a dataset, train on it, evaluate: the whole road, on the embedded sample
	$(BIN)/mild quickstart

test: .venv/.compiled ## all tests
	$(PYTEST)

test-fast: .venv/.compiled ## the tests that start no process and no server and are not slow, for every save
	$(PYTEST) -m "not process and not server and not slow"

lint: .venv/.installed ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Bytecode is written here, once, and not by whoever imports first: containers and CI often forbid that
# (PYTHONDONTWRITEBYTECODE, read-only code), and every process would compile torch and diffusers anew.
# uv installs in a fraction of pip's time; where it cannot (an index known only to pip's configuration), pip does.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]' \
		|| $(BIN)/python -m pip install --compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -B -c "$$UNCOMPILED"
	touch $@

# Nobody compiles what is installed as editable.
.venv/.compiled: .venv/.installed $(SOURCES)
	$(BIN)/python -m compileall -q dataset_tools mild flows
	touch $@

# Names a module that was installed without its bytecode, of all that training imports.
define UNCOMPILED
import os, sys
import mild.training.loop
cached = [str(getattr(vars(module).get('__spec__'), 'cached', None)) for module in list(sys.modules.values())]
missing = sorted(path for path in cached if path.startswith(sys.prefix) and not os.path.exists(path))
sys.exit(f'{len(missing)} modules are not compiled, such as {missing[0]}: remove .venv' if missing else 0)
endef
export UNCOMPILED
