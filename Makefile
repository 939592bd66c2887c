# Two commands: `make run` answers a prompt, `make test` runs everything. `make help` lists the others.
#
# Both make .venv first. Everything can be repeated and is quick the second time: what is done leaves a stamp in .venv or build/.

PYTHON ?= python3
PROMPT ?= Why does a mill need a headrace?
RUN_OPTIONS ?= --max-tokens 128
TESTS ?= tests
export PROMPT

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
PYTHON_FILES := headrace tests $(wildcard examples)
STAMPS := .venv/stamps
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# Building outside pip's isolation keeps the objects of the last build; the tools are those pyproject.toml names.
BUILD_TOOLS := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',') cmake ninja
NATIVE := CMakeLists.txt $(wildcard headrace/kernels/cpu/*.cpp headrace/kernels/cpu/*.h)
INSTALL := install --no-build-isolation --editable

# What the sanitizers look at: everything that hands arrays or files to native code. Of attention's thousands of cases
# only the fuzz, which draws more shapes than they name; of GPU kernels nothing: they have none of it.
SANITIZED := tests/kernels tests/ops tests/engine \
             tests/weights/test_gguf.py tests/weights/test_gguf_writer.py tests/weights/test_load.py tests/weights/test_quantize.py
UNSANITIZED := tests/kernels/triton tests/kernels/gluon tests/kernels/test_torch_* tests/ops/test_gpu_* tests/ops/test_device_*

.PHONY: help run test quick check map bench browser picture sanitize clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

run: $(STAMPS)/installed ## answer PROMPT with the default model (RUN_OPTIONS: how)
	@printf '· headrace run %s "%s"\n' "$(RUN_OPTIONS)" "$$PROMPT" >&2
	@$(BIN)/headrace run $(RUN_OPTIONS) "$$PROMPT"

test: check ## everything: the checks, then the whole test suite
	@echo "· all tests"
	@$(BIN)/python -m pytest --hypothesis-seed=0 $(TESTS)

quick: $(STAMPS)/test-installed ## the fast tests alone
	@echo "· the fast tests"
	@$(BIN)/python -m pytest -m "not slow" $(TESTS)

check: $(STAMPS)/test-installed ## ruff, mypy, architecture and public API
	@echo "· ruff: rules and format"
	@$(BIN)/ruff check --quiet $(PYTHON_FILES)
	@$(BIN)/ruff format --quiet --check $(PYTHON_FILES)
	@echo "· mypy"
	@$(BIN)/mypy
	@echo "· architecture and public API"
	@$(BIN)/python -m pytest tests/test_architecture.py tests/test_public_api.py

map: $(STAMPS)/test-installed ## bring the tables in README.md and docs/server.md up to date
	@$(BIN)/python -m headrace.check.layout --write
	@$(BIN)/python -m headrace.check.support --write
	@$(BIN)/python -m headrace.check.server_docs --write

bench: $(STAMPS)/installed ## measure the default model beside this machine's limits
	@$(BIN)/headrace bench model

# The chat page is tested in a real browser where there is one; without one those tests are skipped and say so.
browser: ## chromium for the chat page's tests, from Debian or Ubuntu; needs root
	@if command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null; then exit; fi; \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then echo "· no chromium here: the chat page is not tested in a browser"; exit; fi; \
	  echo "· chromium"; export DEBIAN_FRONTEND=noninteractive; mkdir -p build; \
	  install() { apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >> build/browser.log 2>&1; }; \
	  install || { apt-get update -qq >> build/browser.log 2>&1 && install; } || \
	  echo "· chromium could not be installed (build/browser.log): the chat page is not tested in a browser"

picture: $(STAMPS)/test-installed ## the README's picture of the chat page, anew; while nothing else runs, for it shows the speed
	@$(BIN)/python tests/server/page_picture.py

# NOTE: -S keeps the editable install out of the way: it would put the plain extension before the sanitized one.
sanitize: build/sanitize/stamp ## the native code's tests under the address and undefined-behaviour sanitizers
	@echo "· tests on the sanitized build"
	@rm -rf build/sanitize/tree && mkdir -p build/sanitize/tree && cp -R headrace tests pyproject.toml build/sanitize/tree/
	@cp build/sanitize/_native*.so build/sanitize/tree/headrace/kernels/cpu/
	@packages="$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"; cd build/sanitize/tree; \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$$packages" \
	  "$(CURDIR)/$(BIN)/python" -S -m pytest -p no:cacheprovider -m "not slow or combination" \
	    -k "not (attention and within_budget)" $(UNSANITIZED:%=--ignore-glob="*/%") $(SANITIZED)

clean: ## remove everything made here, .venv included
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find headrace tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "headrace needs Python 3.10 or newer; this is $$($(PYTHON) --version 2>&1 || echo 'not there'). Another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo 'int main() { return 0; }' | $(CXX) -std=c++17 -fsyntax-only -x c++ - 2>/dev/null || \
	  { echo "headrace builds native code and needs a C++17 compiler; '$(CXX)' is none. Install g++ or clang++, or: make CXX=..." >&2; exit 1; }
	@echo "· .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { echo "making .venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

$(STAMPS)/build-tools: pyproject.toml Makefile | $(STAMPS)/venv
	@echo "· build tools"
	@$(PIP) install $(BUILD_TOOLS)
	@touch $@

$(STAMPS)/installed: pyproject.toml $(NATIVE) | $(STAMPS)/build-tools
	@echo "· headrace, with its native code (about a minute the first time)"
	@CXX="$(CXX)" $(PIP) $(INSTALL) .
	@touch $@

# NOTE: torch is pinned to a version whose CPU build the index serves: a plain `torch` may bring gigabytes of CUDA.
$(STAMPS)/test-installed: pyproject.toml | $(STAMPS)/installed
	@echo "· what the tests need"
	@CXX="$(CXX)" $(PIP) $(INSTALL) ".[test]"
	@touch $@

build/sanitize/stamp: pyproject.toml $(NATIVE) | $(STAMPS)/test-installed
	@test -f "$$($(CXX) -print-file-name=libasan.so)" || \
	  { echo "make sanitize needs g++ with its sanitizer libraries; '$(CXX)' has none" >&2; exit 1; }
	@echo "· native code with sanitizers, in build/sanitize"
	@mkdir -p build/sanitize
	@CXX="$(CXX)" $(BIN)/cmake -S . -B build/sanitize -G Ninja -DHEADRACE_SANITIZE=ON \
	  -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" > build/sanitize/configure.log
	@$(BIN)/cmake --build build/sanitize > build/sanitize/build.log || { tail -40 build/sanitize/build.log; exit 1; }
	@touch $@
