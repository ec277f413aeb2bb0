"""One real S3 server for all integration tests, and a part of its bucket of one's own for each test."""

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.storage import Bucket
from tests.integration.served import Served, control_plane
from tests.servers import BUCKET, S3, use_store
from tests.servers import s3_server as serve_s3


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server for the whole session."""
    with serve_s3(tmp_path_factory.mktemp("store") / "s3") as server:
        yield server


@pytest.fixture
def storage(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty part of the bucket; the environment holds the keys to it."""
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    monkeypatch.setenv("LOCKSTEP_STORAGE", url)
    use_store(s3_server, monkeypatch)
    return url


@pytest.fixture
def bucket(storage: str) -> Bucket:
    return Bucket(storage)


@pytest.fixture
def served(storage: str, tmp_path: Path) -> Iterator[Served]:
    """A control plane that serves the bucket."""
    with control_plane(storage, tmp_path) as serving:
        yield serving


@pytest.fixture(autouse=True)
def _no_log_handlers_left() -> Iterator[None]:
    """A run that dies leaves its log handler behind, as a process that dies would not."""
    yield
    logger = logging.getLogger("lockstep")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
