# From a bare clone, with only Python >= 3.11 and make, on macOS (arm64) and Linux (x86-64, arm64):
#
#   make quickstart    distil the embedded teacher; a few minutes, no network after installation
#   make test          the fast tests
#   make test-slow     the slow ones
#   make check         style, types and the fast tests
#   make lint          style and types alone
#   make clean         remove the environment and what tools left; runs/ stays
#
# On Linux with an NVIDIA GPU: make quickstart BACKEND=cuda13
# Another Python: make quickstart PYTHON=/path/to/python3

SHELL := /bin/sh
BACKEND ?= cpu
BIN := .venv/bin

# Metal comes with mlx on macOS; on Linux an extra says which backend.
ifeq ($(shell uname -s),Darwin)
EXTRAS := report
else
EXTRAS := $(BACKEND),report
endif

# Two files of tests at a time; one BLAS thread each, as two that share a busy core wait for each other.
JOBS ?= 2
PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

.PHONY: quickstart test test-slow check lint clean

quickstart: .venv/installed-$(BACKEND)
	$(BIN)/python -m mlx_distill run recipes/quickstart.yaml --overwrite
	@echo
	@echo "The report: runs/quickstart/report.html"

test: .venv/installed-$(BACKEND)-dev
	$(PYTEST)

test-slow: .venv/installed-$(BACKEND)-dev
	$(PYTEST) -m slow

check: lint test

lint: .venv/installed-$(BACKEND)-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed-$(BACKEND): .venv/made pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

.venv/installed-$(BACKEND)-dev: .venv/made pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$(EXTRAS),dev]'
	@touch $@ .venv/installed-$(BACKEND)

# The first Python that is new enough, and on a Mac runs natively: MLX has no wheels for x86-64 there.
# An environment that is there and has pip is used as it is.
USABLE := import platform, sys; \
  sys.exit(sys.version_info < (3, 11) or (sys.platform == "darwin" and platform.machine() != "arm64"))

.venv/made:
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; \
	  for python in $(if $(PYTHON),'$(PYTHON)',python3.13 python3.12 python3.11 python3.14 python3 python); do \
	    if "$$python" -c '$(USABLE)' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no Python >= 3.11 found (on a Mac a native arm64 one); install one from python.org," >&2; \
	    echo "       or name it: make PYTHON=/path/to/python3" >&2; \
	    exit 2; \
	  fi; \
	  echo "making .venv with $$("$$found" --version)"; \
	  "$$found" -m venv .venv || exit 2; \
	fi
	@touch $@
