# Everything in a virtual environment of its own; nothing else has to be installed by hand but Python >= 3.10, a C++ compiler and make.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
STAMP := $(VENV)/installed
DEV_STAMP := $(VENV)/installed-for-development

.PHONY: demo test test-full lint bench install clean

# -- set-up

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip "setuptools>=77,<82" pybind11 cmake ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy

SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable .
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[test,plots]"
	touch $@

install: $(STAMP)

# -- what people run

demo: $(STAMP)   ## train a tiny model on emoji and draw with it: demo/demo.png
	$(BIN)/dalle demo --out demo

test: $(DEV_STAMP)   ## the tests that take minutes
	$(BIN)/python -m pytest -q -m "not slow"

test-full: $(DEV_STAMP)   ## all tests
	$(BIN)/python -m pytest -q

lint: $(DEV_STAMP)
	$(BIN)/ruff check .

bench: $(DEV_STAMP)   ## operations against dense attention and plain PyTorch
	$(BIN)/python -m pytest -q benchmarks --benchmark-enable --benchmark-only

clean:
	rm -rf build $(VENV) dalle_kernels/*.so
