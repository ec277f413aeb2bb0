"""The tables of the database. `service/migrations` creates them; this page must agree with its newest revision."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

metadata = MetaData()


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time; SQLite forgets the zone, so we put UTC back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class PlainText(TypeDecorator[str]):
    """Text from outside, such as the last words of a worker. PostgreSQL takes no NUL, so none is kept anywhere."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.replace("\x00", "\N{REPLACEMENT CHARACTER}")


jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("labels", JSON, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("dataset_version", String(64)),
    Column("warnings", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("state_since", UtcDateTime, nullable=False),
    Column("reason", String(32)),
    Column("message", PlainText, nullable=False),
    Column("cancel_requested", Integer, nullable=False, default=0),
    Column("keep_checkpoint", Integer, nullable=False, default=0),
    Column("pause_requested", Integer, nullable=False, default=0),
    Column("stop_reason", String(32)),
    Column("attempt", Integer, nullable=False),
    Column("faults", Integer, nullable=False),
    Column("setbacks", Integer, nullable=False, default=0),
    Column("lost_seconds", Float, nullable=False, default=0.0),
    Column("workers", Integer),
    Column("workers_wanted", Integer),
    Column("queued_at", UtcDateTime),
    Column("attempt_at", UtcDateTime),
    Column("not_before", UtcDateTime),
    Column("init", JSON),
    Column("ray_session", String(128)),
    Column("conditions", JSON, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("stream", JSON, nullable=False),
    Column("result", JSON, nullable=False),
    Column("history_end", JSON),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("deleted_at", UtcDateTime),
    Column("purged_at", UtcDateTime),
    Column("retention", String(16)),
    Column("version", Integer, nullable=False),
    Index("jobs_by_state", "state"),
    Index("jobs_by_project", "project", "id"),
    # All that a scrape looks at, so that it reads no row.
    Index("jobs_in_figures", "state", "reason", "deleted_at", "attempt", "lost_seconds", "queued_at", "created_at"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("type", String(32), nullable=False),
    Column("message", PlainText, nullable=False),
    Column("state", String(16)),
    Column("data", JSON, nullable=False),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("principal", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("job_id", String(32), ForeignKey("jobs.id"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("project", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
    Column("role", String(16), nullable=False),
    Column("member", String(64)),
    Column("prefix", String(16)),
    Column("operator", Integer, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
)

projects = Table(
    "projects",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
    Column("archived_at", UtcDateTime),
    Column("running_workers", Integer),
    Column("running_cpus", Integer),
    Column("running_gpus", Integer),
    Column("queued_jobs", Integer),
    Column("jobs_per_day", Integer),
    Column("stored_bytes", BigInteger),
    Column("max_priority", Integer),
    Column("used_bytes", BigInteger),
    Column("measured_at", UtcDateTime),
)

members = Table(
    "members",
    metadata,
    Column("project", String(64), ForeignKey("projects.name"), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("project", String(64), nullable=False),
    Column("actor", String(32), nullable=False),
    Column("member", String(64)),
    Column("action", String(32), nullable=False),
    Column("target", String(128), nullable=False),
    Column("details", JSON, nullable=False),
    Column("request_id", String(64), nullable=False),
    Index("audit_by_project", "project", "id"),
)

marks = Table(
    "marks",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id"), primary_key=True),
    Column("segment", String(64), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("marked_at", UtcDateTime, nullable=False),
    Column("doomed", Integer, nullable=False),
)

pins = Table(
    "pins",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("job_id", String(32), ForeignKey("jobs.id"), nullable=False),
    Column("segment", String(64), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("why", String(32), nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("holder", String(32)),
    Index("pins_by_job", "job_id"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
)
