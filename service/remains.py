"""What the bucket holds of a job, and the row of the database that follows from it. Pure.

What a job's workers left, its history and its checkpoints are not here: they are read from the bucket anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from api.arithmetic import PREPARE_STEPS
from api.documents import (
    AttemptDocument,
    ControlDocument,
    FinalDocument,
    HoldDocument,
    JobDocument,
    ResultDocument,
    SegmentDocument,
)
from api.jobs import JobState, Progress, Reason
from api.prepare_spec import PrepareSpec
from service.lifecycle import IDLE
from service.reasons import REASONS
from service.rows import JobRow


@dataclass(frozen=True)
class Remains:
    """The documents of a job. Those of an attempt are of its newest one, unless it says otherwise."""

    job: JobDocument
    hold: HoldDocument | None = None
    final: FinalDocument | None = None
    attempt: int = 1
    """The highest number that was found anywhere. `job.json` is there because one was meant to begin."""
    record: AttemptDocument | None = None
    control: ControlDocument | None = None
    given_up: Sequence[Reason] = ()
    """Why attempts were given up, of all of which the bucket tells it."""
    began: bool = False
    """A segment of the newest attempt exists."""
    first: SegmentDocument | None = None
    """The oldest segment of all."""
    result: ResultDocument | None = None
    """Of the segment at which an ended job's history ends."""


def rebuilt(left: Remains, now: datetime) -> JobRow:
    """Return the row of a job as of `now`; an attempt that may be alive is one that the reconciler will look at."""
    job, record, hold = left.job, left.record, left.hold
    steps = job.total_steps
    if steps is None:
        steps = PREPARE_STEPS if isinstance(job.spec, PrepareSpec) else job.spec.steps
    row: dict[str, Any] = {
        "id": job.id,
        "project": job.project,
        "owner": job.owner,
        "name": job.spec.name,
        "labels": dict(job.spec.labels),
        "spec": job.spec.model_dump(mode="json"),
        "dataset_version": job.dataset_version,
        "warnings": list(job.warnings),
        "created_at": job.created_at,
        "queued_at": hold.created_at if hold is not None and not hold.paused else job.created_at,
        "init": job.init.model_dump() if job.init is not None else None,
        "progress": Progress(total_steps=steps).model_dump(),
        "retention": None if isinstance(job.spec, PrepareSpec) else "active",
        "attempt": left.attempt,
        "attempt_at": record.created_at if record is not None else None,
        "ray_session": record.ray_session if record is not None else None,
        "workers": record.workers if record is not None else None,
        "workers_wanted": hold.workers if hold is not None else None,
        "faults": sum(REASONS[reason].counts for reason in left.given_up),
        "started_at": left.first.created_at if left.first is not None else None,
    }
    return JobRow(**row, **(_ended(left, left.final) if left.final is not None else _live(left, now)))


def _ended(left: Remains, final: FinalDocument) -> dict[str, Any]:
    succeeded = final.state == JobState.SUCCEEDED
    return {
        "state": final.state,
        "state_since": final.created_at,
        "ended_at": final.created_at,
        "reason": final.reason,
        "message": final.message,
        "result": left.result.values if left.result is not None and succeeded else {},
        "history_end": final.end.model_dump() if final.end is not None else None,
        **_wishes(left),
        "cancel_requested": int(final.reason is Reason.USER_CANCELLED),
        "pause_requested": 0,
    }


def _live(left: Remains, now: datetime) -> dict[str, Any]:
    state = _state(left)
    message = f"rebuilt from the bucket: {state}"
    return {"state": state.value, "state_since": now, "message": message, **_wishes(left)}


def _state(left: Remains) -> JobState:
    """Return where a job that has not ended is. What its attempt does by now, the reconciler finds out."""
    wish = left.control.wish if left.control is not None else "run"
    if left.hold is not None and left.hold.attempt == left.attempt:  # so that attempt is over
        return JobState.PAUSED if left.hold.paused else JobState.QUEUED
    if wish == "superseded":
        return JobState.RECOVERING
    if wish == "pause":
        return JobState.PAUSING
    if wish == "cancel":
        return JobState.CANCELLING
    if left.record is None:  # without it nothing was ever submitted
        return JobState.RECOVERING
    return JobState.RUNNING if left.began else JobState.STARTING


def _wishes(left: Remains) -> dict[str, Any]:
    """Return what is wanted of a job. Who told a stop without a reason, told it before reasons were recorded."""
    control = left.control or ControlDocument()
    paused = control.wish == "pause" and control.reason in (None, Reason.USER_PAUSED)
    if left.hold is not None and left.hold.attempt == left.attempt:
        paused = left.hold.paused
    cancelled = control.wish == "cancel" and control.reason is not Reason.DEADLINE
    defaults = {"pause": Reason.USER_PAUSED, "cancel": Reason.USER_CANCELLED}
    return {
        "pause_requested": int(paused),
        "cancel_requested": int(cancelled),
        "keep_checkpoint": int(control.keep_checkpoint),
        "stop_reason": (control.reason or defaults[control.wish]) if control.wish in defaults else None,
    }


_CHANGES = (
    "state", "state_since", "reason", "message", "cancel_requested", "keep_checkpoint", "pause_requested",
    "stop_reason", "attempt", "attempt_at", "faults", "setbacks", "not_before", "workers", "workers_wanted",
    "ray_session", "result", "history_end", "started_at", "ended_at", "conditions",
)  # fmt: skip
"""What changes in the life of a job."""


def newer(row: JobRow, found: JobRow) -> dict[str, Any]:
    """Return what the bucket knows better than a row that came out of a backup; nothing where the row is as new.

    A terminal state is never left, and a wish to cancel never taken back.
    """
    was, now = JobState(row.state), JobState(found.state)
    if was.ended or (found.attempt < row.attempt and not now.ended):
        return {}
    everything = {name: getattr(found, name) for name in _CHANGES}
    everything["attempt"] = max(row.attempt, found.attempt)
    if now.ended or found.attempt > row.attempt:
        return everything | _still_cancelled(row, found)
    if was in IDLE:  # nothing can have come after that but a pause or its end
        held = ("pause_requested", "workers_wanted")
        speaks = now in (JobState.PAUSED, JobState.QUEUED)
        return {name: everything[name] for name in held if speaks and everything[name] != getattr(row, name)}
    if now in (was, JobState.STARTING, JobState.RUNNING) or was is JobState.CANCELLING:
        return {}
    return everything | _still_cancelled(row, found)


def _still_cancelled(row: JobRow, found: JobRow) -> dict[str, Any]:
    if not row.cancel_requested or JobState(found.state).ended:
        return {}
    return {"cancel_requested": 1, "keep_checkpoint": row.keep_checkpoint}
