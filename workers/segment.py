"""A segment: one start of a worker group, with a prefix of its own and a pointer to where it began.

Rank 0 walks the job's history, verifies the checkpoint to begin at, writes `segment.json` before anything else, and
tells the others, so ranks cannot disagree and a zombie can only write where nobody will read.
"""

import logging
import platform
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from api.documents import CheckpointRef, Fingerprint, JobDocument, ResultDocument, SegmentDocument, now
from api.errors import StorageError
from api.layout import JobLayout, SegmentId, SegmentLayout
from api.spec import TrainSpec
from api.storage import Bucket
from workers.checkpoint import Restored, newest_valid, read_checkpoint, read_segments
from workers.session import Session
from workers.stream import Journal, LineStream, StreamHandler

logger = logging.getLogger("lockstep.workers")


@dataclass
class Segment:
    """An open segment on one rank."""

    id: str
    job: JobLayout
    bucket: Bucket
    session: Session
    journal: Journal
    log: LineStream
    handler: StreamHandler

    @property
    def layout(self) -> SegmentLayout:
        return self.job.segment(self.id)

    def finish(self, result: ResultDocument) -> None:
        """Write the outcome, after everything that it rests on. Rank 0 only."""
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
    segment: str
    point: CheckpointRef | None


def begin_segment(
    job: JobDocument, session: Session, bucket: Bucket, fingerprint: Fingerprint | None, interval: float
) -> tuple[Segment, Restored]:
    """Choose the checkpoint, write `segment.json`, open the streams; every rank gets the same origin."""
    layout = JobLayout(job.project, job.id)
    origin = Restored(None, {}, {})
    choice: _Choice | None = None
    notes: list[tuple[str, str]] = []
    if session.leads:
        segments = read_segments(bucket, layout)
        origin, passed_over = newest_valid(bucket, layout, segments)
        name = str(SegmentId(session.attempt, session.restart, secrets.token_hex(4)))
        document = SegmentDocument(
            job_id=job.id,
            segment=name,
            origin=origin.point,
            world_size=session.world_size,
            fingerprint=fingerprint,
            created_at=now(),
        )
        bucket.put_document(layout.segment(name).document, document)
        choice = _Choice(name, origin.point)
        if session.restart:
            notes = [("restart", f"a worker was lost; the group was started again (restart {session.restart})")]
        notes += _notes(origin.point, passed_over, segments, fingerprint)
    agreed = session.broadcast(choice)
    if agreed.point is not None and not session.leads:
        origin = read_checkpoint(bucket, layout, agreed.point)
    segment = _open(agreed.segment, layout, bucket, session, interval)
    for event, message in notes:
        segment.journal.event(origin.step, event, message)
    return segment, origin


def _open(name: str, job: JobLayout, bucket: Bucket, session: Session, interval: float) -> Segment:
    layout = job.segment(name)
    journal = Journal(LineStream(bucket, layout.stream, "jsonl", interval) if session.leads else None)
    log = LineStream(bucket, layout.logs(session.rank), "log", interval)
    handler = StreamHandler(log)
    root = logging.getLogger("lockstep")
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    return Segment(name, job, bucket, session, journal, log, handler)


def _notes(
    point: CheckpointRef | None,
    passed_over: list[str],
    segments: list[SegmentDocument],
    fingerprint: Fingerprint | None,
) -> list[tuple[str, str]]:
    """What the history should say about this beginning, as (event, message)."""
    notes = [("fallback", f"a checkpoint was passed over: {why}") for why in passed_over]
    if point is not None:
        notes.append(("resumed", f"resumed from the checkpoint of step {point.step}"))
        origin = next(s for s in segments if s.segment == point.segment)
        if origin.fingerprint != fingerprint:
            notes.append(("fingerprint", f"was {origin.fingerprint!r}, is {fingerprint!r}: bits may differ"))
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
