# Each target sets itself up: a virtual environment in .venv, dependencies, the native build.
#   make train   train a language model on this machine, stock PyTorch and fusedopt side by side (about three minutes)
#   make test    the test suite (under ten minutes on two cores)
#   make bench   the benchmarks; then `make readme` writes their figures into the README
#   make triton  every Triton kernel compiled for every kind of GPU, none needed; make test compiles a selection
#   make gpu     what a GPU machine adds to the tests; make lint   format and lint checks
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt

NATIVE := setup.py $(wildcard build_tools/*.py) $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Where there is no GPU, the kernels are compiled for the tests to read only: one architecture will do.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep '^[0-9]')
ifeq ($(FUSEDOPT_CUDA_ARCHS)$(TORCH_CUDA_ARCH_LIST)$(GPUS),)
export FUSEDOPT_CUDA_ARCHS := 90
endif

.PHONY: train test bench triton gpu lint readme clean

train: $(VENV)/.built
	$(PY) -m fusedopt.train --compare --overwrite $(ARGS)

test: $(VENV)/.built
	$(PY) -m pytest $(ARGS)

bench: $(VENV)/.built
	$(PY) -m benchmarks all $(ARGS)

triton: $(VENV)/.built
	$(PY) -m pytest -m slow_compile $(ARGS)

gpu: $(VENV)/.built
	$(PY) -m pytest -m cuda $(ARGS)

readme: $(VENV)/.built
	$(PY) -m benchmarks readme $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(NATIVE))

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fusedopt needs Python 3.10 or newer; this is " + sys.version.split()[0] + " (make PYTHON=...)" or 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' wheel ninja 'pybind11>=3.0'
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

# the second build compiles only what changed
$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info fusedopt/_native*.so fusedopt/_build_info.json
