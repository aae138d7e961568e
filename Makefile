# make demo | test | lint | bench | targets | quality: each sets up .venv first, if it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench targets quality

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

setup: $(READY) ## .venv with lorap and everything the other targets need

# torch 2.13.0 is installed only where none is: an existing build, with or without CUDA, is kept.
$(READY): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel 'cmake>=3.24' ninja
	LORAP_REQUIRE_BUILD=$(if $(shell command -v c++),1,0) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(READY) ## compress SmolLM2-135M, judge it, save it, load it, let it speak
	$(BIN)/python benchmarks/demo.py

lint: $(READY) ## format, lint and types
	$(BIN)/pre-commit run --all-files

test: lint ## lint, then all tests, and each benchmark once
	$(BIN)/python benchmarks/assets.py
	$(BIN)/pytest tests --ignore=tests/triton_interpreter
	TRITON_INTERPRET=1 $(BIN)/pytest tests/triton_interpreter --quiet
	$(BIN)/pytest benchmarks --benchmark-disable --quiet

bench: $(READY) ## measure kernels, layers and the factorization against their alternatives
	run=$$(mktemp) && $(BIN)/pytest benchmarks --benchmark-only --benchmark-quiet --benchmark-json=$$run && \
		$(BIN)/python benchmarks/table.py $$run; status=$$?; rm -f $$run; exit $$status

targets: $(READY) ## measure what the CPU kernels are meant to reach, contenders interleaved
	$(BIN)/python benchmarks/targets.py

quality: $(READY) ## compare recipes over calibrations and texts; resumable, hours on two cores (QUICK=1: five minutes)
	$(BIN)/python benchmarks/quality/matrix.py $(if $(QUICK),--quick)
