"""The store: every read and write of the database. Each write of a job is guarded by its version.

A decision was made on what was read; if the row has changed since, the update matches nothing and the decision is
dropped. A terminal state is never left, whatever version the writer holds.
"""

import dataclasses
import secrets
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from api.documents import CheckpointRef, now
from api.errors import Conflict, QuotaExceeded
from api.jobs import ENDED, Event, JobState
from api.tenants import Quotas
from service.audit import Change
from service.audit import record as note
from service.rows import IdempotencyRecord, JobFilter, JobRow, Mark, NewEvent, Replay, Tally
from service.tables import events, idempotency, jobs, marks, pins, projects
from service.tenants import admit, read_quotas, readmit

_ENDED = [state.value for state in ENDED]


class Store:
    """Jobs, events, idempotency records, marks and pins. A `change` is what the audit log shall say of a write."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(writes=True)

    def ping(self) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.select(sa.literal(1)))

    def insert(
        self, job: JobRow, event: NewEvent, record: IdempotencyRecord | None, change: Change | None = None
    ) -> Replay | None:
        """Insert a job, its first event, its idempotency record and the pin of what it begins at, all or nothing.

        Returns None, or the replay if another request with the same key was first. Conflict if the checkpoint that the
        job begins at has just been given up, or the project is archived; QuotaExceeded if it may have no further job.
        """
        try:
            with self._writer.begin() as connection:
                admit(connection, job.project, job.created_at)
                connection.execute(jobs.insert().values(**dataclasses.asdict(job)))
                if job.init is not None:
                    self._pin_origin(connection, job.id, CheckpointRef.model_validate(job.init))
                self._append(connection, job.id, [event])
                if record is not None:
                    connection.execute(
                        idempotency.insert().values(**dataclasses.asdict(record), job_id=job.id, created_at=now())
                    )
                note(connection, change)
        except (IntegrityError, QuotaExceeded):
            if record is None or (replay := self.replay(record.principal, record.key)) is None:
                raise
            return replay
        return None

    def adopt(self, job: JobRow, new_events: Sequence[NewEvent]) -> None:
        """Insert a job that the bucket tells of, its project and its events."""
        with self._writer.begin() as connection:
            if connection.execute(sa.select(projects.c.name).where(projects.c.name == job.project)).first() is None:
                connection.execute(projects.insert().values(name=job.project, created_at=now()))
            connection.execute(jobs.insert().values(**dataclasses.asdict(job)))
            self._append(connection, job.id, new_events)

    def pin_origins(self) -> None:
        """Pin what live jobs begin at, as far as it is not pinned and the job that wrote it is there."""
        forks = sa.select(jobs.c.id, jobs.c.init).where(jobs.c.state.not_in(_ENDED))
        with self._writer.begin() as connection:
            there = set(connection.execute(sa.select(jobs.c.id)).scalars())
            holders = set(connection.execute(sa.select(pins.c.holder)).scalars())
            for fork, init in connection.execute(forks.where(jobs.c.init.is_not(None))).all():
                origin = CheckpointRef.model_validate(init) if init is not None else None  # JSON has a null, too
                if origin is not None and fork not in holders and origin.job_id in there:
                    self._insert_pin(connection, fork, origin)

    def everything(self) -> list[JobRow]:
        """Return every job of every project, deleted ones included, oldest first."""
        return self._jobs(sa.select(jobs).order_by(jobs.c.id))

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

    def page(self, project: str, only: JobFilter, *, limit: int, before: str | None = None) -> list[JobRow]:
        """Return jobs, newest first; `before` is the id of the last one already seen."""
        query = sa.select(jobs).where(jobs.c.project == project, jobs.c.deleted_at.is_(None), *_conditions(only))
        if before is not None:
            query = query.where(jobs.c.id < before)
        return self._jobs(query.order_by(jobs.c.id.desc()).limit(limit))

    def live(self, project: str | None = None) -> list[JobRow]:
        """Return every job that has not ended, or those of one project, oldest first."""
        query = sa.select(jobs).where(jobs.c.state.not_in(_ENDED)).order_by(jobs.c.id)
        return self._jobs(query if project is None else query.where(jobs.c.project == project))

    def tallies(self) -> list[Tally]:
        """Return what all jobs come to, deleted ones included, by state and reason; from an index alone."""
        groups = (jobs.c.state, jobs.c.reason, jobs.c.deleted_at.is_not(None))
        since = sa.func.coalesce(jobs.c.queued_at, jobs.c.created_at)
        oldest = sa.func.min(since, type_=jobs.c.created_at.type)
        sums = (sa.func.count(), sa.func.sum(jobs.c.attempt), sa.func.sum(jobs.c.lost_seconds), oldest)
        with self._engine.begin() as connection:
            rows = connection.execute(sa.select(*groups, *sums).group_by(*groups)).all()
        return [Tally(JobState(state), *rest) for state, *rest in rows]

    def quotas(self, project: str | None = None) -> dict[str, Quotas]:
        """Return the quotas of every project that has any, or of one."""
        with self._engine.begin() as connection:
            return read_quotas(connection, project)

    def submitted_since(self, project: str, at: datetime) -> int:
        """Return how many jobs of a project were submitted after a time, deleted ones included."""
        query = sa.select(sa.func.count()).where(jobs.c.project == project, jobs.c.created_at > at)
        with self._engine.begin() as connection:
            return int(connection.execute(query).scalar_one())

    def to_purge(self) -> list[JobRow]:
        """Return deleted jobs whose objects may still be in the bucket."""
        return self._jobs(sa.select(jobs).where(jobs.c.deleted_at.is_not(None), jobs.c.purged_at.is_(None)))

    def apply(
        self,
        job: JobRow,
        changes: dict[str, Any],
        new_events: Sequence[NewEvent] = (),
        change: Change | None = None,
    ) -> JobRow | None:
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
            note(connection, change)
            if changes.get("state") in _ENDED:  # what it began at may go now
                connection.execute(pins.delete().where(pins.c.holder == job.id))
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job.id)).mappings().one()
        return _job(row)

    def request_cancel(self, job_id: str, keep_checkpoint: bool = False, change: Change | None = None) -> bool:
        """Note that a job shall stop; False if it has ended. Never taken back, so it needs no version of the caller."""
        changes = {"cancel_requested": 1, "keep_checkpoint": int(keep_checkpoint)}
        event = NewEvent("cancel", "cancellation requested")
        with self._writer.begin() as connection:
            if self._ask(connection, job_id, [jobs.c.cancel_requested == 0], changes, event, change):
                return True
        return not self._state(job_id).ended

    def request_pause(self, job_id: str, change: Change | None = None) -> bool:
        """Note that a job shall pause; False if it has ended or is being cancelled."""
        wanted = [jobs.c.pause_requested == 0, jobs.c.cancel_requested == 0]
        event = NewEvent("pause", "pause requested")
        with self._writer.begin() as connection:
            if self._ask(connection, job_id, wanted, {"pause_requested": 1}, event, change):
                return True
        return self._paused(job_id)

    def request_resume(self, job_id: str, workers: int | None, at: datetime, change: Change | None = None) -> bool:
        """Note that a job shall pause no longer, and with how many workers it goes on; False if it was not to pause.

        It goes to the end of the line; QuotaExceeded if its project may have no further job there.
        """
        changes = {"pause_requested": 0, "workers_wanted": workers, "queued_at": at}
        message = "resume requested" + (f" with {workers} workers" if workers else "")
        wanted = [jobs.c.pause_requested == 1, jobs.c.cancel_requested == 0]
        with self._writer.begin() as connection:
            project = connection.execute(sa.select(jobs.c.project).where(jobs.c.id == job_id)).scalar_one()
            asked = partial(self._ask, connection, job_id, wanted, changes, NewEvent("resume", message), change)
            return readmit(connection, project, asked)

    def _ask(
        self,
        connection: sa.Connection,
        job_id: str,
        where: list[sa.ColumnElement[bool]],
        changes: dict[str, Any],
        event: NewEvent,
        change: Change | None,
    ) -> bool:
        """Write down what a user wants of a live job; False if `where` does not hold."""
        update = jobs.update().where(jobs.c.id == job_id, jobs.c.state.not_in(_ENDED), *where)
        if connection.execute(update.values(**changes, version=jobs.c.version + 1)).rowcount == 0:
            return False
        self._append(connection, job_id, [event])
        note(connection, change)
        return True

    def _state(self, job_id: str) -> JobState:
        with self._engine.begin() as connection:
            return JobState(connection.execute(sa.select(jobs.c.state).where(jobs.c.id == job_id)).scalar_one())

    def _paused(self, job_id: str) -> bool:
        wants = sa.select(jobs.c.id).where(
            jobs.c.id == job_id, jobs.c.pause_requested == 1, jobs.c.cancel_requested == 0, jobs.c.state.not_in(_ENDED)
        )
        with self._engine.begin() as connection:
            return connection.execute(wants).first() is not None

    def events(self, job_id: str, *, after: int, limit: int) -> list[Event]:
        """Return a job's events with a number above `after`, in order."""
        query = sa.select(events).where(events.c.job_id == job_id, events.c.seq > after)
        with self._engine.begin() as connection:
            rows = connection.execute(query.order_by(events.c.seq).limit(limit)).mappings().all()
        return [Event.model_validate(dict(row)) for row in rows]

    def retained(self) -> list[JobRow]:
        """Return the jobs that retention has to look at: until they settle, or for a deletion that was begun."""
        begun = sa.select(marks.c.job_id).where(marks.c.doomed == 1)
        due = sa.or_(jobs.c.retention == "active", jobs.c.id.in_(begun))
        return self._jobs(sa.select(jobs).where(jobs.c.deleted_at.is_(None), due).order_by(jobs.c.id))

    def settle(self, job: JobRow) -> None:
        """Note that retention has nothing left to do for an ended job."""
        update = jobs.update().where(jobs.c.id == job.id, jobs.c.state.in_(_ENDED), jobs.c.retention == "active")
        with self._writer.begin() as connection:
            connection.execute(update.values(retention="settled", version=jobs.c.version + 1))

    def marks(self, job_id: str) -> list[Mark]:
        query = sa.select(marks).where(marks.c.job_id == job_id).order_by(marks.c.step)
        with self._engine.begin() as connection:
            rows = connection.execute(query).all()
        return [Mark(CheckpointRef(segment=r.segment, step=r.step), r.marked_at, bool(r.doomed)) for r in rows]

    def mark(self, job_id: str, new: Collection[CheckpointRef], at: datetime) -> None:
        """Mark those checkpoints that bear no mark yet."""
        with self._writer.begin() as connection:
            self._lock(connection, job_id)
            known = connection.execute(sa.select(marks.c.segment, marks.c.step).where(marks.c.job_id == job_id)).all()
            rows = [_place(job_id, ref) for ref in new if (ref.segment, ref.step) not in known]
            if rows:
                connection.execute(marks.insert().values(marked_at=at, doomed=0), rows)

    def unmark_as_seen(self, job_id: str, seen: Collection[Mark]) -> None:
        """Take marks away whose checkpoints are needed again, unless they have changed since they were seen."""
        with self._writer.begin() as connection:
            for mark in seen:
                same = (marks.c.marked_at == mark.marked_at, marks.c.doomed == int(mark.doomed))
                connection.execute(marks.delete().where(*_at(marks, job_id, mark.at), *same))

    def unmark(self, job_id: str, refs: Collection[CheckpointRef]) -> None:
        """Take marks away: their checkpoints are gone."""
        with self._writer.begin() as connection:
            for ref in refs:
                connection.execute(marks.delete().where(*_at(marks, job_id, ref)))

    def doom(
        self,
        job: JobRow,
        ref: CheckpointRef,
        at: datetime,
        event: NewEvent | None = None,
        change: Change | None = None,
    ) -> bool:
        """Decide that a checkpoint goes, with an event that says so once; from here on nothing can pin it.

        False if something pins it now, or if the job's state or attempt are no longer those of `job`.
        """
        with self._writer.begin() as connection:
            present = self._lock(connection, job.id)
            pinned = connection.execute(sa.select(pins.c.id).where(*_at(pins, job.id, ref), pins.c.expires_at > at))
            if (present.state, present.attempt) != (job.state, job.attempt) or pinned.first() is not None:
                return False
            here = _at(marks, job.id, ref)
            if connection.execute(sa.select(marks.c.step).where(*here, marks.c.doomed == 1)).first() is None:
                connection.execute(marks.delete().where(*here))
                connection.execute(marks.insert().values(**_place(job.id, ref), marked_at=at, doomed=1))
                self._append(connection, job.id, [event] if event is not None else [])
                note(connection, change)
        return True

    def pin(self, job_id: str, ref: CheckpointRef, why: str, at: datetime, expires_at: datetime) -> str | None:
        """Keep a checkpoint from being deleted; return the pin's id, or None if it is doomed or its job is deleted."""
        pin = secrets.token_hex(16)  # never one that was used before: whoever held that may still let go of it
        with self._writer.begin() as connection:
            gone = self._lock(connection, job_id).deleted_at is not None  # a purge looks at the pins after that
            doomed = connection.execute(sa.select(marks.c.step).where(*_at(marks, job_id, ref), marks.c.doomed == 1))
            if gone or doomed.first() is not None:
                return None
            connection.execute(pins.delete().where(pins.c.job_id == job_id, pins.c.expires_at <= at))
            connection.execute(pins.insert().values(id=pin, **_place(job_id, ref), why=why, expires_at=expires_at))
        return pin

    def _pin_origin(self, connection: sa.Connection, holder: str, origin: CheckpointRef) -> None:
        """Keep the checkpoint that a job begins at until that job has ended."""
        source = origin.job_id
        assert source is not None
        gone = self._lock(connection, source).deleted_at is not None
        doomed = sa.select(marks.c.step).where(*_at(marks, source, origin), marks.c.doomed == 1)
        if gone or connection.execute(doomed).first() is not None:
            raise being_deleted(origin)
        self._insert_pin(connection, holder, origin)

    @staticmethod
    def _insert_pin(connection: sa.Connection, holder: str, origin: CheckpointRef) -> None:
        assert origin.job_id is not None
        pin = {"id": secrets.token_hex(16), **_place(origin.job_id, origin), "why": "fork", "holder": holder}
        connection.execute(pins.insert().values(**pin, expires_at=datetime.max.replace(tzinfo=UTC)))

    def hold(self, pin: str, expires_at: datetime) -> None:
        """Let a pin last longer."""
        with self._writer.begin() as connection:
            connection.execute(pins.update().where(pins.c.id == pin).values(expires_at=expires_at))

    def unpin(self, pin: str) -> None:
        with self._writer.begin() as connection:
            connection.execute(pins.delete().where(pins.c.id == pin))

    def pinned(self, job_id: str, at: datetime) -> set[CheckpointRef]:
        """Return the checkpoints of a job that something pins."""
        query = sa.select(pins.c.segment, pins.c.step).where(pins.c.job_id == job_id, pins.c.expires_at > at)
        with self._engine.begin() as connection:
            return {CheckpointRef(segment=row.segment, step=row.step) for row in connection.execute(query)}

    def _jobs(self, query: sa.Select[Any]) -> list[JobRow]:
        with self._engine.begin() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    @staticmethod
    def _lock(connection: sa.Connection, job_id: str) -> sa.Row[Any]:
        """Lock a job's row, so that what depends on it is decided by one transaction after the other; return it."""
        return connection.execute(sa.select(jobs).where(jobs.c.id == job_id).with_for_update()).one()

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


def being_deleted(origin: CheckpointRef) -> Conflict:
    return Conflict(f"the checkpoint of step {origin.step} of {origin.job_id} is just being deleted; choose another")


def _conditions(only: JobFilter) -> list[sa.ColumnElement[bool]]:
    """Return a filter as SQL. What a label's key may hold needs no quoting within a JSON path in double quotes."""
    conditions: list[sa.ColumnElement[bool]] = []
    if only.states:
        conditions.append(jobs.c.state.in_(sorted({state.value for state in only.states})))
    if only.name is not None:
        conditions.append(jobs.c.name == only.name)
    for key, value in only.labels:
        label = jobs.c.labels[key].as_string()
        conditions.append(label.is_not(None) if value is None else label == value)
    return conditions


def _job(row: sa.RowMapping) -> JobRow:
    return JobRow(**{field.name: row[field.name] for field in dataclasses.fields(JobRow)})


def _place(job_id: str, ref: CheckpointRef) -> dict[str, Any]:
    return {"job_id": job_id, "segment": ref.segment, "step": ref.step}


def _at(table: sa.Table, job_id: str, ref: CheckpointRef) -> list[sa.ColumnElement[bool]]:
    return [table.c.job_id == job_id, table.c.segment == ref.segment, table.c.step == ref.step]
