"""The schema: what the code says of it is what the migrations make, and rows of before stay whole."""

import dataclasses
import hashlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import OperationalError

import service.database
from api.tenants import Quotas, Role
from service.auth import authenticate
from service.database import make_engine, migrate
from service.rows import NewEvent
from service.store import Store
from service.tables import metadata
from service.tenants import Tenants
from tests.checkpoints import ref
from tests.databases import database_url, make_schema, on_postgres
from tests.fakes import ACCEPTED, T0, job_id, row

pytestmark = pytest.mark.database


@pytest.fixture
def url(tmp_path: Path) -> str:
    if on_postgres():
        make_schema(tmp_path)
    return database_url(tmp_path)


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    made = make_engine(url)
    yield made
    made.dispose()


def insert(engine: sa.Engine, table: str, **values: Any) -> None:
    """Insert a row into a table as the schema of then has it, which may have fewer columns."""
    found = sa.Table(table, sa.MetaData(), autoload_with=engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(found).values({name: values[name] for name in values if name in found.c}))


def test_the_tables_agree_with_the_migrations(engine: sa.Engine, url: str) -> None:
    migrate(url)
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_schema_of_a_newer_release_is_left_as_it_is(engine: sa.Engine, url: str) -> None:
    """So that a release can be taken back: each schema serves the release before it, too."""
    migrate(url)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE jobs ADD COLUMN of_tomorrow INTEGER"))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    migrate(url)
    with engine.begin() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one() == "9999"
    store = Store(engine)
    assert store.insert(row(1), ACCEPTED, None) is None
    assert store.live() == [row(1)]


def test_migrating_twice_changes_nothing(engine: sa.Engine, url: str) -> None:
    migrate(url)
    insert(engine, "jobs", **dataclasses.asdict(row(1)))
    before = Store(engine).live()
    migrate(url)
    assert Store(engine).live() == before == [row(1)]


def test_the_rows_of_the_first_schema_stay_as_they_are(engine: sa.Engine, url: str) -> None:
    migrate(url, "0001")
    job = row(1, labels={"a": "b"}, state="running", retention=None)
    insert(engine, "jobs", **dataclasses.asdict(job))
    migrate(url)
    store = Store(engine)
    assert store.live() == [job]
    assert store.retained() == []
    assert store.apply(store.live()[0], {"message": "and on"}, [NewEvent("note", "it goes")]) is not None


def test_the_jobs_and_pins_of_before_there_was_control_go_on(engine: sa.Engine, url: str) -> None:
    """A job has been in the line since it was created, and nobody has asked anything of it."""
    migrate(url, "0002")
    jobs = [
        row(1, state="running", attempt=2, faults=1, ray_session="s", created_at=T0 - timedelta(hours=1)),
        row(2, state="failed", reason="worker_lost", history_end={"segment": "1-0-a", "step": 4}),
        row(3),
    ]
    for job in jobs:
        insert(engine, "jobs", **dataclasses.asdict(job))
    pin = {"id": "p", "job_id": job_id(2), "segment": "1-0-a", "step": 4, "why": "download"}
    insert(engine, "pins", **pin, expires_at=T0 + timedelta(hours=1))
    migrate(url)
    store = Store(engine)
    assert store.live() == [jobs[0], jobs[2]]
    running, failed = store.live()[0], store.get(job_id(2), "default")
    assert (running.queued_at, running.workers, running.pause_requested) == (T0 - timedelta(hours=1), None, 0)
    assert failed == jobs[1]
    assert store.pinned(job_id(2), T0) == {ref("1-0-a@4")}
    assert store.request_pause(job_id(1))
    ended = store.apply(store.live()[0], {"state": "cancelled"})
    assert ended is not None
    assert store.pinned(job_id(2), T0) == {ref("1-0-a@4")}, "it is nobody's"


def test_the_keys_of_before_there_were_roles_may_all_and_every_project_is_there(engine: sa.Engine, url: str) -> None:
    migrate(url, "0003")
    key = {"id": "key-1", "name": "old", "sha256": hashlib.sha256(b"lk_old").hexdigest(), "created_at": T0}
    insert(engine, "api_keys", **key, project="default")
    insert(engine, "api_keys", **{**key, "id": "key-2", "sha256": "0" * 64}, project="keys-only", revoked_at=T0)
    insert(engine, "api_keys", **{**key, "id": "key-3", "sha256": "1" * 64, "name": "bootstrap"}, project="default")
    jobs = [row(1), row(2, project="jobs-only")]
    for job in jobs:
        insert(engine, "jobs", **dataclasses.asdict(job))
    migrate(url)
    tenants = Tenants(engine)
    assert [project.name for project in tenants.projects()] == ["default", "jobs-only", "keys-only"]
    assert {project.quotas for project in tenants.projects()} == {Quotas()}
    who = authenticate(tenants, "Bearer lk_old")
    assert (who.key_id, who.project, who.role, who.member) == ("key-1", "default", Role.ADMIN, None)
    assert [entry.revoked_at for _, entry in tenants.keys("keys-only")] == [T0]
    assert [(entry.id, entry.operator) for _, entry in tenants.keys("default")] == [("key-1", False), ("key-3", True)]
    assert Store(engine).live() == jobs
    assert Store(engine).insert(row(3), NewEvent("state", "accepted"), None) is None


@pytest.mark.skipif(not on_postgres(), reason="SQLite's readers hold up no writer")
def test_a_migration_does_not_wait_behind_a_dump_for_long(
    engine: sa.Engine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever came after it would wait, too."""
    migrate(url, "0005")
    options = service.database._POSTGRES_OPTIONS.replace("lock_timeout=10s", "lock_timeout=50ms")
    monkeypatch.setattr(service.database, "_POSTGRES_OPTIONS", options)
    with engine.begin() as dump:
        dump.execute(sa.text("LOCK TABLE jobs IN ACCESS SHARE MODE"))
        with pytest.raises(OperationalError, match="lock timeout"):
            migrate(url)
    migrate(url)
    assert Store(engine).live() == []
