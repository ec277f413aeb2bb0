"""Retention: which checkpoints of a job go, and when. Workers never delete; this does, in two passes.

First a mark; after a grace longer than any start of an attempt, everything is read again, and only what nobody needs
then is deleted, its manifest first. What goes and what stays is the pure function `decide`. Beside the checkpoints
beyond a job's policy, these are the leftovers of every job: what was begun and never got its manifest.
"""

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from sqlalchemy.exc import SQLAlchemyError

from api.documents import CheckpointRef, SegmentDocument
from api.documents import now as present
from api.errors import InvalidData, LockstepError, StorageDenied, StorageUnavailable
from api.history import history, newest
from api.jobs import JobState
from api.layout import JobLayout, SegmentId
from api.manifest import read_manifest
from api.prepare_spec import PrepareSpec
from api.spec import TrainSpec
from api.storage import Bucket
from service.database import REFUSED
from service.leases import Leases
from service.logs import about
from service.periodic import NotePass, Periodic, nobody
from service.rows import JobRow, Mark, NewEvent
from service.settings import Settings
from service.store import Store

logger = logging.getLogger("lockstep.service")

_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Policy:
    """How many checkpoints of a job's history stay; both None: all of them."""

    keep_last: int | None = None
    """The newest ones. None beside `keep_best` stands for one."""
    keep_best: int | None = None
    """Those of lowest eval loss, whether or not they are among the newest."""

    def __bool__(self) -> bool:
        return self.keep_last is not None or self.keep_best is not None

    def __str__(self) -> str:
        given = {"keep_last": self.keep_last, "keep_best": self.keep_best}
        return ", ".join(f"{name} {count}" for name, count in given.items() if count is not None)


@dataclass(frozen=True)
class Folder:
    """The folder of a checkpoint, as it was found in the bucket."""

    at: CheckpointRef
    committed: bool
    """It has a manifest; without one it is no checkpoint, or not yet."""
    eval_loss: float | None = None


@dataclass(frozen=True)
class Look:
    """All that the bucket and the database say of a job's checkpoints at one moment."""

    state: JobState
    end: CheckpointRef | None
    """Where the history of an ended job was recorded to end."""
    segments: Sequence[SegmentDocument]
    folders: Sequence[Folder]
    pinned: Collection[CheckpointRef]
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Decision:
    mark: list[CheckpointRef] = field(default_factory=list)
    unmark: list[CheckpointRef] = field(default_factory=list)
    delete: list[CheckpointRef] = field(default_factory=list)
    settled: bool = False
    """The job has ended and nothing is left to be done for it, ever."""


def decide(look: Look, policy: Policy, now: datetime, grace: timedelta) -> Decision:
    """Return what to do about a job's checkpoints. Pure."""
    if not (_stands_alone(look) and _is_whole(look)):
        return Decision()
    if look.state.ended:  # what is being deleted will not stay for another one's sake
        doomed = {mark.at for mark in look.marks if mark.doomed}
        look = replace(look, folders=[folder for folder in look.folders if folder.at not in doomed])
    needed = _needed(look, policy)
    kept = needed.union(look.pinned)
    surplus = [folder.at for folder in look.folders if folder.at not in kept]

    def goes(mark: Mark) -> bool:
        if mark.doomed:  # its deletion was begun; after the end of a job by a user, who overrules the policy
            return look.state.ended or mark.at not in kept
        return mark.at in surplus and now - mark.marked_at >= grace

    marked = {mark.at for mark in look.marks}
    return Decision(
        mark=[at for at in surplus if at not in marked],
        unmark=[mark.at for mark in look.marks if mark.at not in surplus and not goes(mark)],
        delete=[mark.at for mark in look.marks if goes(mark)],
        settled=look.state.ended and not marked and all(folder.at in needed for folder in look.folders),
    )


def _stands_alone(look: Look) -> bool:
    """Tell whether nobody may still need an old checkpoint to begin at: not before, not during a start.

    A worker group that starts begins at the newest checkpoint that verifies, which may be any of those it sees. Its
    `segment.json` says which. But it may die right after, and only a checkpoint of its own shows that what it began at
    could be read by every rank; so until then all that was there when it started stays. (When Ray replaces the group
    within an attempt, we see that only from its `segment.json`; it begins at the newest one, which always stays.)
    """
    if look.state.ended:
        return True
    last = newest(look.segments)
    own = {folder.at.segment for folder in look.folders if folder.committed}
    return look.state is JobState.RUNNING and last is not None and last.segment in own


def _is_whole(look: Look) -> bool:
    """Tell whether every segment of the job is there that another one, or the end, points to; without it the history
    would seem shorter than it is, and its checkpoints nobody's."""
    known = {segment.segment for segment in look.segments}
    ends = [look.end, *(segment.origin for segment in look.segments)]
    return all(ref.segment in known for ref in ends if ref is not None and ref.job_id is None)


def _needed(look: Look, policy: Policy) -> set[CheckpointRef]:
    """Return the checkpoints that stay, pins aside."""
    kept = {segment.origin for segment in look.segments if segment.origin is not None} | _being_written(look)
    if not policy:
        return kept | {folder.at for folder in look.folders if folder.committed}
    shown = _shown(look)
    ranked = sorted(
        (folder for folder in shown if folder.eval_loss is not None),
        key=lambda folder: (folder.eval_loss, -folder.at.step),  # of two equals the newer one
    )
    return kept | {folder.at for folder in shown[-(policy.keep_last or 1) :] + ranked[: policy.keep_best or 0]}


def _being_written(look: Look) -> set[CheckpointRef]:
    last = newest(look.segments)
    if look.state.ended or last is None:
        return set()
    begun = {folder.at for folder in look.folders if not folder.committed and folder.at.segment == last.segment}
    return begun - {mark.at for mark in look.marks if mark.doomed}  # of those the manifest is gone, not to come


def _shown(look: Look) -> list[Folder]:
    """Return the checkpoints on the job's history, oldest first: those that a user sees."""
    spans = {span.segment: span for span in history(look.segments, look.end)}
    shown = [
        folder
        for folder in look.folders
        if folder.committed and (span := spans.get(folder.at.segment)) is not None and span.contains(folder.at.step)
    ]
    return sorted(shown, key=lambda folder: folder.at.step)


@dataclass
class _Memory:
    """What was read of a job and never changes."""

    segments: dict[str, SegmentDocument] = field(default_factory=dict)
    eval_losses: dict[CheckpointRef, float | None] = field(default_factory=dict)


class Retention:
    """Looks at the checkpoints of every training job, once in each interval, until it has ended and is in order."""

    def __init__(
        self, store: Store, bucket: Bucket, settings: Settings, leases: Leases, note_pass: NotePass = nobody
    ) -> None:
        self._store, self._bucket, self._leases = store, bucket, leases
        self._grace, self._interval = timedelta(seconds=settings.retention_grace), settings.retention_interval
        self._memory: dict[str, _Memory] = {}
        # In a thread of its own: it lists a lot, and no wish to stop shall wait for that.
        self.loop = Periodic("retention", lambda: self.run(present()), settings.retention_interval, note_pass)

    def run(self, now: datetime) -> None:
        """One pass. The trouble of one job stops no other; a bucket that does not answer stops all."""
        if not self._is_ours():
            return
        jobs = self._store.retained()
        self._memory = {job.id: self._memory.get(job.id, _Memory()) for job in jobs}
        for job in jobs:
            if self.loop.stopping or not self._is_ours():
                return
            with about(job=job.id):
                try:
                    self._retain(job, now)
                except REFUSED:
                    logger.exception("its checkpoints are left as they are, for the database does not take that")
                except SQLAlchemyError:
                    raise
                except (StorageUnavailable, StorageDenied) as error:
                    logger.warning("no checkpoint is deleted for now: %s", error)
                    return
                except (LockstepError, ValueError) as error:
                    logger.warning("its checkpoints are left as they are: %s", error)
                except Exception:
                    logger.exception("its checkpoints are left as they are, for a bug")

    def _is_ours(self) -> bool:
        """Whether of several control planes this is the one that does it; it stays the one from pass to pass."""
        return self._leases.hold("retention", 2 * self._interval)

    def _retain(self, job: JobRow, now: datetime) -> None:
        policy = policy_of(job.parsed_spec)
        if not (policy or JobState(job.state).ended):
            return  # where all checkpoints stay, leftovers can wait for the job's end
        look = self._look(job, policy, now)
        decision = decide(look, policy, now, self._grace)
        self._store.mark(job.id, decision.mark, now)
        if decision.unmark:
            self._store.unmark_as_seen(job.id, [mark for mark in look.marks if mark.at in decision.unmark])
        shown = {folder.at for folder in _shown(look)}  # of others a user knows nothing
        for at in decision.delete:
            if self._store.doom(job, at, now, gone(at, f"retention: {policy}") if at in shown else None):
                remove(self._bucket, JobLayout(job.project, job.id), at)
                self._store.unmark(job.id, [at])
        if decision.settled:
            self._store.settle(job)

    def _look(self, job: JobRow, policy: Policy, now: datetime) -> Look:
        """Read the job's segments and checkpoints: one listing, and what is new in it."""
        layout, memory = JobLayout(job.project, job.id), self._memory[job.id]
        keys = {item.key for item in self._bucket.objects(layout.segments)}
        found = {_first_two(key.removeprefix(layout.segments)) for key in keys}
        begun = {name: layout.segment(name).document for name, _ in found if _is_segment(name)}
        for name in [name for name, key in begun.items() if key in keys and name not in memory.segments]:
            memory.segments[name] = self._bucket.get_document(begun[name], SegmentDocument)
        folders = []
        for name, inner in sorted(found):
            if name in memory.segments and (step := _STEP.fullmatch(inner)):
                at = CheckpointRef(segment=name, step=int(step[1]))
                manifest = layout.segment(name).checkpoint(at.step).manifest
                if not policy or manifest not in keys:  # where all are kept, none need be read
                    folders.append(Folder(at, manifest in keys))
                elif self._is_readable(at, manifest, memory):
                    folders.append(Folder(at, True, memory.eval_losses[at]))
        end = CheckpointRef.model_validate(job.history_end) if job.history_end else None
        pinned, marks = self._store.pinned(job.id, now), self._store.marks(job.id)
        return Look(JobState(job.state), end, list(memory.segments.values()), folders, pinned, marks)

    def _is_readable(self, at: CheckpointRef, manifest: str, memory: _Memory) -> bool:
        """Read a manifest, once. One that cannot be read is neither counted nor deleted: a newer version may."""
        if at not in memory.eval_losses:
            try:
                memory.eval_losses[at] = read_manifest(self._bucket, manifest).metrics.get("eval_loss")
            except InvalidData:
                return False
        return True


def policy_of(spec: TrainSpec | PrepareSpec) -> Policy:
    if isinstance(spec, PrepareSpec):
        return Policy()
    return Policy(spec.checkpoint.keep_last, spec.checkpoint.keep_best)


def remove(bucket: Bucket, layout: JobLayout, at: CheckpointRef) -> None:
    """Delete a checkpoint: its manifest first, so that it is never seen half."""
    checkpoint = layout.segment(at.segment).checkpoint(at.step)
    bucket.delete([checkpoint.manifest])
    bucket.delete([item.key for item in bucket.objects(checkpoint.prefix)])


def gone(at: CheckpointRef, why: str) -> NewEvent:
    """Return the event that tells the user of a deletion."""
    data = {"step": at.step, "segment": at.segment}
    return NewEvent("retention", f"step {at.step}: checkpoint deleted ({why})", data=data)


def _first_two(key: str) -> tuple[str, str]:
    first, _, rest = key.partition("/")
    return first, rest.partition("/")[0]


def _is_segment(name: str) -> bool:
    try:
        SegmentId.parse(name)
    except ValueError:
        return False
    return True
