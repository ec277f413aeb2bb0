"""The application, for every test of its API, and its log."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lines import Lines
from tests.unit.service.in_process import Service


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service(tmp_path, monkeypatch)
    yield made
    made.store._engine.dispose()


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What the control plane logs while a test runs."""
    handler, ours = Lines(), logging.getLogger("lockstep.service")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    yield handler
    ours.removeHandler(handler)
    ours.setLevel(level)
