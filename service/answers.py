"""A job as the API shows it."""

from api.jobs import Condition, Job, JobState, Origin, Progress, Reason
from service.rows import JobRow


def answer(row: JobRow) -> Job:
    """Return a row as the API shows it."""
    return Job(
        id=row.id,
        name=row.name,
        project=row.project,
        owner=row.owner,
        labels=row.labels,
        state=JobState(row.state),
        reason=Reason(row.reason) if row.reason else None,
        message=row.message,
        attempt=row.attempt,
        workers=row.workers,
        conditions=[Condition.model_validate(c) for c in row.conditions],
        progress=Progress.model_validate(row.progress),
        result=row.result,
        spec=row.known_spec,
        dataset_version=row.dataset_version,
        init=Origin.model_validate(row.init) if row.init else None,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        warnings=row.warnings,
    )
