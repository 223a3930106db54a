# Everything runs in .venv, which `make setup` makes from the hashes in requirements.lock. `make` alone lists the targets.

# torch comes first, on its own: another package would pull a build of several GB for graphics cards. For another build
# (processors only, another CUDA), name its index: make setup TORCH_INSTALL_ARGS="--index-url …"
TORCH := torch==2.13.0
TORCH_INSTALL_ARGS ?=
# The Python to make .venv from; empty: the first that fits of those below.
PYTHON ?=
PYTHONS := python3.11 python3.12 python3.13 python3 python
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-complete
UNFINISHED := $(VENV)/.setup-unfinished
QUIET := $(if $(CI),--quiet,$(if $(MAKE_TERMOUT),,--quiet))
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
UV ?= $(firstword $(wildcard $(BIN)/uv) uv)

# torch's own requirements, which its build brings along; the lock leaves them to it.
TORCH_PACKAGES := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti \
  nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver \
  nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx

export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help setup report test bench notebook check lock browser clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP) ## make .venv with everything in it; a second run does nothing

$(SETUP): pyproject.toml requirements.lock
	@set -eu; \
	if [ -e $(UNFINISHED) ]; then echo "The last setup did not finish: starting again."; rm -rf $(VENV); fi; \
	if [ -e $(VENV) ] && $(BIN)/python -c '$(FITS)' 2>/dev/null; then :; else \
	  found=; \
	  for python in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	    if "$$python" -c '$(FITS)' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "Python 3.11, 3.12 or 3.13 with venv and ensurepip is needed; tried: $(or $(PYTHON),$(PYTHONS))." >&2; \
	    echo "Install one (on Debian: apt-get install python3 python3-venv), or name it: make setup PYTHON=…" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$found ($$("$$found" --version 2>&1))"; \
	  "$$found" -m venv --clear $(VENV); \
	fi; \
	touch $(UNFINISHED)
	$(PIP) install $(QUIET) $(TORCH_INSTALL_ARGS) $(TORCH)
	$(PIP) install $(QUIET) --no-deps --require-hashes -r requirements.lock
	$(PIP) install $(QUIET) --no-deps -e .
	$(PIP) check
	@rm -f $(UNFINISHED) && touch $@

report: $(SETUP) ## write a report on a model: make report [MODEL=…] [DEVICE=…] [OUT=reports]
	$(BIN)/python -m analyses.report $(if $(MODEL),--model "$(MODEL)") $(if $(DEVICE),--device "$(DEVICE)") \
	  --out "$(or $(OUT),reports)"

test: $(SETUP) ## run all tests, notebooks and docstring examples
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(SETUP) ## print speed and memory against other tools
	$(BIN)/python -m tests.benchmarks

notebook: $(SETUP) ## open the notebooks in JupyterLab
	cd notebooks && ../$(BIN)/python -m jupyter lab

check: $(SETUP) ## lint, format, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy interp
	$(BIN)/lint-imports

lock: ## pin every dependency with its hashes again (needs uv)
	@command -v $(UV) >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	$(UV) pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-header \
	  --quiet $(addprefix --no-emit-package ,$(TORCH_PACKAGES)) --output-file requirements.lock

browser: ## install Chromium, with which the tests open reports
	@set -eu; \
	for browser in chromium chromium-browser google-chrome google-chrome-stable; do \
	  if command -v $$browser >/dev/null; then echo "Browser: $$(command -v $$browser)"; exit 0; fi; \
	done; \
	if ! command -v apt-get >/dev/null; then \
	  echo "No Chromium found, and no apt-get to install it with: install Chromium or Chrome yourself." >&2; exit 1; \
	fi; \
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	$$sudo apt-get update -qq </dev/null; \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium </dev/null

clean: ## remove caches and build leftovers; .venv and reports stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache *.egg-info
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print | xargs rm -rf
