"""The application, for every test of its API."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.service.in_process import Service


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made = Service(tmp_path, monkeypatch)
    yield made
    made.store._engine.dispose()
