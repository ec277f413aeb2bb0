"""The rows of the database as the rest of the control plane sees them."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from api.documents import CheckpointRef, now
from api.jobs import JobState
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec, job_spec_adapter
from api.tenants import Quotas, Role


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
    keep_checkpoint: int = 0
    """Whether a run that is cancelled shall write a checkpoint first."""
    pause_requested: int = 0
    stop_reason: str | None = None
    attempt: int = 0
    faults: int = 0
    """Of the job's own processes."""
    setbacks: int = 0
    """Attempts lost in a row, none of which ran for long."""
    lost_seconds: float = 0.0
    """What its restarts have cost so far (service/progress.py)."""
    workers: int | None = None
    """World size of the present attempt."""
    workers_wanted: int | None = None
    """The number of workers that a user resumed the job with; null: as the spec says."""
    queued_at: datetime | None = None
    """Since when it has been in the line: acceptance, or the last time that a user resumed it."""
    attempt_at: datetime | None = None
    """When the present attempt began."""
    not_before: datetime | None = None
    """When the next attempt may begin."""
    init: dict[str, Any] | None = None
    """The checkpoint of another job that this one begins at."""
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
    retention: Literal["active", "settled"] | None = None
    """Whether retention has still to look at the checkpoints; null where there are none, as of a preparation."""
    version: int = 1

    @property
    def parsed_spec(self) -> TrainSpec | PrepareSpec:
        return job_spec_adapter.validate_python(self.spec)

    @property
    def known_spec(self) -> TrainSpec | PrepareSpec:
        """The spec as far as this release knows it: enough to show or to end a job that a newer one has accepted.

        Nothing may be run by it: what we do not know would be left out.
        """
        return job_spec_adapter.validate_python(self.spec, extra="ignore")


@dataclass(frozen=True)
class Tally:
    """What the jobs of one state and reason come to."""

    state: JobState
    reason: str | None
    deleted: bool
    jobs: int
    attempts: int
    """Begun by all of them so far."""
    lost_seconds: float
    oldest: datetime
    """When the first of them joined the line."""


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
class JobFilter:
    """Which jobs a list shall hold; an empty filter holds all."""

    states: Collection[JobState] = ()
    """Any of them."""
    name: str | None = None
    labels: Collection[tuple[str, str | None]] = ()
    """Keys and values, all of them; None stands for any value."""


@dataclass(frozen=True)
class Mark:
    """A checkpoint that nobody seems to need, since when; once it is doomed, nothing can pin it any more."""

    at: CheckpointRef
    marked_at: datetime
    doomed: bool = False


@dataclass(frozen=True)
class StoredKey:
    """An API key as it is looked up, with what its project and its member say of it."""

    id: str
    project: str
    role: Role
    member: str | None
    member_role: Role | None
    """Of its member at present; None if it has none, or that one is not there any more."""
    archived: bool
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    operator: bool
    """Whether it is an operator's own."""


@dataclass(frozen=True)
class StoredProject:
    name: str
    created_at: datetime
    archived_at: datetime | None
    quotas: Quotas
    used_bytes: int | None
    """When it was last measured."""
    measured_at: datetime | None


@dataclass(frozen=True)
class IdempotencyRecord:
    principal: str
    key: str
    body_sha256: str
