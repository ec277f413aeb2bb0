"""Reads what the workers left in the bucket: streams, checkpoints, logs, results. Never writes.

What counts is the job's history (api/history.py): lines and checkpoints of a segment beyond the point at which its
successor began were written by nobody that anyone will read.
"""

import base64
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from api.documents import (
    CheckpointRef,
    ControlDocument,
    HeartbeatDocument,
    Manifest,
    ResultDocument,
    SegmentDocument,
    StreamLine,
)
from api.errors import InvalidData, InvalidSpec, ObjectMissing
from api.history import Span, history
from api.jobs import Checkpoint, LogLine, MetricPoint
from api.layout import JobLayout, SegmentId, chunk
from api.manifest import read_manifest
from api.storage import Bucket

_LOG_PAGE = 1000
_OPEN_SEGMENTS = 2
"""The newest segments, whose logs may still grow: the processes of a segment with two successors were ended before the
first of them began."""


@dataclass(frozen=True)
class Mark:
    """A place in one stream: everything before it has been read."""

    chunk: int = 0
    offset: int = 0
    """Lines of the chunk that have been read."""
    number: int = 0
    """Lines of the stream that have been read."""
    size: int = 0
    """Bytes of the chunk when all of it had been read; 0 where that is not so. A chunk of this size holds no more."""


def sizes_below(bucket: Bucket, prefix: str) -> dict[str, int]:
    """Return the size of each object below a prefix, by key."""
    return {item.key: item.size for item in bucket.objects(prefix)}


def lines_after(
    bucket: Bucket, prefix: str, suffix: str, mark: Mark, sizes: Mapping[str, int]
) -> Iterator[tuple[str, Mark]]:
    """Yield each line of a stream after a mark, with the mark after the line. Fetches no chunk that has not grown.

    Only chunks of one listing, `sizes`: a chunk is full before the next one begins, so all but the last of them are
    complete. A chunk that came up meanwhile is left for the next time, since the one before it may have grown.
    """
    index, offset, number = mark.chunk, mark.offset, mark.number
    if mark.size and sizes.get(chunk(prefix, index, suffix)) == mark.size:
        index, offset = index + 1, 0
    while (key := chunk(prefix, index, suffix)) in sizes:
        body = bucket.get(key)
        # Nothing but our own line end: text may hold others, such as U+2028.
        lines = body.decode(errors="replace").split("\n")[:-1]
        for read, line in enumerate(lines[offset:], offset + 1):
            number += 1
            yield line, Mark(index, read, number, len(body) if read == len(lines) else 0)
        index, offset = index + 1, 0


def segment_ids(bucket: Bucket, layout: JobLayout) -> list[SegmentId]:
    """Return the segments of a job, oldest first, whether or not they really began; other folders are none."""
    found = []
    for name in bucket.folders(layout.segments):
        with suppress(ValueError):
            found.append(SegmentId.parse(name))
    return sorted(found)


def read_segments(
    bucket: Bucket, layout: JobLayout, known: Mapping[str, SegmentDocument] | None = None
) -> dict[str, SegmentDocument]:
    """Return the segments of a job that began, by name; those in `known`, which never change, are not read again."""
    found = {}
    for name in map(str, segment_ids(bucket, layout)):
        document = (known or {}).get(name) or bucket.find_document(layout.segment(name).document, SegmentDocument)
        if document is not None:
            found[name] = document
    return found


def read_history(bucket: Bucket, layout: JobLayout, end: CheckpointRef | None) -> list[Span]:
    """Return the job's history up to its recorded end, if there is one."""
    return history(read_segments(bucket, layout).values(), end)


@dataclass(frozen=True)
class AttemptTraces:
    """What an attempt has left so far."""

    segment: str | None = None
    """The newest one that began."""
    control: ControlDocument | None = None
    result: ResultDocument | None = None
    heartbeat: HeartbeatDocument | None = None


def read_attempt(bucket: Bucket, layout: JobLayout, attempt: int) -> AttemptTraces:
    """Return the traces of an attempt: what its newest segment left, and what it was told."""
    control = bucket.find_document(layout.control(attempt), ControlDocument)
    mine = [segment for segment in segment_ids(bucket, layout) if segment.attempt == attempt]
    for segment in reversed(mine):
        here = layout.segment(segment)
        begun = bucket.find_document(here.document, SegmentDocument)
        if begun is not None:
            result = bucket.find_document(here.result, ResultDocument)
            beat = bucket.find_document(here.heartbeat, HeartbeatDocument) if result is None else None
            return AttemptTraces(begun.segment, control, result, beat)
    return AttemptTraces(control=control)


@dataclass(frozen=True)
class Place(Mark):
    """A place in the streams of a job: everything before it has been read."""

    segment: str = ""


def read_new_lines(bucket: Bucket, layout: JobLayout, place: Place) -> tuple[list[tuple[str, StreamLine]], Place]:
    """Return (segment, line) pairs that come after a place, over all segments in order, and the new place."""
    lines: list[tuple[str, StreamLine]] = []
    for segment in segment_ids(bucket, layout):
        name = str(segment)
        if place.segment and segment < SegmentId.parse(place.segment):
            continue
        if name != place.segment:
            place = Place(segment=name)
        prefix = layout.segment(segment).stream
        for text, mark in lines_after(bucket, prefix, "jsonl", place, sizes_below(bucket, prefix)):
            lines.append((name, StreamLine.model_validate_json(text)))
            place = Place(**asdict(mark), segment=name)
    return lines, place


def read_metrics(bucket: Bucket, layout: JobLayout, end: CheckpointRef | None) -> Iterator[MetricPoint]:
    """Yield the metric lines of the job's history in order: no gap, no duplicate, whatever was restarted."""
    for span in read_history(bucket, layout, end):
        prefix = layout.segment(span.segment).stream
        for text, mark in lines_after(bucket, prefix, "jsonl", Mark(), sizes_below(bucket, prefix)):
            point = metric_point(span.segment, text, mark)
            if point is not None and span.covers(point.step):
                yield point


def metric_point(segment: str, text: str, after: Mark) -> MetricPoint | None:
    """Return the point in a line of a segment's stream, None for an event; `after` is the mark after the line."""
    number = after.number - 1
    try:
        line = StreamLine.model_validate_json(text)
    except ValidationError as error:
        raise InvalidData(f"line {number} of the stream of segment {segment} is not one of ours") from error
    if line.type == "event":
        return None
    return MetricPoint(segment=segment, line=number, step=line.step, at=line.at, values=numbers(line))


def numbers(line: StreamLine) -> dict[str, float]:
    """Return the figures of a line. JSON has no NaN and no infinity: such a figure comes as null and is left out."""
    return {name: value for name, value in line.values.items() if isinstance(value, int | float)}


def thinned(points: list[MetricPoint], max_points: int | None) -> list[MetricPoint]:
    """Return at most `max_points` of the points, evenly spread, first and last included."""
    if max_points is None or len(points) <= max_points:
        return points
    if max_points == 1:
        return points[-1:]
    return [points[round(i * (len(points) - 1) / (max_points - 1))] for i in range(max_points)]


def read_checkpoints(bucket: Bucket, layout: JobLayout, end: CheckpointRef | None) -> list[Checkpoint]:
    """Return the committed checkpoints on the job's history, oldest first."""
    found = []
    for at in read_begun(bucket, layout, end):
        checkpoint = layout.segment(at.segment).checkpoint(at.step)
        manifest = _manifest(bucket, checkpoint.manifest)
        if manifest is not None:
            found.append(_checkpoint(manifest, checkpoint.prefix))
    return found


def read_begun(bucket: Bucket, layout: JobLayout, end: CheckpointRef | None) -> Iterator[CheckpointRef]:
    """Yield the checkpoints on the job's history, oldest first; which of them are complete is not looked at."""
    for span in read_history(bucket, layout, end):
        names = bucket.folders(layout.segment(span.segment).prefix)
        steps = sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))
        yield from (CheckpointRef(segment=span.segment, step=step) for step in steps if span.contains(step))


def _manifest(bucket: Bucket, key: str) -> Manifest | None:
    """Return a manifest; a damaged one is no checkpoint, as it is none to a resume."""
    with suppress(ObjectMissing, InvalidData):
        return read_manifest(bucket, key)
    return None


def _checkpoint(manifest: Manifest, prefix: str) -> Checkpoint:
    return Checkpoint(
        step=manifest.step,
        segment=manifest.segment,
        prefix=prefix,
        size=manifest.size,
        parts=len(manifest.parts),
        metrics=manifest.metrics,
        created_at=manifest.created_at,
    )


class _Seen(BaseModel):
    """What a cursor of logs holds: bounded, however often a job was restarted."""

    model_config = ConfigDict(extra="forbid")
    rank: NonNegativeInt | None = None
    """The one rank that it is about; None for all."""
    closed: str = ""
    """The newest segment that is read for good, and with it all older ones."""
    open: dict[str, dict[NonNegativeInt, tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]]] = {}
    """For each rank of the segments after it: the fields of a Mark."""


class LogReader:
    """Reads a job's logs from a cursor on, by segment and rank. InvalidSpec for a cursor that is not one of ours."""

    def __init__(self, bucket: Bucket, layout: JobLayout, rank: int | None, cursor: str | None) -> None:
        self._bucket, self._layout, self._rank = bucket, layout, rank
        seen = _decode(cursor) if cursor is not None else _Seen(rank=rank)
        if seen.rank != rank:
            whose = "all workers" if seen.rank is None else f"worker {seen.rank}"
            raise InvalidSpec(f"this cursor is for the logs of {whose}; begin without one")
        self._closed = SegmentId.parse(seen.closed) if seen.closed else None
        self._open = {name: {rank: Mark(*m) for rank, m in marks.items()} for name, marks in seen.open.items()}

    @property
    def cursor(self) -> str:
        """Where to go on after the line that came last."""
        marks = {
            name: {rank: (m.chunk, m.offset, m.number, m.size) for rank, m in ranks.items()}
            for name, ranks in self._open.items()
        }
        seen = _Seen(rank=self._rank, closed=str(self._closed or ""), open=marks)
        return base64.urlsafe_b64encode(seen.model_dump_json(exclude_defaults=True).encode()).decode()

    def new_lines(self) -> Iterator[LogLine]:
        """Yield what has been added since; call it again for more."""
        segments = segment_ids(self._bucket, self._layout)
        for segment in segments:
            if self._closed is not None and segment <= self._closed:
                continue
            yield from self._lines_of(str(segment))
            if segment not in segments[-_OPEN_SEGMENTS:]:
                self._closed = segment
                self._open.pop(str(segment), None)

    def _lines_of(self, segment: str) -> Iterator[LogLine]:
        logs = self._layout.segment(segment).logs()
        sizes = sizes_below(self._bucket, logs)
        names = {key[len(logs) :].partition("/")[0] for key in sizes}
        for rank in sorted(int(name) for name in names if name.isdecimal()):
            if self._rank not in (None, rank):
                continue
            mark = self._open.get(segment, {}).get(rank, Mark())
            for text, after in lines_after(self._bucket, f"{logs}{rank}/", "log", mark, sizes):
                self._open.setdefault(segment, {})[rank] = after
                yield LogLine(segment=segment, rank=rank, line=after.number - 1, text=text)


def read_logs(
    bucket: Bucket, layout: JobLayout, rank: int | None, cursor: str | None
) -> tuple[list[LogLine], str | None]:
    """Return log lines after a cursor, by segment and rank, and the cursor to go on from (None on an empty page)."""
    reader = LogReader(bucket, layout, rank, cursor)
    lines = list(islice(reader.new_lines(), _LOG_PAGE))
    return lines, reader.cursor if lines else None


def _decode(cursor: str) -> _Seen:
    try:
        seen = _Seen.model_validate_json(base64.urlsafe_b64decode(cursor))
        if seen.closed:
            SegmentId.parse(seen.closed)
    except ValueError as error:
        raise InvalidSpec("this cursor is not one of ours; begin without one") from error
    return seen
