"""Projects as the API shows them: who may do what in one, how much it may use, and who changed what."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from .jobs import Answer
from .spec_base import Strict

MEMBER = r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}$"
#: A person or a program: a user name or an e-mail address.
MemberName = Annotated[str, StringConstraints(pattern=MEMBER)]


class Role(StrEnum):
    """What somebody may do in a project; each role may do all that those before it may."""

    VIEWER = "viewer"
    """See everything of the project, downloads included."""
    SUBMITTER = "submitter"
    """Submit jobs, and cancel, pause, resume, retry and delete any of the project."""
    ADMIN = "admin"
    """Give and take keys and roles, and read the audit log."""

    def covers(self, needed: "Role") -> bool:
        order = list(Role)
        return order.index(self) >= order.index(needed)


_MOST = 2**31 - 1
"""Of a count that the database keeps."""


class Quotas(Answer):
    """What a project may have; null: no limit."""

    model_config = ConfigDict(frozen=True)
    running_workers: int | None = Field(default=None, ge=1, le=_MOST)
    """Worker processes at once, over all jobs."""
    running_cpus: int | None = Field(default=None, ge=1, le=_MOST)
    """CPUs that they reserve."""
    running_gpus: int | None = Field(default=None, ge=0, le=_MOST)
    """GPUs that they reserve."""
    queued_jobs: int | None = Field(default=None, ge=1, le=_MOST)
    """Jobs that wait for their turn."""
    jobs_per_day: int | None = Field(default=None, ge=1, le=_MOST)
    """Jobs submitted in any 24 hours."""
    stored_bytes: int | None = Field(default=None, ge=0, le=2**63 - 1)
    """In the bucket. While more is stored, no job is accepted."""
    max_priority: int | None = Field(default=None, ge=-100, le=100)
    """The highest priority that a job may ask for."""


class Use(Answer):
    """What a project has now of what quotas limit."""

    running_workers: int
    running_cpus: int
    running_gpus: int
    queued_jobs: int
    jobs_per_day: int
    """In the last 24 hours."""
    stored_bytes: int | None
    """When it was last measured; null: not yet."""
    measured_at: datetime | None


class Project(Answer):
    name: str
    created_at: datetime
    role: Role
    """Of the key that asks."""
    quotas: Quotas
    use: Use


class Member(Answer):
    name: str
    role: Role
    created_at: datetime


class MemberRole(Strict):
    """What a member shall be."""

    role: Annotated[Role, Field(strict=False)]


_LEAST_SECONDS, _MOST_SECONDS = 60, 10 * 366 * 86_400
"""Of a key's life."""


def _life(value: int) -> int:
    if not _LEAST_SECONDS <= value <= _MOST_SECONDS:
        days = _MOST_SECONDS // 86_400
        raise ValueError(f"a key may last from {_LEAST_SECONDS} seconds to {_MOST_SECONDS} ({days} days)")
    return value


Life = Annotated[
    int,
    AfterValidator(_life),
    WithJsonSchema({"type": "integer", "maximum": _MOST_SECONDS, "minimum": _LEAST_SECONDS}),
]


class KeyRequest(Strict):
    """A key to be made."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")
    """What it is for."""
    role: Annotated[Role, Field(strict=False)] = Role.SUBMITTER
    """The most that it may do."""
    member: MemberName | None = None
    """Whose it is: it then never may more than this member may at the time."""
    expires_in: Life | None = None
    """Seconds from now; null: never."""


class ApiKey(Answer):
    """An API key, without the key itself, which is not stored."""

    id: str
    name: str
    prefix: str | None
    """How it begins; null for one of before keys had a prefix."""
    role: Role
    member: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    """To the minute; null: never, or before this was noted."""
    operator: bool = False
    """Whether it is an operator's own, which is shown the pages of Ray and Grafana; none that is made here is."""


class NewApiKey(ApiKey):
    key: str
    """Shown this once."""


class AuditEntry(Answer):
    """A change that somebody made, and when."""

    id: int
    at: datetime
    actor: str
    """The id of the API key, or `operator`: somebody with access to the database."""
    member: str | None
    """Whose key it was."""
    action: str
    """`job.submit`, `job.cancel`, `key.create`, `member.put`, `project.quotas`, …"""
    target: str
    """The job, key, member or project."""
    details: dict[str, Any]
    request_id: str
    """Of the request that made the change; empty for an operator's command."""
