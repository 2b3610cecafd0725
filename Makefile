# Each target sets itself up: a virtual environment in .venv, dependencies, the native build.
#   make train   train a language model on this machine, stock PyTorch and fusedopt side by side (about three minutes)
#   make test    the test suite, in a process for each core (under ten minutes on two); ARGS="-x --pdb": in one process
#   make bench   the benchmarks; then `make readme` writes their figures into the README
#   make budgets  what is counted, not timed: instructions, vector loops, launches and bytes, against their budgets
#   make thorough  what make test leaves out: the CUDA sources under sanitizers, every Triton kernel for every target
#   make gpu     what a GPU machine adds: tests, compute-sanitizer, benchmarks; make lint   format and lint checks
# In an environment of your own, offline too: make gpu PY=python3 (or any other target)
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

READY := $(VENV)/.built
ifeq ($(origin PY),command line)
READY := own-environment
endif

# one process for each core, where pytest-xdist is there
WORKERS = $(shell $(PY) -c "import xdist; print('-n auto')" 2> /dev/null)

.PHONY: own-environment train test thorough bench budgets gpu gpu-test gpu-sanitize gpu-bench gpu-bench-piece lint readme clean

GPU_PIECE = $(PY) -m benchmarks all --device cuda --missing --minutes 8 $(ARGS)

train: $(READY)
	$(PY) -m fusedopt.train --compare --overwrite $(ARGS)

test: $(READY)
	$(PY) -m pytest $(WORKERS) $(ARGS)

bench: $(READY)
	$(PY) -m benchmarks all $(ARGS)

budgets: $(READY)
	$(PY) -m benchmarks budgets --check $(ARGS)

thorough: $(READY)
	$(PY) -m pytest -m thorough $(WORKERS) $(ARGS)

gpu: gpu-test gpu-sanitize gpu-bench

gpu-test: $(READY)
	$(PY) -m pytest tests/gpu $(ARGS)

# every allocation by itself, so that an access beyond it is one beyond the tensor
gpu-sanitize: $(READY)
	for tool in memcheck initcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --kernel-regex kns=fusedopt --error-exitcode 9 \
	    $(PY) tests/gpu/sanitized.py || exit; \
	done

# In pieces of minutes: each writes as it goes, and the next measures what is missing yet. Where a machine is lent for no
# longer, gpu-bench-piece is one of them; its status is 75 while more is left.
gpu-bench: $(READY)
	status=75; while test $$status = 75; do $(GPU_PIECE); status=$$?; done; exit $$status

gpu-bench-piece: $(READY)
	$(GPU_PIECE)

readme: $(READY)
	$(PY) -m benchmarks readme $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(NATIVE)) \
		$(wildcard tests/simt/*.cu tests/simt/harness/* tests/simt/include/*)

own-environment: $(NATIVE)
	$(PY) -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps -e .

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
