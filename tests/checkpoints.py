"""Checkpoints and segments in short notation, for the tests of what becomes of them."""

from datetime import timedelta

from api.documents import CheckpointRef, SegmentDocument
from service.retention import Folder
from tests.fakes import T0, job_id

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
