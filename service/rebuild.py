"""Rebuilds the database from the bucket: jobs that it does not know, and what has become of those in a backup.

Nothing is deleted and nothing is asked of Ray: what runs is adopted by the reconciler when the control plane starts.
To do it twice changes nothing.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from api.documents import (
    AttemptDocument,
    CheckpointRef,
    ControlDocument,
    FinalDocument,
    HoldDocument,
    JobDocument,
    ResultDocument,
    SegmentDocument,
)
from api.errors import InvalidData, LockstepError
from api.jobs import Event, JobState, Reason
from api.layout import JobLayout, SegmentId
from api.names import JOB_ID
from api.storage import Bucket, DocumentT
from service.audit import OPERATOR
from service.database import REFUSED
from service.progress import read_progress
from service.remains import Remains, newer, rebuilt
from service.rows import JobRow, NewEvent
from service.store import Store

_READERS = 8
_SAY_EVERY = 100


class WrongBucket(LockstepError):
    """The bucket cannot be the one that the database belongs to."""


@dataclass(frozen=True)
class Found:
    """A job's folder, as it was found."""

    id: str
    left: Remains | None = None
    """None where there is no `job.json`, or something is damaged."""
    manifests: Collection[str] = ()
    """The keys of those that are there."""
    half_deleted: bool = False
    """Something was submitted, and `job.json` is gone; where nothing was, it may never have been there."""
    damage: str = ""


@dataclass
class Outcome:
    """What came of it, by job."""

    rebuilt: list[JobRow] = field(default_factory=list)
    """Were not in the database."""
    renewed: list[JobRow] = field(default_factory=list)
    """Have gone on since what the database knew of them."""
    gone: list[str] = field(default_factory=list)
    """Have no objects any more: they were deleted since."""
    half_deleted: list[str] = field(default_factory=list)
    """Have objects, but `job.json` is gone."""
    damaged: dict[str, str] = field(default_factory=dict)


def rebuild(store: Store, bucket: Bucket, at: datetime, say: Callable[[str], None]) -> Outcome:
    """Bring the database up to what the bucket tells, as of now, which is `at`; `say` hears how far it is."""
    rows = {row.id: row for row in store.everything()}
    layouts = sorted(job_layouts(bucket), key=lambda layout: layout.job_id)
    if not layouts and any(row.attempt and row.purged_at is None for row in rows.values()):
        raise WrongBucket(f"{bucket.url} has none of the jobs in the database; check LOCKSTEP_STORAGE")
    say(f"{len(layouts)} jobs in {bucket.url}, {len(rows)} in the database")
    outcome = Outcome()
    with ThreadPoolExecutor(_READERS, "rebuild") as readers:
        for count, found in enumerate(readers.map(lambda layout: look(bucket, layout), layouts), 1):
            try:
                _take(store, bucket, found, rows.get(found.id), at, outcome)
            except (*REFUSED, OverflowError) as error:  # SQLite's driver has that for a number beyond all bounds
                outcome.damaged[found.id] = (
                    f"the database does not take what is told of it: {getattr(error, 'orig', error)}"
                )
            if count % _SAY_EVERY == 0:
                say(f"{count} of {len(layouts)} jobs read")
    _end_gone(store, rows, {layout.job_id for layout in layouts} - set(outcome.half_deleted), at, outcome)
    store.pin_origins()  # at last, whichever of two jobs came first, in this rebuild or in one before it
    return outcome


def summary(outcome: Outcome) -> list[str]:
    """Return what came of it, line by line: each job that somebody should look at by name, the others counted."""
    states = Counter(str(row.state) for row in (*outcome.rebuilt, *outcome.renewed))
    lines = [f"{job} is damaged: {why}" for job, why in outcome.damaged.items()]
    lines += [f"{job} was ended: its objects have been deleted since the backup" for job in outcome.gone]
    lines += [f"{job} is half deleted: what is left of its objects stays" for job in outcome.half_deleted]
    total = f"rebuilt {len(outcome.rebuilt)}, renewed {len(outcome.renewed)}, damaged {len(outcome.damaged)}"
    by_state = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return [*lines, f"{total} ({by_state})" if by_state else total]


def job_layouts(bucket: Bucket) -> Iterator[JobLayout]:
    """Yield where jobs lie, in whatever project."""
    for project in bucket.folders(""):
        for name in bucket.folders(f"{project}/jobs/"):
            if JOB_ID.fullmatch(name):
                yield JobLayout(project, name)


def look(bucket: Bucket, layout: JobLayout) -> Found:
    """Read the documents of a job. Damage is told, a bucket that does not answer raises."""
    keys = {item.key for item in bucket.objects(layout.prefix)}
    try:
        left = read_remains(bucket, layout, keys)
    except (InvalidData, ValueError) as error:
        return Found(layout.job_id, damage=str(error))
    manifests = {key for key in keys if key.endswith("/manifest.json")}
    return Found(layout.job_id, left, manifests, half_deleted=left is None and any(_follows_one(key) for key in keys))


def _follows_one(key: str) -> bool:
    """Whether an object is written after `job.json`. A wish for an attempt that is never submitted may be alone."""
    return not key.endswith(("/control.json", "/hold.json"))


def read_remains(bucket: Bucket, layout: JobLayout, keys: Collection[str]) -> Remains | None:
    """Return what is there of a job, whose objects are `keys`; None without its `job.json`. InvalidData for damage."""

    def find(key: str, kind: type[DocumentT]) -> DocumentT | None:
        return bucket.get_document(key, kind) if key in keys else None

    job = find(layout.job, JobDocument)
    if job is None:
        return None
    if (job.project, job.id) != (layout.project, layout.job_id):
        raise InvalidData(f"{bucket.url}/{layout.job} is of {job.project}/{job.id}")
    segments = sorted(_segments(layout, keys))
    attempts = sorted(_attempts(layout, keys) | {segment.attempt for segment in segments})
    for segment in segments:  # an attempt is written down before it is submitted
        if layout.attempt(segment.attempt) not in keys:
            raise InvalidData(f"{bucket.url}/{layout.attempt(segment.attempt)} is missing; is it half deleted?")
    newest = attempts[-1] if attempts else 1  # job.json is written for an attempt
    controls = {attempt: find(layout.control(attempt), ControlDocument) for attempt in attempts}
    final = find(layout.final, FinalDocument)
    if final is not None and not JobState(final.state).ended:
        raise InvalidData(f"{bucket.url}/{layout.final} says {final.state!r}, which is no end")
    return Remains(
        job=job,
        hold=find(layout.hold, HoldDocument),
        final=final,
        attempt=newest,
        record=find(layout.attempt(newest), AttemptDocument),
        control=controls.get(newest),
        given_up=[c.reason for c in controls.values() if c and c.wish == "superseded" and c.reason is not None],
        began=any(segment.attempt == newest for segment in segments),
        first=find(layout.segment(segments[0]).document, SegmentDocument) if segments else None,
        result=find(layout.segment(final.end.segment).result, ResultDocument) if final and final.end else None,
    )


def _attempts(layout: JobLayout, keys: Iterable[str]) -> set[int]:
    names = {key[len(layout.attempts) :].partition("/")[0] for key in keys if key.startswith(layout.attempts)}
    return {int(name) for name in names if name.isdecimal()}


def _segments(layout: JobLayout, keys: Collection[str]) -> Iterator[SegmentId]:
    """Yield the segments that began."""
    for name in {key[len(layout.segments) :].partition("/")[0] for key in keys if key.startswith(layout.segments)}:
        if layout.segment(name).document in keys:
            yield SegmentId.parse(name)


def _take(store: Store, bucket: Bucket, found: Found, row: JobRow | None, at: datetime, outcome: Outcome) -> None:
    """Insert or renew one job, all or nothing."""
    if found.damage:
        outcome.damaged[found.id] = found.damage
    elif found.left is None:
        if found.half_deleted:
            outcome.half_deleted.append(found.id)
    elif row is None:
        made = rebuilt(found.left, at)
        changes, told = _told(made, bucket, outcome)
        made = replace(made, **changes)
        store.adopt(made, [_note(made, made.message), *told, *missing(told, found.manifests, made)])
        outcome.rebuilt.append(made)
    elif changes := newer(row, rebuilt(found.left, at)):
        _renew(store, bucket, row, changes, found.manifests, outcome)


def _renew(
    store: Store, bucket: Bucket, row: JobRow, changes: dict[str, Any], manifests: Collection[str], outcome: Outcome
) -> None:
    progress, told = _told(row, bucket, outcome)
    renewed = replace(row, **changes, **progress)
    earlier = store.events(row.id, after=0, limit=10**9)
    lost = missing([*earlier, *told], manifests, row)
    note = _note(renewed, f"renewed from the bucket: {renewed.message}")
    if store.apply(row, {**changes, **progress}, [note, *told, *lost]) is None:
        raise LockstepError(f"job {row.id} was changed at the same time; stop every control plane and do it again")
    outcome.renewed.append(renewed)


def _told(row: JobRow, bucket: Bucket, outcome: Outcome) -> tuple[dict[str, Any], list[NewEvent]]:
    """Return progress and the workers' events since; a damaged stream costs these and no more."""
    try:
        return read_progress(row, bucket)
    except (InvalidData, ValueError) as error:
        outcome.damaged[row.id] = f"its stream cannot be read, so it has no progress and no events: {error}"
        return {}, []


def _note(row: JobRow, message: str) -> NewEvent:
    return NewEvent("rebuilt", message, JobState(row.state), {"attempt": row.attempt})


def missing(events: Iterable[NewEvent | Event], manifests: Collection[str], job: JobRow) -> list[NewEvent]:
    """Return the events that tell which checkpoints, told of before, are not there: deleted, if nobody says otherwise.

    Without them a verification would take for damage what retention or a user has deleted. Pure.
    """
    layout, written = JobLayout(job.project, job.id), dict[CheckpointRef, None]()
    for event in events:
        if event.type in ("checkpoint", "retention"):
            at = CheckpointRef(segment=event.data["segment"], step=event.data["step"])
            if event.type == "checkpoint":
                written[at] = None
            else:
                written.pop(at, None)
    return [
        NewEvent(
            "retention",
            f"step {at.step}: no checkpoint there any more when the database was rebuilt",
            data={"step": at.step, "segment": at.segment},
        )
        for at in written
        if layout.segment(at.segment).checkpoint(at.step).manifest not in manifests
    ]


def _end_gone(store: Store, rows: Mapping[str, JobRow], there: Collection[str], at: datetime, outcome: Outcome) -> None:
    """End the jobs of a backup that were deleted since, so that none of them comes to life again."""
    message = "it has no objects in the bucket any more: deleted since the backup"
    for row in rows.values():
        unwritten = row.attempt == 0 or (row.attempt == 1 and row.state == JobState.STARTING)
        if JobState(row.state).ended or row.id in there or unwritten:
            continue
        changes = {"state": JobState.CANCELLED.value, "reason": Reason.USER_CANCELLED, "message": message}
        moments = {"state_since": at, "ended_at": at}
        event = NewEvent("state", message, JobState.CANCELLED)
        told = OPERATOR.change(row.project, "job.end", row.id, by="rebuild")
        store.apply(row, {**changes, **moments, "conditions": []}, [event], told)
        outcome.gone.append(row.id)
