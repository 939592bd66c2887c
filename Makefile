# Two commands: `make run` answers a prompt, `make test` runs everything. Both make .venv first and are quick again.
PYTHON ?= python3
CXX ?= c++
PROMPT ?= Why does a mill need a headrace?
RUN_OPTIONS ?= --max-tokens 128
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := CMakeLists.txt pyproject.toml $(wildcard headrace/kernels/cpu/*.cpp headrace/kernels/cpu/*.h)
SANITIZED := build/sanitize
TESTS ?= tests

.PHONY: help run test quick check sanitize clean install install-test
.DELETE_ON_ERROR:

help:
	@echo "make run       install into .venv, fetch the default model, answer a prompt (PROMPT='...')"
	@echo "make test      check, then the whole test suite"
	@echo "make quick     the fast tests alone"
	@echo "make check     ruff, mypy, the architecture and public-API tests"
	@echo "make sanitize  native tests under the address and undefined-behaviour sanitizers"
	@echo "make clean     remove .venv and build"

run: install
	@echo "== headrace run \"$(PROMPT)\""
	@$(BIN)/headrace run "$(PROMPT)" $(RUN_OPTIONS)

test: check
	@echo "== all tests"
	@$(BIN)/python -m pytest $(TESTS)

quick: install-test
	@echo "== fast tests"
	@$(BIN)/python -m pytest -m "not slow" $(TESTS)

check: install-test
	@echo "== ruff, mypy, architecture, public API"
	@$(BIN)/ruff check headrace tests examples
	@$(BIN)/ruff format --check headrace tests examples
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_architecture.py tests/test_public_api.py

install: $(STAMPS)/package
install-test: $(STAMPS)/test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "headrace needs Python 3.10 or newer; try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# NOTE: the build's own needs go into .venv too: an isolated build would compile everything anew each time.
$(STAMPS)/package: $(BIN)/python $(NATIVE)
	@command -v $(CXX) >/dev/null || { echo "no C++ compiler ($(CXX)); on Debian: apt install g++" >&2; exit 1; }
	@echo "== installing headrace (builds its C++, about a minute)"
	@$(PIP) "scikit-build-core>=0.11" "nanobind>=2.4" cmake ninja
	@$(PIP) --no-build-isolation --editable .
	@mkdir -p $(STAMPS) && touch $@

# NOTE: torch is pinned to a version whose CPU build the index serves: a plain `torch` may bring gigabytes of CUDA.
$(STAMPS)/test: $(STAMPS)/package
	@echo "== installing the test extra"
	@$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@

# The extension once more, with sanitizers, beside the sources; the interpreter itself is not sanitized, hence LD_PRELOAD.
sanitize: install-test
	@echo "== building with sanitizers"
	@mkdir -p $(SANITIZED)/tree
	@rm -rf $(SANITIZED)/tree/headrace && cp -r headrace $(SANITIZED)/tree/headrace
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED)/build -G Ninja -DHEADRACE_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python >/dev/null
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED)/build
	@cp $(SANITIZED)/build/_native*.so $(SANITIZED)/tree/headrace/kernels/cpu/
	@echo "== native tests under the sanitizers"
	@cp -r tests pyproject.toml $(SANITIZED)/tree/
	@cd $(SANITIZED)/tree && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" PYTHONPATH=. \
	  $(CURDIR)/$(BIN)/python -m pytest -m "not slow" -p no:cacheprovider \
	  tests/kernels tests/ops tests/engine tests/kv_cache

clean:
	rm -rf $(VENV) build
