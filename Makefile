# Everything happens in .venv inside this clone. A stamp under .venv says what is installed; what is up to date is not
# done again. PYTHON chooses the interpreter: make test PYTHON=python3.13

PYTHON ?= python3
BIN := .venv/bin
STAMPS := .venv/stamps

# What builds the package. pip checks this list against pyproject.toml; CMake and Ninja come along so that a fresh
# machine needs neither. The build runs without isolation: what has not changed is then not compiled again.
BUILD_REQUIRES := "scikit-build-core>=0.11" "pybind11>=3.0.2" "numpy>=2.0" "cmake>=3.22" ninja

# Two processes, each with its half of the files in order: what a file compiles for its tests is compiled once, mostly.
WORKERS := -n 2 --dist worksteal

SOURCES := pyproject.toml CMakeLists.txt \
  $(shell find csrc python -type f -not -name '*.py[co]' -not -name '*.so')
CXX_FILES := $(shell find csrc tests benchmarks/gpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help test proof asan tsan coverage fuzz mutants lint format bench bench-check instructions gpu accuracy demo peers clean

help:  ## say what there is
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

test: $(STAMPS)/package $(STAMPS)/test  ## set up, then run the tests and the examples of the docstrings
	$(BIN)/python -m pytest $(WORKERS) --doctest-modules tests --pyargs normfast

# A file stays on one process: its largest arrays are then not there twice.
proof: $(STAMPS)/package $(STAMPS)/test  ## what takes too long for every push: an hour of endurance, emulated CPUs, mutations
	$(BIN)/python -m pytest -n 2 --dist loadfile -rP -m proof tests

asan tsan: CODE_PATH = $(shell $(BIN)/python -c "import normfast; print(normfast.show_config('dicts')['code_path'])")
asan: RUNTIME := libasan.so
asan: TESTS := tests
tsan: RUNTIME := libtsan.so
asan tsan: MARK ?= not slow
tsan: TESTS := tests/test_threads.py tests/test_memory.py tests/test_parameter_gradients.py tests/test_batch_norm.py
asan tsan: %san: $(STAMPS)/package $(STAMPS)/test  ## the tests under AddressSanitizer with UBSan, or ThreadSanitizer
	$(BIN)/cmake --preset $@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DNORMFAST_CUDA=OFF \
	  -DNORMFAST_CODE_PATHS=$(CODE_PATH) \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/$@
	mkdir -p build/$@/site/normfast
	cp build/$@/_core*.so python/normfast/*.py* python/normfast/py.typed build/$@/site/normfast/
	LD_PRELOAD="$$(gcc -print-file-name=$(RUNTIME)) $$(gcc -print-file-name=libstdc++.so)" PYTHONPATH=build/$@/site \
	  NORMFAST_CODE_PATHS=$(CODE_PATH) \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(BIN)/python -m pytest $(WORKERS) -m "$(MARK)" -p no:cacheprovider --ignore tests/cuda $(TESTS)

coverage: $(STAMPS)/package $(STAMPS)/test  ## branch coverage of bindings, dispatch, threads and memory; half an hour
	$(BIN)/python -m pip install --quiet "gcovr>=8.8"
	$(BIN)/cmake --preset $@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DNORMFAST_CUDA=OFF \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/$@
	find build/$@ -name '*.gcda' -delete
	mkdir -p build/$@/site/normfast
	cp build/$@/_core*.so python/normfast/*.py* python/normfast/py.typed build/$@/site/normfast/
	cp tests/coverage/sitecustomize.py build/$@/site/
	PYTHONPATH=build/$@/site $(BIN)/python -m pytest -p no:cacheprovider --ignore tests/cuda \
	  --ignore tests/test_instructions.py --ignore tests/test_readme.py tests
	$(BIN)/gcovr --config tests/coverage/gcovr.cfg --root . --txt-metric branch \
	  --object-directory build/$@ build/$@/CMakeFiles/_core.dir/csrc --txt-summary

fuzz: $(STAMPS)/package $(STAMPS)/test  ## fuzz the public functions for ten minutes, guided by atheris where it installs
	-$(BIN)/python -m pip install --quiet atheris
	mkdir -p build/fuzz
	$(BIN)/python tests/fuzz/fuzz_api.py --seconds 600 --seed $$(date +%s) --around 1000 \
	  $$($(BIN)/python -c 'import atheris' 2> /dev/null && echo --guided build/fuzz/corpus)

mutants: $(STAMPS)/package $(STAMPS)/test  ## change the library in 200 small ways: do the tests notice? an hour and more
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/_mutation.py --sample 200 --seed 1 --out build/mutants.json

lint: $(STAMPS)/lint  ## ruff, mypy in strict mode, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(STAMPS)/lint  ## let ruff and clang-format write
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(STAMPS)/package $(STAMPS)/bench  ## the benchmark board, against every peer that is installed (see peers)
	$(BIN)/python -m benchmarks

bench-check: $(STAMPS)/package $(STAMPS)/bench  ## a short run of the board, after a check that all peers agree
	$(BIN)/python -m benchmarks --set quick --check-only --out build/check.json
	$(BIN)/python -m benchmarks --set quick --threads 1 --modes installed --rounds 3 --budget 0.1 --out build/short.json

instructions: $(STAMPS)/package $(STAMPS)/bench  ## count instructions (needs valgrind), compare with the stored counts
	$(BIN)/python -m benchmarks.instructions check

# With what is installed for PYTHON, and no network: nothing of this goes through .venv.
gpu:  ## on a machine with an NVIDIA GPU: build, tests on the device, compute-sanitizer, board; nine minutes
	NORMFAST_COMMIT="$(or $(COMMIT),$(NORMFAST_COMMIT))" $(PYTHON) -m benchmarks.gpu.stages

accuracy: $(STAMPS)/package $(STAMPS)/bench  ## write the tables of errors in docs/numerics.md and README.md
	$(BIN)/python -m benchmarks.accuracy

demo: $(STAMPS)/package $(STAMPS)/demo  ## train networks on handwritten digits; pictures go to demo-output/
	$(BIN)/python -m examples.digits

peers: $(STAMPS)/package  ## install what the board compares against: PyTorch, Numba, JAX, ONNX Runtime, oneDNN
	$(BIN)/python -m pip install torch==2.13.0 numba jax onnxruntime onnx onednn-devel scikit-learn

clean:  ## remove .venv and all build products
	rm -rf .venv build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

# ---- set-up

# Dependency groups need pip 25.1.
$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "normfast needs Python 3.10 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/build: $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet $(BUILD_REQUIRES)
	touch $@

$(STAMPS)/package: $(STAMPS)/build $(SOURCES)
	@echo "Building normfast: some four minutes from scratch on two CPUs, and as much again for CUDA where nvcc is found."
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall \
	  --no-build-isolation --check-build-dependencies .
	touch $@

$(STAMPS)/test $(STAMPS)/lint: $(STAMPS)/%: $(STAMPS)/build pyproject.toml
	$(BIN)/python -m pip install --quiet --group $*
	touch $@

# The package is there already: pip adds what the extra asks for and builds nothing.
$(STAMPS)/bench $(STAMPS)/demo: $(STAMPS)/%: $(STAMPS)/package
	$(BIN)/python -m pip install --quiet "normfast[$*]"
	touch $@
