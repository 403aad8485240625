# Twofold: `make serve` and `make test` are all that a fresh machine needs. Python 3.11+ with venv is all they need.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
# For kernels for CUDA, which its interpreter runs in the tests; a torch built for CUDA brings its own.
TRITON ?= triton==3.6.0
HOST   ?= 127.0.0.1
PORT   ?= 8000
# Test processes: one for each core, at most four (each holds its own torch).
JOBS   ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)

VENV := .venv
BIN  := $(VENV)/bin

.PHONY: serve test fuzz setup setup-test test-gpu check peers clean
.DEFAULT_GOAL := serve

serve: setup
	$(BIN)/twofold serve --host $(HOST) --port $(PORT)

test: setup-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Thousands of requests that the OpenAPI document allows or forbids, over every route.
fuzz: setup-test
	EXAMPLES=100 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e/test_openapi.py

# On a machine with a CUDA device whose python has torch and Triton already, that one runs them.
test-gpu:
	@if $(PYTHON) -c 'import msgspec, pytest, torch, triton; assert torch.cuda.is_available()' 2>/dev/null; \
	  then $(PYTHON) -m pytest tests/gpu; \
	  else $(MAKE) --no-print-directory setup-test && $(BIN)/python -m pytest tests/gpu; fi

check: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/guards

setup: $(VENV)/.set-up
setup-test: $(VENV)/.set-up-test

# Each stamp is newer than what it was made from, so a second run does nothing.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Twofold needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)/.set-up: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m twofold.kernels.native
	@touch $@

$(VENV)/.set-up-test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname -sm)" != "Linux x86_64" ] || \
	  $(BIN)/python -m pip install --quiet --no-deps $(TRITON)
	$(BIN)/python -m twofold.kernels.native
	@touch $@ $(VENV)/.set-up

# Other engines to compare with, each in an environment of its own; then `twofold bench serving`.
peers:
	$(PYTHON) benchmarks/peers/build.py --torch '$(TORCH)'

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
