"""What a project may have, against what it has or a job asks for. Pure; the counts are the caller's."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from api.errors import Fault, QuotaExceeded
from api.jobs import JobState
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from api.tenants import Quotas, Use
from service.admission import bundles, describe
from service.allowance import never
from service.line import claim, sizes
from service.rooms import Group
from service.rows import JobRow, StoredProject
from service.schedule import Claim

DAY = timedelta(days=1)
KEYS = 100
"""Most keys of a project that open it; not counted are operators' own."""
MEMBERS = 1000
"""Most members of a project."""


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


def spec_faults(spec: TrainSpec | PrepareSpec, project: str, quotas: Quotas) -> list[Fault]:
    """Return why a job is beyond a project's quotas whatever else runs, with the fewest workers that it can do with."""
    faults = []
    if quotas.max_priority is not None and spec.priority > quotas.max_priority:
        words = f"project {project} may ask for a priority of {quotas.max_priority} at most, not {spec.priority}"
        faults.append(Fault(path="$.priority", message=words))
    if (why := beyond_quota(spec, project, quotas)) is not None:
        faults.append(Fault(path="$.resources", message=why))
    return faults


def beyond_quota(spec: TrainSpec | PrepareSpec, project: str, quotas: Quotas, workers: int | None = None) -> str | None:
    """Say why a project could never run a job with so many workers, or with the fewest; None if it could."""
    group = bundles(spec, sizes(spec, workers)[0])
    why = never(project, quotas, Group(group[0], len(group)))
    return None if why is None else f"the job needs {describe(group)}, but {why}"


def refuse_more_jobs(project: StoredProject, queued: int, day_full_since: datetime | None, at: datetime) -> None:
    """QuotaExceeded if a project may have no further job now.

    `day_full_since`: when the first was submitted of as many newest jobs as it may submit in a day; None: fewer.
    """
    quotas = project.quotas
    refuse_longer_line(project, queued)
    if day_full_since is not None and day_full_since > at - DAY:
        raise QuotaExceeded(
            f"project {project.name} may submit {quotas.jobs_per_day} jobs in 24 hours and has; "
            f"the next one from {day_full_since + DAY:%F %T} UTC on",
            retry_after=(day_full_since + DAY - at).total_seconds(),
        )
    used, limit = project.used_bytes, quotas.stored_bytes
    if used is not None and project.measured_at is not None and limit is not None and used > limit:
        raise QuotaExceeded(
            f"project {project.name} may store {gib(limit)} and had {gib(used)} when it was measured at "
            f"{project.measured_at:%F %T} UTC; delete jobs or checkpoints. It is measured again before long"
        )


def refuse_longer_line(project: StoredProject, queued: int) -> None:
    """QuotaExceeded if a project may have no further job in the line, be it new or resumed."""
    most = project.quotas.queued_jobs
    if most is not None and queued >= most:
        raise QuotaExceeded(
            f"project {project.name} may have {most} jobs waiting at once and has {queued}; "
            "wait until some have started, or cancel some"
        )


def refuse_more_keys(project: str, live: int) -> None:
    """QuotaExceeded if a project may have no further key: limits of a key are worth something only if keys have one."""
    if live >= KEYS:
        raise QuotaExceeded(f"project {project} has {live} keys that are valid, and {KEYS} is the most; revoke some")


def refuse_more_members(project: str, count: int) -> None:
    """QuotaExceeded if a project may have no further member."""
    if count >= MEMBERS:
        raise QuotaExceeded(f"project {project} has {count} members, and {MEMBERS} is the most; remove some")


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _held(claims: Sequence[Claim], kind: str) -> int:
    return int(sum(claim.held * claim.bundle.get(kind, 0.0) for claim in claims))
