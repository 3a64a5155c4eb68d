# Two commands for a newcomer: `make demo` and `make test`. Both create the environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_ARGS ?=
TORTURE_ARGS ?=

.PHONY: demo test torture check format clean

demo: $(READY)
	$(BIN)/python -m edge_sdk demo $(DEMO_ARGS)

test: $(READY)
	sh tests/system_packages.sh
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The full figures, up to 40 minutes on two cores; e.g. make torture TORTURE_ARGS="--only F1,F3".
torture: $(READY)
	$(BIN)/python -m tests.torture --full $(TORTURE_ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and pinned: an unpinned torch pulls gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not ((3, 11) <= v < (3, 14)))' \
	  || { echo "Symbiont needs Python 3.11 to 3.13; run make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { echo "Python lacks venv; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) .symbiont-demo demo-report.html
