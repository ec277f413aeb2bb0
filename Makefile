# make demo   the whole path on this machine, from text to a trained model, and everything stopped again
# make up     the same stack, left running until Ctrl-C
# make test        format, lint, types, import contracts, unit, chart, integration and e2e tests
# make test-chart  the Helm chart alone, without a cluster
# make bench       what takes minutes: full reference runs and throughput
# make soak        the fault tests in full: more kills, longer outages, the product's own clocks
# make lock        requirements/*.lock anew, from pyproject.toml and constraints.txt
# make audit       known vulnerabilities of what is locked; fails where no advisory source answers
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo up check unit servers postgres test test-chart openapi bench soak lock audit clean

demo: .venv/local
	$(BIN)/lockstep-server demo

up: .venv/local
	$(BIN)/lockstep-server up

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit -q -c pyproject.toml -r api service workers

unit: .venv/dev
	$(BIN)/pytest -n 2 tests/unit tests/chart

test-chart: .venv/dev
	$(BIN)/pytest -rs tests/chart

# What the tests start beside Python packages. Where it is missing and this is not root, they skip and say so.
servers:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && command -v prometheus >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -q && \
	    apt-get install -y -q --no-install-recommends postgresql prometheus; } || \
	  echo "install PostgreSQL and Prometheus (Debian: postgresql, prometheus) to run every test"

# The control plane's tests once more, on a PostgreSQL server of their own.
postgres: .venv/dev servers
	$(BIN)/pytest --postgres -n 2 -m database tests/unit

# Unit tests side by side; those that share a machine's time with real processes one after the other.
test: servers check unit postgres
	$(BIN)/pytest tests/integration tests/e2e

openapi: .venv/local
	$(BIN)/lockstep-server openapi > api/openapi.json

bench: .venv/dev
	$(BIN)/pytest tests/bench

soak: .venv/dev
	LOCKSTEP_SOAK=1 $(BIN)/pytest -m soak tests/unit tests/integration tests/e2e

lock: .venv/dev
	$(BIN)/python requirements/lock.py

audit: .venv/dev
	$(BIN)/pip-audit --strict --require-hashes --disable-pip -r requirements/service.lock -r requirements/workers.lock -r requirements/torch.lock

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
