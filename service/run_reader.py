"""Reads what the workers left in the bucket: streams, checkpoints, logs, results. Never writes.

What counts is the job's history (api/history.py): lines and checkpoints of a segment beyond the point at which its
successor began were written by nobody that anyone will read.
"""

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter

from api.documents import (
    CheckpointRef,
    ControlDocument,
    DatasetDocument,
    Manifest,
    ResultDocument,
    SegmentDocument,
    StreamLine,
    Wish,
)
from api.errors import InvalidData, InvalidSpec, ObjectMissing
from api.history import Span, history
from api.jobs import Checkpoint, LogLine, MetricPoint
from api.layout import DatasetLayout, JobLayout, SegmentId, chunk, dataset_versions_prefix
from api.storage import Bucket

_LOG_PAGE = 1000
_CURSOR: TypeAdapter[dict[str, tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]]] = TypeAdapter(
    dict[str, tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]]
)
"""For each stream (segment/rank): chunk, lines of it that were read, lines of the stream that were read."""


def segment_ids(bucket: Bucket, layout: JobLayout) -> list[SegmentId]:
    """Return the segments of a job, oldest first, whether or not they really began; other folders are none."""
    found = []
    for name in bucket.folders(layout.segments):
        with suppress(ValueError):
            found.append(SegmentId.parse(name))
    return sorted(found)


def read_history(bucket: Bucket, layout: JobLayout, end: CheckpointRef | None) -> list[Span]:
    """Return the job's history up to its recorded end, if there is one."""
    found = (
        bucket.find_document(layout.segment(segment).document, SegmentDocument)
        for segment in segment_ids(bucket, layout)
    )
    return history([segment for segment in found if segment is not None], end)


@dataclass(frozen=True)
class AttemptTraces:
    """What an attempt has left so far."""

    segment: str | None
    control: Wish | None
    result: ResultDocument | None


def read_attempt(bucket: Bucket, layout: JobLayout, attempt: int) -> AttemptTraces:
    """Return the newest segment of an attempt that began, its result if any, and the attempt's control wish."""
    control = bucket.find_document(layout.control(attempt), ControlDocument)
    mine = [segment for segment in segment_ids(bucket, layout) if segment.attempt == attempt]
    for segment in reversed(mine):
        begun = bucket.find_document(layout.segment(segment).document, SegmentDocument)
        if begun is not None:
            result = bucket.find_document(layout.segment(segment).result, ResultDocument)
            return AttemptTraces(begun.segment, control.wish if control else None, result)
    return AttemptTraces(None, control.wish if control else None, None)


@dataclass(frozen=True)
class Place:
    """A place in the streams of a job: everything before it has been read."""

    segment: str = ""
    chunk: int = 0
    offset: int = 0
    """Lines of the chunk that have been read."""


def read_new_lines(bucket: Bucket, layout: JobLayout, place: Place) -> tuple[list[tuple[str, StreamLine]], Place]:
    """Return (segment, line) pairs that come after a place, over all segments in order, and the new place."""
    lines: list[tuple[str, StreamLine]] = []
    for segment in segment_ids(bucket, layout):
        name = str(segment)
        if place.segment and segment < SegmentId.parse(place.segment):
            continue
        if name != place.segment:
            place = Place(name)
        prefix = layout.segment(segment).stream
        for index, text in _chunks(bucket, prefix, "jsonl", place.chunk):
            skip = place.offset if index == place.chunk else 0
            lines += [(name, StreamLine.model_validate_json(line)) for line in text[skip:]]
            place = Place(name, index, len(text))
    return lines, place


def read_metrics(bucket: Bucket, layout: JobLayout, end: CheckpointRef | None) -> Iterator[MetricPoint]:
    """Yield the metric lines of the job's history in order: no gap, no duplicate, whatever was restarted."""
    for span in read_history(bucket, layout, end):
        number = 0
        for _, text in _chunks(bucket, layout.segment(span.segment).stream, "jsonl", 0):
            for line in text:
                parsed = StreamLine.model_validate_json(line)
                if parsed.type == "metrics" and span.contains(parsed.step):
                    yield MetricPoint(
                        segment=span.segment, line=number, step=parsed.step, at=parsed.at, values=numbers(parsed)
                    )
                number += 1


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
    for span in read_history(bucket, layout, end):
        segment = layout.segment(span.segment)
        steps = sorted(int(n.removeprefix("step-")) for n in bucket.folders(segment.prefix) if n.startswith("step-"))
        for step in steps:
            manifest = _manifest(bucket, segment.checkpoint(step).manifest) if span.contains(step) else None
            if manifest is not None:
                found.append(_checkpoint(manifest, segment.checkpoint(step).prefix))
    return found


def _manifest(bucket: Bucket, key: str) -> Manifest | None:
    """Return a manifest; a damaged one is no checkpoint, as it is none to a resume."""
    try:
        return bucket.find_document(key, Manifest)
    except InvalidData:
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


def read_logs(
    bucket: Bucket, layout: JobLayout, rank: int | None, cursor: str | None
) -> tuple[list[LogLine], str | None]:
    """Return log lines after a cursor, by segment and rank, and the cursor to go on from (None on an empty page)."""
    seen = _decode(cursor)
    lines: list[LogLine] = []
    for segment in segment_ids(bucket, layout):
        logs = layout.segment(segment).logs()
        for name in sorted(bucket.folders(logs), key=int):
            if rank is not None and int(name) != rank:
                continue
            stream = f"{segment}/{name}"
            first, offset, number = seen.get(stream, (0, 0, 0))
            for index, text in _chunks(bucket, f"{logs}{name}/", "log", first):
                fresh = text[offset if index == first else 0 :][: _LOG_PAGE - len(lines)]
                lines += [
                    LogLine(segment=str(segment), rank=int(name), line=number + i, text=line)
                    for i, line in enumerate(fresh)
                ]
                number += len(fresh)
                seen[stream] = (index, (offset if index == first else 0) + len(fresh), number)
                if len(lines) == _LOG_PAGE:
                    return lines, _encode(seen)
    return lines, _encode(seen) if lines else None


def find_dataset(bucket: Bucket, project: str, ref: str) -> DatasetDocument:
    """Return a dataset by `name` (its newest version) or `name@version`; ObjectMissing says what is not there."""
    name, _, version = ref.partition("@")
    versions = [version] if version else sorted(bucket.folders(dataset_versions_prefix(project, name)), reverse=True)
    for candidate in versions:
        document = bucket.find_document(DatasetLayout(project, name, candidate).document, DatasetDocument)
        if document is not None:
            return document
    if versions:
        raise ObjectMissing(f"dataset {ref} has no dataset.json: its preparation has not finished, or failed")
    raise ObjectMissing(f"there is no dataset {ref}; prepare one first, or check the name")


def _chunks(bucket: Bucket, prefix: str, suffix: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (index, lines) of the chunks of a stream from `first` on.

    Only those in one listing: a chunk is full before the next one begins, so all but the last of them are complete.
    A chunk that came up meanwhile is left for the next time, since the one before it may have grown after we read it.
    """
    known = {item.key for item in bucket.objects(prefix)}
    index = first
    while (key := chunk(prefix, index, suffix)) in known:
        # Nothing but our own line end: text may hold others, such as U+2028.
        yield index, bucket.get(key).decode(errors="replace").split("\n")[:-1]
        index += 1


def _encode(seen: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(seen).encode()).decode()


def _decode(cursor: str | None) -> dict[str, tuple[int, int, int]]:
    if cursor is None:
        return {}
    try:
        return _CURSOR.validate_json(base64.urlsafe_b64decode(cursor))
    except ValueError as error:
        raise InvalidSpec("this cursor is not one of ours; begin without one") from error
