"""`pytest --postgres`: the control plane's tests on a PostgreSQL server that the run starts, in place of SQLite."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.databases import SERVER, close_all
from tests.postgres import postgres

_running = ExitStack()


@pytest.fixture(autouse=True)
def _databases_are_closed() -> Iterator[None]:
    yield
    close_all()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--postgres", action="store_true", help="run on a PostgreSQL server of the run's own")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--postgres") and not hasattr(config, "workerinput"):  # one server for all processes of a run
        try:
            os.environ[SERVER] = _running.enter_context(postgres())
        except pytest.skip.Exception as absent:
            pytest.exit(f"nothing was run on PostgreSQL: {absent}", returncode=0)


def pytest_unconfigure(config: pytest.Config) -> None:
    _running.close()
