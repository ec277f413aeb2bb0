"""Checkpoints and segments in short notation, for the tests of what becomes of them; and writing real ones."""

from datetime import timedelta

from api.documents import CheckpointRef, SegmentDocument
from api.layout import JobLayout
from api.storage import Bucket
from service.retention import Folder
from tests.fakes import T0, job_id
from workers.checkpoint import CheckpointWriter
from workers.session import Session
from workers.snapshot import State

GRACE = timedelta(seconds=900)
JOB = job_id(1)


def ref(place: str) -> CheckpointRef:
    """Read `1-0-a@4`."""
    segment, step = place.split("@")
    return CheckpointRef(segment=segment, step=int(step))


def refs(places: str) -> set[CheckpointRef]:
    return set(map(ref, places.split()))


def segment(name: str, origin: str | None = None) -> SegmentDocument:
    return SegmentDocument(
        job_id=JOB,
        segment=name,
        origin=ref(origin) if origin else None,
        world_size=1,
        fingerprint=None,
        created_at=T0,
    )


#: `1-0-a@4` is a checkpoint, `1-0-a@4=2.5` one with an eval loss, `1-0-a@4?` a folder without a manifest.
def folder(text: str) -> Folder:
    place, _, loss = text.rstrip("?").partition("=")
    return Folder(ref(place), not text.endswith("?"), float(loss) if loss else None)


class LoneSession(Session):
    """A rank of a group whose other ranks run at another time: when they are to agree, it has only itself to ask."""

    def maximum(self, *values: int) -> list[int]:
        return list(values)


def write_checkpoint(bucket: Bucket, layout: JobLayout, at: CheckpointRef, state: State, world_size: int = 1) -> None:
    """Let the workers' own code write a checkpoint, one rank after the other."""
    for rank in reversed(range(world_size)):  # rank 0 waits for the others' receipts
        writer = CheckpointWriter(
            bucket, layout, at.segment, LoneSession(1, 0, rank, world_size), lambda: None, lambda manifest: None
        )
        assert writer.save(at.step, state, {"eval_loss": at.step / 7})
        writer.wait()
        writer.close()
