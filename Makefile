# `make run` and `make test` set up everything they need; nothing has to be installed first but Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup run test check package clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job: calibrate SmolLM2-135M at half the memory, on whatever device there is.
run: setup
	mkdir -p out
	$(BIN)/kvprofile calibrate smollm2-135m --budget 0.5 --output out/smollm2-135m.json --report --force

# What a change has to pass: style, types, tests.
test: setup check
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Wheel and source distribution: built, complete, and tried in an environment of their own.
package: setup
	$(BIN)/python -m tests.package

clean:
	rm -rf $(VENV) out build *.egg-info
