# Two commands do all the set-up on a fresh machine that has Python 3.11 or newer and make:
#   make demo   a running system to look at; prints the address
#   make test   linters, types and the whole suite, against $PGCHAN_TEST_DSN if set, else an embedded PostgreSQL
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto

.PHONY: help demo test faults soak fuzz versions lint check bench freeze clean

help:
	@sed -n 's/^# \{0,1\}//; /^SHELL/q; p' Makefile
	@echo "  make faults · make soak MINUTES=60 SEED=7 · make fuzz · make versions · make lint · make check ARGS='tests/test_cli.py -k tail' · make bench · make freeze · make clean"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pgchan needs Python 3.11 or newer; say which one with PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp per extra, so that a second run starts at once.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo
	@$(BIN)/pgchan demo $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# pytest comes last: its closing line is the last line that is printed.
test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup --ignore tests/faults $(ARGS)

# What breaks: faults of servers, networks and processes, each at its named point; mutants; random faults last and
# alone, for other tests would take their time.
faults: $(VENV)/.installed-dev
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup tests/faults --ignore tests/faults/test_random_faults.py $(ARGS)
	$(BIN)/pytest tests/faults/test_random_faults.py $(ARGS)

MINUTES ?= 60
SEED ?=
soak: $(VENV)/.installed-dev
	$(BIN)/python tests/faults/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

# What reads bytes from outside, for as long as it is told: make fuzz ARGS='--seconds 600 --seed 3'
fuzz: $(VENV)/.installed-dev
	$(BIN)/python tests/fuzzing.py $(ARGS)

# PostgreSQL 14 to 18, and 13, which must be refused. VERSIONS="14 15": only these. ARGS=--near: what depends on it.
versions: $(VENV)/.installed-dev
	$(BIN)/python tests/versions.py $(VERSIONS) $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/pytest $(ARGS)

bench: $(VENV)/.installed-dev
	@set -e; shopt -s nullglob; for file in benchmarks/[!_]*.py; do question=$$(basename "$$file" .py); echo "== $$question"; $(BIN)/python -m "pgchan.benchmarks.$$question" $(ARGS); done

# While a revision is unreleased its frozen SQL follows pgchan/schema.sql. A released one never changes again.
freeze: $(VENV)/.installed-dev
	$(BIN)/python tests/freeze.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .pgchan
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
