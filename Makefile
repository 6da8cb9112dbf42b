# Everything in a virtual environment of its own. It needs Python >= 3.11 with venv, a C++ compiler and make.
VENV ?= .venv
PYTHON ?= python3
GPU_PYTHON := $(shell command -v $(PYTHON))
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
TORCH_STAMP := $(VENV)/installed-torch
STAMP := $(VENV)/installed
DEV_STAMP := $(VENV)/installed-for-development
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
TRITON_TESTS := $(shell grep -l "from triton_for_tests" tests/test_*.py)
# Side by side, with one thread each: threads that wait for each other on busy cores cost many times that.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal
ONE_BY_ONE := --dist load --maxschedchunk 1   # a process that runs a long test cannot give its next tests away

.PHONY: demo test test-optional test-slow test-full test-torch test-kernels fuzz lint docs bench gpu install \
	shipped-model clean

# -- set-up

$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip "setuptools>=77,<82" pybind11 cmake ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	touch $@

SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

$(STAMP): $(TORCH_STAMP) $(SOURCES)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dalle]"
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[test]"
	touch $@

install: $(STAMP)

# -- what people run

demo: $(STAMP)   ## generate with the model that ships in the package: demo/demo.png
	$(BIN)/dalle demo --out demo

test: $(DEV_STAMP)   ## the tests that take minutes
	$(PYTEST) -m "not slow"

test-optional: $(DEV_STAMP)   ## of these, those that are skipped without the emoji font: fonts-noto-color-emoji libfribidi0
	$(PYTEST) -m "optional and not slow"

# They start first, and every process takes one test at a time, so that all end together.
LONGEST := $(addprefix tests/test_,$(addsuffix .py,cuda_sanitizers cpu_sanitizers distribution triton_compile \
	cuda_registration instruction_sets learn_shapes data_shapes))
ORDERED := $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py))

test-slow: $(DEV_STAMP)   ## the others: compilers, emulators, sanitizers, instruction sets, longer trainings
	$(PYTEST) $(ONE_BY_ONE) -m "slow and not full" $(ORDERED)
	TRITON_INTERPRET=1 $(PYTEST) $(ONE_BY_ONE) --hypothesis-profile brief -m "not slow" $(TRITON_TESTS) \
		|| [ $$? = 5 ]   # 5: no Triton, and all are skipped

test-full: test test-slow   ## all: more sizes and instruction sets, and what is slow in Triton's interpreter
	$(PYTEST) $(ONE_BY_ONE) -m full $(ORDERED)
	TRITON_INTERPRET=1 $(PYTEST) -m slow $(TRITON_TESTS) || [ $$? = 5 ]

# A copy of the tracked files, so that its build leaves the libraries here alone. Triton's version is torch's choice;
# the CUDA library, minutes of compiling, is left out unless DALLE_CUDA says otherwise.
OTHER := build/torch-$(TORCH)
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,compile conformance cuda_backend decode_attention \
	decode_schedule gumbel_softmax info nn patch patterns philox plan sample_tokens sparse_attention transforms \
	triton_backend))

test-torch:   ## the tests of the kernels with another PyTorch: TORCH=2.12
	@test -n "$(TORCH)" || { echo "name the version of PyTorch: make test-torch TORCH=2.12"; exit 2; }
	mkdir -p $(OTHER)
	git ls-files -z | xargs -0 cp --parents --update --target-directory $(OTHER)
	sed -i -e 's/^torch==.*/torch==$(TORCH).*/' $(OTHER)/constraints.txt
	DALLE_CUDA=$${DALLE_CUDA:-0} $(MAKE) -C $(OTHER) VENV=.venv test-kernels

test-kernels: $(DEV_STAMP)
	$(BIN)/python -m dalle_kernels.info
	$(PYTEST) -m "not slow" $(KERNEL_TESTS)
	$(PYTEST) -m slow -k compiles $(KERNEL_TESTS)

fuzz: $(DEV_STAMP)   ## fresh random numbers, N draws a test: prints the distribution of the errors; K=... chooses tests
	$(PYTEST) -m "not slow" --fuzz $(or $(N),3) tests/test_conformance.py $(if $(K),-k "$(K)")
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" --fuzz $(or $(N),3) tests/test_conformance.py $(if $(K),-k "$(K)")

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

docs: $(DEV_STAMP)   ## the API reference from the docstrings: docs/api
	$(BIN)/python docs/make_api.py

bench: $(DEV_STAMP)   ## operations and models against dense attention and plain PyTorch; K=... chooses benchmarks
	$(BIN)/python -m pytest -q benchmarks --benchmark-enable --benchmark-only --benchmark-quiet $(if $(K),-k "$(K)")

gpu:   ## build, check and measure on a GPU, with the Python and PyTorch that are there: docs/gpu.md
	$(GPU_PYTHON) benchmarks/run_gpu.py $(FLAGS)

include recipes/shipped_model.mk   # make shipped-model

clean:
	rm -rf build $(VENV) dalle_kernels/*.so
