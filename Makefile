# Needs Python 3.11 to 3.13 with venv, and nothing else: everything is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# More for the commands: make train ARGS="outer.steps=1000 --run-dir runs/mine"
ARGS ?=
# Processes for the tests.
JOBS ?= 2

.PHONY: help install train test test-long bench bench-gpu lint format clean

help:
	@echo "make train      install, then meta-train on Omniglot (5-way 1-shot) with local Ray workers: 5 minutes"
	@echo "make test       install, then run the tests: 8 to 17 minutes; JOBS=8: in more processes"
	@echo "make test-long  the tests that take minutes each"
	@echo "make bench      install raymeta's peers too (0.5 GB), then time them: about 45 minutes; ARGS=--quick: under 3"
	@echo "make bench-gpu  the same on a GPU; where there is none it says so and ends"
	@echo "make lint       ruff and mypy"
	@echo "make install    only install, into $(VENV)"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"raymeta needs Python 3.11 to 3.13, {sys.executable} is {v.major}.{v.minor}: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: install
	$(BIN)/raymeta train $(ARGS)

# Tests that start Ray run one after the other, in one of the processes. `make test ARGS="-m 'long or not long'"`: all.
test: install
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-long: install
	$(BIN)/python -m pytest -n $(JOBS) -m long $(ARGS)

$(VENV)/installed-bench: $(VENV)/installed
	@echo "installing the benchmark's peers into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.speed $(ARGS)

bench-gpu: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.speed --device cuda $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
