"""What a project may have, against what it has. Pure."""

from collections.abc import Iterable, Sequence
from datetime import timedelta

from api.jobs import JobState
from api.tenants import Use
from service.line import claim
from service.rows import JobRow
from service.schedule import Claim
from service.tenants import StoredProject

DAY = timedelta(days=1)


def use_of(project: StoredProject, live: Iterable[JobRow], submitted: int) -> Use:
    """Return what a project uses now; `submitted`: jobs in the last 24 hours."""
    own = [job for job in live if job.project == project.name]
    held = [found for job in own if (found := claim(job)) is not None and found.held]
    return Use(
        running_workers=sum(claim.held for claim in held),
        running_cpus=_held(held, "CPU"),
        running_gpus=_held(held, "GPU"),
        queued_jobs=sum(job.state == JobState.QUEUED for job in own),
        jobs_per_day=submitted,
        stored_bytes=project.used_bytes,
        measured_at=project.measured_at,
    )


def _held(claims: Sequence[Claim], kind: str) -> int:
    return int(sum(claim.held * claim.bundle.get(kind, 0.0) for claim in claims))
