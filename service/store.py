"""The store: every read and write of the database. Each write of a job is guarded by its version.

A decision was made on what was read; if the row has changed since, the update matches nothing and the decision is
dropped. A terminal state is never left, whatever version the writer holds.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import IntegrityError

from api.documents import now
from api.jobs import ENDED, Event, JobState
from api.spec import PrepareSpec, TrainSpec, job_spec_adapter
from service.tables import api_keys, events, idempotency, jobs

_ENDED = [state.value for state in ENDED]


@dataclass(frozen=True)
class JobRow:
    """One row of `jobs`, as read."""

    id: str
    project: str
    owner: str
    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    dataset_version: str | None
    warnings: list[str]
    state: str
    state_since: datetime
    created_at: datetime
    message: str
    reason: str | None = None
    cancel_requested: int = 0
    stop_reason: str | None = None
    attempt: int = 0
    faults: int = 0
    ray_session: str | None = None
    conditions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    stream: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    history_end: dict[str, Any] | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    deleted_at: datetime | None = None
    purged_at: datetime | None = None
    version: int = 1

    @property
    def parsed_spec(self) -> TrainSpec | PrepareSpec:
        return job_spec_adapter.validate_python(self.spec)


@dataclass(frozen=True)
class NewEvent:
    """An event to be appended; the store gives it its number."""

    type: str
    message: str
    state: JobState | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    at: datetime = dataclasses.field(default_factory=now)


@dataclass(frozen=True)
class Replay:
    """An idempotency key that was used before: the job that it made, and the hash of the body then."""

    job: JobRow
    body_sha256: str


@dataclass(frozen=True)
class Key:
    """An API key, as far as it is stored."""

    id: str
    project: str
    revoked: bool


@dataclass(frozen=True)
class IdempotencyRecord:
    principal: str
    key: str
    body_sha256: str


def migrate(database_url: str) -> None:
    """Bring the schema up to date; an empty database gets everything."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["url"] = database_url
    command.upgrade(config, "head")


def make_engine(database_url: str) -> sa.Engine:
    """Return an engine; SQLite gets write-ahead logging, full durability and patience with locks."""
    engine = sa.create_engine(database_url)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # We begin transactions ourselves: the driver's own way starts them too late to be serialised.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A writer takes its lock at once, so that what it reads first is still true when it writes; readers take none.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class Store:
    """Jobs, events, idempotency records and API keys."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(writes=True)

    def ping(self) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.select(sa.literal(1)))

    def insert(self, job: JobRow, event: NewEvent, record: IdempotencyRecord | None) -> Replay | None:
        """Insert a job, its first event and its idempotency record, all or nothing.

        Returns None, or the replay if another request with the same key was first.
        """
        try:
            with self._writer.begin() as connection:
                connection.execute(jobs.insert().values(**dataclasses.asdict(job)))
                self._append(connection, job.id, [event])
                if record is not None:
                    connection.execute(
                        idempotency.insert().values(**dataclasses.asdict(record), job_id=job.id, created_at=now())
                    )
        except IntegrityError:
            if record is None or (replay := self.replay(record.principal, record.key)) is None:
                raise
            return replay
        return None

    def replay(self, principal: str, key: str) -> Replay | None:
        """Return what an idempotency key was used for, if it was."""
        query = (
            sa.select(jobs, idempotency.c.body_sha256)
            .join(idempotency, idempotency.c.job_id == jobs.c.id)
            .where(idempotency.c.principal == principal, idempotency.c.key == key)
        )
        with self._engine.begin() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else Replay(_job(row), row["body_sha256"])

    def get(self, job_id: str, project: str) -> JobRow | None:
        """Return a job of a project; a deleted one is not there."""
        query = sa.select(jobs).where(jobs.c.id == job_id, jobs.c.project == project, jobs.c.deleted_at.is_(None))
        with self._engine.begin() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else _job(row)

    def page(
        self, project: str, *, limit: int, before: str | None = None, state: str | None = None, name: str | None = None
    ) -> list[JobRow]:
        """Return jobs, newest first; `before` is the id of the last one already seen."""
        query = sa.select(jobs).where(jobs.c.project == project, jobs.c.deleted_at.is_(None))
        if before is not None:
            query = query.where(jobs.c.id < before)
        if state is not None:
            query = query.where(jobs.c.state == state)
        if name is not None:
            query = query.where(jobs.c.name == name)
        return self._jobs(query.order_by(jobs.c.id.desc()).limit(limit))

    def live(self) -> list[JobRow]:
        """Return every job that has not ended, oldest first."""
        return self._jobs(sa.select(jobs).where(jobs.c.state.not_in(_ENDED)).order_by(jobs.c.id))

    def to_purge(self) -> list[JobRow]:
        """Return deleted jobs whose objects may still be in the bucket."""
        return self._jobs(sa.select(jobs).where(jobs.c.deleted_at.is_not(None), jobs.c.purged_at.is_(None)))

    def apply(self, job: JobRow, changes: dict[str, Any], new_events: Sequence[NewEvent] = ()) -> JobRow | None:
        """Write changes and events if the row is still as it was read; return the new row, or None if it is not.

        The one writer of a job's state. Leaving a terminal state is impossible here, even with the right version.
        """
        guard = [jobs.c.id == job.id, jobs.c.version == job.version]
        if "state" in changes:
            guard.append(jobs.c.state.not_in(_ENDED))
        with self._writer.begin() as connection:
            update = jobs.update().where(*guard).values(**changes, version=job.version + 1)
            if connection.execute(update).rowcount == 0:
                return None
            self._append(connection, job.id, new_events)
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job.id)).mappings().one()
        return _job(row)

    def request_cancel(self, job_id: str) -> bool:
        """Note that a job shall stop; False if it has ended. Never taken back, so it needs no version of the caller."""
        update = jobs.update().where(jobs.c.id == job_id, jobs.c.state.not_in(_ENDED), jobs.c.cancel_requested == 0)
        with self._writer.begin() as connection:
            if connection.execute(update.values(cancel_requested=1, version=jobs.c.version + 1)).rowcount:
                self._append(connection, job_id, [NewEvent("cancel", "cancellation requested")])
                return True
            state = connection.execute(sa.select(jobs.c.state).where(jobs.c.id == job_id)).scalar_one()
        return state not in _ENDED

    def events(self, job_id: str, *, after: int, limit: int) -> list[Event]:
        """Return a job's events with a number above `after`, in order."""
        query = sa.select(events).where(events.c.job_id == job_id, events.c.seq > after)
        with self._engine.begin() as connection:
            rows = connection.execute(query.order_by(events.c.seq).limit(limit)).mappings().all()
        return [Event.model_validate(dict(row)) for row in rows]

    def find_key(self, sha256: str) -> Key | None:
        """Return an API key by its hash, revoked or not."""
        query = sa.select(api_keys.c.id, api_keys.c.project, api_keys.c.revoked_at)
        with self._engine.begin() as connection:
            row = connection.execute(query.where(api_keys.c.sha256 == sha256)).one_or_none()
        return None if row is None else Key(row.id, row.project, row.revoked_at is not None)

    def api_keys(self) -> list[dict[str, Any]]:
        """Return every API key: id, name, project and times; never the key, which is not stored."""
        columns = [column for column in api_keys.c if column.name != "sha256"]
        with self._engine.begin() as connection:
            return [dict(row) for row in connection.execute(sa.select(*columns)).mappings()]

    def insert_key(self, key_id: str, name: str, sha256: str, project: str) -> None:
        with self._writer.begin() as connection:
            connection.execute(
                api_keys.insert().values(id=key_id, name=name, sha256=sha256, project=project, created_at=now())
            )

    def revoke_key(self, key_id: str) -> bool:
        """End an API key; False if there is no such key or it had ended before."""
        update = api_keys.update().where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        with self._writer.begin() as connection:
            return connection.execute(update.values(revoked_at=now())).rowcount > 0

    def _jobs(self, query: sa.Select[Any]) -> list[JobRow]:
        with self._engine.begin() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    @staticmethod
    def _append(connection: sa.Connection, job_id: str, new_events: Sequence[NewEvent]) -> None:
        """Number and insert events; the job's row is locked by the same transaction, so numbers have no gap."""
        if not new_events:
            return
        newest = sa.select(sa.func.coalesce(sa.func.max(events.c.seq), 0)).where(events.c.job_id == job_id)
        seq = connection.execute(newest).scalar_one()
        rows = [
            {**dataclasses.asdict(event), "job_id": job_id, "seq": number}
            for number, event in enumerate(new_events, start=seq + 1)
        ]
        connection.execute(events.insert(), rows)


def _job(row: sa.RowMapping) -> JobRow:
    return JobRow(**{field.name: row[field.name] for field in dataclasses.fields(JobRow)})
