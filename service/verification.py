"""Reads every byte of checkpoints, and says what became of them: piece by piece, one in memory, nothing stored.

A checkpoint is pinned while it is read, as for a download, so retention does not delete it under the reader's eyes.
What it is compared with is its manifest, which is sealed (api/manifest.py); which manifests there should be is told by
the job's events. Bytes that are not what they should be are read once more before they count as damage: the wire can
flip a bit too.
"""

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress

from sqlalchemy.exc import SQLAlchemyError

from api.documents import CheckpointRef, Manifest, Receipt, SegmentDocument, now
from api.errors import InvalidData, ObjectMissing, StorageError
from api.history import history
from api.jobs import Event
from api.layout import CheckpointLayout, JobLayout, SegmentId
from api.manifest import read_manifest
from api.storage import Bucket
from api.verification import CheckedCheckpoint, Checking, Damage, Verdict, Verification, verdict_of
from service.export import PIECE, PIN, held, read_header
from service.rows import JobRow
from service.run_reader import read_begun, read_segments
from service.store import Store

Telling = Generator[Checking | CheckedCheckpoint, None, None]
"""How far it is, and at last the verdict."""
_EVENTS = 1000
"""Events in a page."""


def find_written(bucket: Bucket, store: Store, job: JobRow, step: int | None) -> list[CheckpointRef]:
    """Return the checkpoints that are, or should be, on a job's history, or that of one step, oldest first.

    Unlike in the list of checkpoints, those whose manifest is damaged are among them, and those whose manifest is lost.
    """
    begun = (at for at in read_begun(bucket, _layout(job), _end(job)) if step in (None, at.step))
    there = {at for at in begun if bucket.objects(_checkpoint(job, at).manifest)}
    due = _due(bucket, store, job)  # asked for after the bucket: of what was deleted before, the events tell by now
    return sorted(there | {at for at in due if step in (None, at.step)}, key=_place)


def _due(bucket: Bucket, store: Store, job: JobRow) -> set[CheckpointRef]:
    """Return the checkpoints on a job's history that should be there as its events tell: written and not deleted."""
    written: set[CheckpointRef] = set()
    deleted: set[CheckpointRef] = set()
    for event in _events(store, job.id):
        if event.type in ("checkpoint", "retention"):
            at = CheckpointRef(segment=event.data["segment"], step=event.data["step"])
            (written if event.type == "checkpoint" else deleted).add(at)
    # Retention says nothing of what has left the history, so the history is looked at last.
    return on_history(written - deleted, read_segments(bucket, _layout(job)), _end(job))


def _events(store: Store, job_id: str) -> Iterator[Event]:
    seen = 0
    while page := store.events(job_id, after=seen, limit=_EVENTS):
        yield from page
        seen = page[-1].seq


def on_history(
    written: set[CheckpointRef], segments: Mapping[str, SegmentDocument], end: CheckpointRef | None
) -> set[CheckpointRef]:
    """Return those of the checkpoints that are on the history, as far as its segments are there. Pure.

    Where one of them is lost, nobody can tell what the history left before: all that was written up to there counts.
    """
    last = max(written, key=_place, default=None)
    if end is None and last is not None and all(_order(last.segment) > _order(name) for name in segments):
        end = last  # the segment that it was written in is lost
    spans = {span.segment: span for span in history(segments.values(), end)}
    lost = segments[next(iter(spans))].origin if spans else end

    def counts(at: CheckpointRef) -> bool:
        if at.segment in spans:
            return spans[at.segment].contains(at.step)
        return lost is not None and lost.job_id is None and _place(at) <= _place(lost)

    return {at for at in written if counts(at)}


def _order(segment: str) -> tuple[int, int]:
    parsed = SegmentId.parse(segment)
    return parsed.attempt, parsed.restart


def _place(at: CheckpointRef) -> tuple[tuple[int, int], int]:
    return _order(at.segment), at.step


def verification(bucket: Bucket, store: Store, job: JobRow, found: list[CheckpointRef]) -> Generator[bytes, None, None]:
    """Yield the lines of a verification. It never raises for the store or the database: then the verdict is unknown."""
    checked: list[CheckedCheckpoint] = []
    for at in reversed(found):  # the one that a resume would begin at is read whatever the older ones are like
        if any(checkpoint.verdict == "unknown" for checkpoint in checked):  # each further question would take long
            checked.append(_unread(at, "unknown", "not looked at, since a newer one could not be read"))
            continue
        with closing(_pinned(bucket, store, job, at)) as telling:  # lets go of the pin also when nobody listens
            for told in telling:
                if isinstance(told, CheckedCheckpoint):
                    checked.append(told)
                else:
                    yield _line(told)
    yield _line(Verification(verdict=verdict_of(checked), checkpoints=checked[::-1]))


def _line(told: Checking | Verification) -> bytes:
    return told.model_dump_json().encode() + b"\n"


def _pinned(bucket: Bucket, store: Store, job: JobRow, at: CheckpointRef) -> Telling:
    """Verify a checkpoint while a pin keeps it."""
    what = f"job {job.id}: the verification of step {at.step}"
    try:
        pin = store.pin(job.id, at, "verification", now(), now() + PIN)
        if pin is None:
            yield _unread(at, "gone", "it is just being deleted")
            return
        try:
            for told in held(verify(bucket, store, job, at), store, pin, what):
                yield _unless_deleted(store, job, told)
        finally:
            with suppress(SQLAlchemyError):  # it ends by itself
                store.unpin(pin)
    except StorageError as error:
        yield _unread(at, "unknown", str(error))
    except SQLAlchemyError:
        yield _unread(at, "unknown", "the database does not answer, so nothing could keep it meanwhile")


def _unless_deleted(store: Store, job: JobRow, told: Checking | CheckedCheckpoint) -> Checking | CheckedCheckpoint:
    """A job that is deleted takes its checkpoints with it, whatever pins them."""
    if isinstance(told, Checking) or told.verdict != "damaged":
        return told
    with suppress(SQLAlchemyError):  # whatever the database would say, the damage was seen
        if store.get(job.id, job.project) is None:
            return told.model_copy(update={"verdict": "gone", "message": "the job was deleted meanwhile", "damage": []})
    return told


def verify(bucket: Bucket, store: Store, job: JobRow, at: CheckpointRef) -> Telling:
    """Compare a checkpoint with its manifest. Raises StorageError or SQLAlchemyError for who does not answer."""
    checkpoint = _checkpoint(job, at)
    try:
        manifest = _read_twice(bucket, checkpoint)
    except (ObjectMissing, InvalidData) as error:
        yield _without(bucket, store, job, at, error)
        return
    damage, before = [], 0
    for part in manifest.parts:
        for told in _examine(bucket, checkpoint.prefix, part):
            if isinstance(told, Damage):
                damage.append(told)
            else:
                yield Checking(step=at.step, checked=before + told, size=manifest.size)
        before += part.size
    yield _judged(at, manifest, damage)


def _layout(job: JobRow) -> JobLayout:
    return JobLayout(job.project, job.id)


def _end(job: JobRow) -> CheckpointRef | None:
    return CheckpointRef.model_validate(job.history_end) if job.history_end else None


def _checkpoint(job: JobRow, at: CheckpointRef) -> CheckpointLayout:
    return _layout(job).segment(at.segment).checkpoint(at.step)


def _read_twice(bucket: Bucket, checkpoint: CheckpointLayout) -> Manifest:
    with suppress(InvalidData):
        return read_manifest(bucket, checkpoint.manifest)
    return read_manifest(bucket, checkpoint.manifest)


def _without(
    bucket: Bucket, store: Store, job: JobRow, at: CheckpointRef, error: ObjectMissing | InvalidData
) -> CheckedCheckpoint:
    """Judge a checkpoint whose manifest cannot be read. Who deletes one deletes the rest too, right after it, and has
    left an event before; where even the events do not tell that it was written, it may have left the history."""
    checkpoint = _checkpoint(job, at)
    name = checkpoint.manifest.removeprefix(checkpoint.prefix)
    if isinstance(error, InvalidData):
        damage = Damage(name=name, kind="altered", message=str(error))
    elif bucket.objects(checkpoint.prefix) or at in _due(bucket, store, job):
        damage = Damage(name=name, kind="missing", message=str(error))
    else:
        return _unread(at, "gone", "it was deleted meanwhile")
    return _unread(at, "damaged", f"its manifest is {damage.kind}", damage)


def _unread(at: CheckpointRef, verdict: Verdict, message: str, *damage: Damage) -> CheckedCheckpoint:
    return CheckedCheckpoint(step=at.step, segment=at.segment, verdict=verdict, message=message, damage=list(damage))


def _judged(at: CheckpointRef, manifest: Manifest, damage: list[Damage]) -> CheckedCheckpoint:
    count = len(manifest.parts)
    return CheckedCheckpoint(
        step=at.step,
        segment=at.segment,
        verdict="damaged" if damage else "well",
        message=f"{len(damage)} of {count} parts" if damage else "every byte is what was written",
        parts=count,
        size=manifest.size,
        damage=damage,
    )


def _examine(bucket: Bucket, prefix: str, part: Receipt) -> Iterator[int | Damage]:
    """Yield how many bytes of a part have been read, and at last the damage, if there is any."""
    key = prefix + part.name
    try:
        size = bucket.size(key)
        for _ in range(2 if size == part.size else 0):
            if (yield from _sha256(bucket, key, 0, size)) == part.sha256:
                return
        tensors = yield from _lost_tensors(bucket, key, size, part)
    except ObjectMissing as error:
        yield Damage(name=part.name, kind="missing", message=str(error), tensors=sorted(part.tensors))
    except InvalidData as error:  # it was cut short meanwhile
        yield Damage(name=part.name, kind="short", message=str(error), tensors=sorted(part.tensors))
    else:
        words = f"{key} has another sha256 than its manifest says"
        if size != part.size:
            words = f"{key} has {size} bytes, and its manifest says {part.size}"
        yield Damage(name=part.name, kind="short" if size < part.size else "altered", message=words, tensors=tensors)


def _sha256(bucket: Bucket, key: str, start: int, end: int) -> Generator[int, None, str]:
    """Return the sha256 of the bytes from `start` to `end`; yields where it is."""
    digest = hashlib.sha256()
    for at in range(start, end, PIECE):
        digest.update(bucket.get_range(key, at, min(PIECE, end - at)))  # held by no name when the next one comes
        yield min(end, at + PIECE)
    return digest.hexdigest()


def _lost_tensors(bucket: Bucket, key: str, size: int, part: Receipt) -> Generator[int, None, list[str]]:
    """Return which of the model's tensors in a damaged part are damaged; yields where it is."""
    try:
        data, entries = read_header(bucket, key, size)
    except InvalidData:
        return sorted(part.tensors)
    lost = []
    for name, sha256 in sorted(part.tensors.items()):
        start, end = entries[name].data_offsets if name in entries else (0, 0)
        inside = 0 <= start < end <= size - data
        if not inside or (yield from _sha256(bucket, key, data + start, data + end)) != sha256:
            lost.append(name)
    return lost
