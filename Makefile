# make venv   a virtual environment in .venv      make test   the tests
# make demo   every command on small models       make check  all that CI runs
# make site   the docs as a site in .cache/site  make bench  the speed, on SD 1.5, in minutes
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help venv demo test check lint format format-check types docs site bench fuzz clean

help:
	@sed -n '/^PYTHON/q; s/^# //p' Makefile

venv: $(STAMP)

# Torch first, so that the rest is resolved around it. TORCH_INDEX names an index of other builds.
TORCH_INDEX ?=

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) -e '.[dev,peers,site]'
# It pins other versions of what is here already, for things that the tests do not use.
	$(PIP) --no-deps mergekit
	touch $(STAMP)

demo: $(STAMP)
	$(RUN) examples/demo.py

# A worker a core.
test: $(STAMP)
	$(RUN) -m pytest -n auto

check: lint format-check types docs site test

lint: $(STAMP)
	$(RUN) -m ruff check

format: $(STAMP)
	$(RUN) -m ruff format

format-check: $(STAMP)
	$(RUN) -m ruff format --check

types: $(STAMP)
	$(RUN) -m mypy

docs: $(STAMP)
	$(RUN) docs/generate.py --check

# Into .cache/site; `.venv/bin/mkdocs serve` shows the pages while they are written.
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

bench: $(STAMP)
	$(RUN) -m benchmarks

# A coverage-guided fuzzer for so many seconds a target; never part of `check`.
FUZZ_SECONDS ?= 300
fuzz: $(STAMP)
	$(PIP) -e '.[fuzz]'
	$(RUN) -m tests.fuzz $(FUZZ_SECONDS)

# The venv stays: `rm -r .venv` to start from nothing.
clean:
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
