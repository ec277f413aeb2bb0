"""A segment: one start of a worker group, with a prefix of its own and a pointer to where it began.

Rank 0 walks the job's history, verifies the checkpoint to begin at, writes `segment.json` before anything else, and
tells the others, so ranks cannot disagree and a zombie can only write where nobody will read.
"""

import logging
import platform
import secrets
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from api.documents import (
    CheckpointRef,
    FaultDocument,
    Fingerprint,
    JobDocument,
    ResultDocument,
    SegmentDocument,
    now,
)
from api.errors import StorageError
from api.history import newest
from api.jobs import Reason
from api.layout import JobLayout, SegmentId, SegmentLayout
from api.spec import TrainSpec
from api.storage import Bucket
from workers.control import Halt
from workers.faults import SegmentEnd, crash_loop, reason_of
from workers.restore import Restored, newest_valid, read_checkpoint, read_segments
from workers.session import Session
from workers.stream import Journal, LineStream, StreamHandler

logger = logging.getLogger("lockstep.workers")


SKIPPED_BATCH = "skipped_batch"
"""In the result of a run that goes back to a checkpoint: the global batch that its successor leaves out."""
OWES_EVALUATION = "loop.owes_evaluation"
"""In a checkpoint: whether it was written by a stop that cut the evaluation of its step short; one number."""
_ENDS = 8
"""The newest segments that are looked at for a crash loop."""


@dataclass
class Segment:
    """An open segment on one rank."""

    id: str
    job: JobLayout
    bucket: Bucket
    session: Session
    skipped: list[int]
    """Global batches to leave out, by number."""
    crash_loop: str | None
    """Why another try would only end like those before."""
    journal: Journal
    log: LineStream
    handler: StreamHandler
    step: int
    """Finished steps."""

    @property
    def layout(self) -> SegmentLayout:
        return self.job.segment(self.id)

    def refuse_crash_loop(self) -> None:
        """Halt, on every rank, if the job dies in a loop."""
        if self.crash_loop is not None:
            raise Halt("failed", Reason.CRASH_LOOP, self.crash_loop)

    def note_fault(self, error: Exception, phase: str) -> None:
        """Leave word of what ended this rank, if the store still takes it."""
        rank, reason = self.session.rank, reason_of(error)
        message = f"rank {rank}: {type(error).__name__}: {error}"[:2000]
        fault = FaultDocument(rank=rank, step=self.step, reason=reason, phase=phase, message=message, created_at=now())
        try:
            self.bucket.put_document(self.layout.fault(rank), fault)
        except StorageError as trouble:
            logger.warning("the fault was not written down: %s", trouble)

    def finish(self, result: ResultDocument) -> None:
        """Write the outcome, after everything that it rests on; rank 0 does it for all."""
        if self.session.leads:
            self.journal.flush()
            self.bucket.put_document(self.layout.result, result)

    def close(self) -> None:
        """Write out the streams. A store that does not take them now must not hide why the run ended."""
        logging.getLogger("lockstep").removeHandler(self.handler)
        for stream in (self.journal, self.log):
            try:
                stream.close()
            except StorageError as error:
                logger.warning("the end of a stream was not written: %s", error)


@dataclass(frozen=True)
class _Choice:
    """What rank 0 has chosen for all ranks."""

    segment: str
    point: CheckpointRef | None
    skipped: list[int]
    crash_loop: str | None


def begin_segment(
    job: JobDocument, session: Session, bucket: Bucket, fingerprint: Fingerprint | None, interval: float
) -> tuple[Segment, Restored]:
    """Choose the checkpoint, write `segment.json`, open the streams; every rank gets the same origin.

    A job that begins at another one's checkpoint does so until it has one of its own.
    """
    began = perf_counter()
    layout = JobLayout(job.project, job.id)
    origin = Restored(None, {}, {})
    choice: _Choice | None = None
    notes: list[tuple[str, str]] = []
    if session.leads:
        segments = read_segments(bucket, layout)
        origin, passed_over = newest_valid(bucket, layout, segments)
        if origin.point is None and job.init is not None:
            origin = read_checkpoint(bucket, layout, job.init)
        name = str(SegmentId(session.attempt, session.restart, secrets.token_hex(4)))
        document = SegmentDocument(
            job_id=job.id,
            segment=name,
            origin=origin.point,
            world_size=session.world_size,
            fingerprint=fingerprint,
            skipped=left_out(bucket, layout, segments, origin),
            redoes_evaluation=origin.own and bool(origin.state.get(OWES_EVALUATION, torch.zeros(1)).any()),
            created_at=now(),
        )
        bucket.put_document(layout.segment(name).document, document)
        choice = _Choice(name, origin.point, document.skipped, crash_loop(ends(bucket, layout, segments)))
        if session.restart:
            notes = [("restart", f"a worker was lost; the group was started again (restart {session.restart})")]
        notes += _notes(origin.point, passed_over, segments, document)
    agreed = session.broadcast(choice)
    if agreed.point is not None and not session.leads:
        origin = read_checkpoint(bucket, layout, agreed.point)
    segment = _open(agreed, layout, bucket, session, interval, origin.step)
    seconds = perf_counter() - began
    for event, message in notes:
        values = {"seconds": seconds} if event == "resumed" else {}  # to choose, read and verify the checkpoint
        segment.journal.event(origin.step, event, message, **values)
    return segment, origin


def left_out(bucket: Bucket, layout: JobLayout, segments: list[SegmentDocument], origin: Restored) -> list[int]:
    """Return the batches that a new segment leaves out: those of its checkpoint, those that the newest segment left
    out, and the one for which that went back."""
    skipped = set(origin.skipped)
    if (last := newest(segments)) is not None:
        skipped |= set(last.skipped)
        result = bucket.find_document(layout.segment(last.segment).result, ResultDocument)
        if result is not None and SKIPPED_BATCH in result.values:
            skipped.add(int(result.values[SKIPPED_BATCH]))
    return sorted(skipped)


def ends(bucket: Bucket, layout: JobLayout, segments: list[SegmentDocument]) -> list[SegmentEnd]:
    """Return how the newest segments ended, oldest first."""
    latest = sorted(segments, key=lambda s: SegmentId.parse(s.segment))[-_ENDS:]
    return [
        SegmentEnd(s.segment, s.origin.step if s.origin is not None else 0, _faults(bucket, layout.segment(s.segment)))
        for s in latest
    ]


def _faults(bucket: Bucket, segment: SegmentLayout) -> tuple[FaultDocument, ...]:
    return tuple(bucket.get_document(item.key, FaultDocument) for item in bucket.files(segment.faults))


def _open(choice: _Choice, job: JobLayout, bucket: Bucket, session: Session, interval: float, step: int) -> Segment:
    layout = job.segment(choice.segment)
    journal = Journal(LineStream(bucket, layout.stream, "jsonl", interval) if session.leads else None)
    log = LineStream(bucket, layout.logs(session.rank), "log", interval)
    handler = StreamHandler(log)
    root = logging.getLogger("lockstep")
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    return Segment(
        id=choice.segment,
        job=job,
        bucket=bucket,
        session=session,
        skipped=list(choice.skipped),
        crash_loop=choice.crash_loop,
        journal=journal,
        log=log,
        handler=handler,
        step=step,
    )


def _notes(
    point: CheckpointRef | None,
    passed_over: list[str],
    segments: list[SegmentDocument],
    begun: SegmentDocument,
) -> list[tuple[str, str]]:
    """What the history should say about this beginning, as (event, message)."""
    notes = [("fallback", f"a checkpoint was passed over: {why}") for why in passed_over]
    if point is None:
        return notes
    if point.job_id is not None:
        return [*notes, ("forked", f"begins at the checkpoint of step {point.step} of {point.job_id}")]
    notes.append(("resumed", f"resumed from the checkpoint of step {point.step}"))
    origin = next(s for s in segments if s.segment == point.segment)
    if origin.world_size != begun.world_size:
        notes.append(("resized", f"{begun.world_size} workers instead of {origin.world_size}"))
    if origin.fingerprint != begun.fingerprint:
        notes.append(("fingerprint", f"was {origin.fingerprint!r}, is {begun.fingerprint!r}: bits may differ"))
    return notes


def fingerprint_of(spec: TrainSpec, session: Session) -> Fingerprint:
    """Return what must be equal for two runs to agree to the bit."""
    device = session.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return Fingerprint(
        torch=str(torch.__version__),
        device=name,
        threads=spec.resources.cpus,
        compile=spec.compile,
        precision=spec.precision,
        world_size=None if spec.determinism == "elastic" else session.world_size,
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
