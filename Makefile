# make demo   the whole path on this machine, from text to a trained model, and everything stopped again
# make up     the same stack, left running until Ctrl-C
# make test   format, lint, types, import contracts, unit, integration and e2e tests
# make bench  what takes minutes: full reference runs and throughput
# make soak   the fault tests in full: more kills, longer outages, the product's own clocks
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo up check unit test openapi bench soak clean

demo: .venv/local
	$(BIN)/lockstep-server demo

up: .venv/local
	$(BIN)/lockstep-server up

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: .venv/dev
	$(BIN)/pytest -n 2 tests/unit

# Unit tests side by side; those that share a machine's time with real processes one after the other.
test: check unit
	$(BIN)/pytest tests/integration tests/e2e

openapi: .venv/local
	$(BIN)/lockstep-server openapi > api/openapi.json

bench: .venv/dev
	$(BIN)/pytest tests/bench

soak: .venv/dev
	LOCKSTEP_SOAK=1 $(BIN)/pytest -m soak tests/integration tests/e2e

clean:
	rm -rf .venv build *.egg-info

# Plain pip: a resolver that prefers another index could bring torch's CUDA build to a machine without a GPU.
.venv/local: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Lockstep needs Python 3.11 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q --progress-bar on -c constraints.txt -e '.[local]'
	@touch $@

.venv/dev: .venv/local
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@
