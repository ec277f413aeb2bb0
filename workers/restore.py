"""Reading checkpoints: along the job's history, newest first, until one verifies to the last byte.

A part is read piece by piece into the tensors that are handed out, and hashed on the way. So a restore takes the
memory of the state, which the model and the optimizer then take over, and one piece.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from api.documents import CheckpointRef, Receipt, SegmentDocument
from api.errors import InvalidData, ObjectMissing
from api.history import history
from api.layout import JobLayout
from api.manifest import read_manifest
from api.storage import Bucket
from workers.snapshot import Entry, State, bytes_of, parse_header

T = TypeVar("T")

PIECE = 16 * 2**20
"""Bytes of an object that are in memory at a time."""
_HEADER_LIMIT = 100 * 10**6
"""Longest header that safetensors allows, in bytes."""


def read_segments(bucket: Bucket, layout: JobLayout) -> list[SegmentDocument]:
    """Return the segments of a job; a folder without `segment.json` never began."""
    found = (
        bucket.find_document(layout.segment(name).document, SegmentDocument) for name in bucket.folders(layout.segments)
    )
    return [segment for segment in found if segment is not None]


def resume_points(bucket: Bucket, layout: JobLayout, segments: list[SegmentDocument]) -> list[CheckpointRef]:
    """Return the checkpoints on the job's history, newest first; which of them are complete is not looked at."""
    points = []
    for span in reversed(history(segments)):
        begun = [
            int(name.removeprefix("step-"))
            for name in bucket.folders(layout.segment(span.segment).prefix)
            if name.startswith("step-")
        ]
        points += [
            CheckpointRef(segment=span.segment, step=step)
            for step in sorted(begun, reverse=True)
            if span.contains(step)
        ]
    return points


@dataclass(frozen=True)
class Restored:
    """Where a run begins: a verified checkpoint, or step 0 with nothing."""

    point: CheckpointRef | None
    state: State
    metrics: dict[str, float]
    skipped: list[int] = field(default_factory=list)
    """Global batches that were left out on purpose up to there."""

    @property
    def step(self) -> int:
        return self.point.step if self.point is not None else 0

    @property
    def own(self) -> bool:
        """Whether it is a checkpoint of this job, and not of the one that it was forked from."""
        return self.point is not None and self.point.job_id is None


def newest_valid(bucket: Bucket, layout: JobLayout, segments: list[SegmentDocument]) -> tuple[Restored, list[str]]:
    """Return the newest checkpoint that verifies, and why newer ones were passed over."""
    passed_over: list[str] = []
    for point in resume_points(bucket, layout, segments):
        try:
            return read_checkpoint(bucket, layout, point), passed_over
        except ObjectMissing as error:
            # Without a manifest it was never a checkpoint: a run died while writing it. With one, it is damaged.
            if bucket.objects(layout.segment(point.segment).checkpoint(point.step).manifest):
                passed_over.append(str(error))
        except InvalidData as error:
            passed_over.append(str(error))
    return Restored(None, {}, {}), passed_over


def read_checkpoint(bucket: Bucket, layout: JobLayout, point: CheckpointRef) -> Restored:
    """Return a checkpoint's whole state, every byte verified. The point may be one of another job of the project.

    ObjectMissing if it was never committed or lost an object, InvalidData if a part is short or altered.
    """
    owner = JobLayout(layout.project, point.job_id) if point.job_id is not None else layout
    checkpoint = owner.segment(point.segment).checkpoint(point.step)
    manifest = _twice(partial(read_manifest, bucket, checkpoint.manifest))
    state: State = {}
    for part in manifest.parts:
        state |= _twice(partial(read_part, bucket, checkpoint.prefix + part.name, part))
    return Restored(point, state, manifest.metrics, manifest.skipped)


def _twice(read: Callable[[], T]) -> T:
    """Read once more if the bytes are wrong, for the wire can flip a bit too; a second time, they are the object's."""
    with suppress(InvalidData):  # and let go of what was read
        return read()
    return read()


def read_part(bucket: Bucket, key: str, part: Receipt) -> State:
    """Return the tensors of a part; InvalidData if any byte of it is not what the manifest says."""
    if (size := bucket.size(key)) != part.size:
        raise InvalidData(f"{key} has {size} bytes, and its manifest says {part.size}")
    prefix = bucket.get_range(key, 0, 8)
    length = int.from_bytes(prefix, "little")
    data_size = part.size - 8 - length
    if not 0 < length <= _HEADER_LIMIT or data_size < 0:
        raise InvalidData(f"{key} does not begin as a safetensors file")
    header = bucket.get_range(key, 8, length)
    try:
        entries = parse_header(header, data_size)
    except InvalidData as error:
        raise InvalidData(f"{key} is damaged: {error}") from error
    state = {entry.name: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries}
    digest, at = hashlib.sha256(prefix + header), 0
    for piece in pieces(bucket, key, 8 + length, part.size):
        digest.update(piece)
        _scatter(piece, at, entries, state)
        at += len(piece)
        del piece  # before the next one is read
    if digest.hexdigest() != part.sha256:
        raise InvalidData(f"{key} is not what its manifest says")
    return state


def pieces(bucket: Bucket, key: str, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of an object from `start` to `end`; InvalidData if it is shorter."""
    for at in range(start, end, PIECE):
        yield bucket.get_range(key, at, min(PIECE, end - at))


def _scatter(piece: bytes, at: int, entries: list[Entry], state: State) -> None:
    """Copy a piece, whose first byte is number `at` of the data, into the tensors that it holds something of."""
    source = memoryview(piece)
    for entry in entries:
        low, high = max(entry.start, at), min(entry.end, at + len(piece))
        if low < high:
            bytes_of(state[entry.name])[low - entry.start : high - entry.start] = source[low - at : high - at]
