"""What is new in a job since a message that was sent: events, metrics and logs as feeds of messages, each with an id.

A feed remembers where it is; `look` reads on from there and may block. It moves on before it gives a message, so a
look that fails or is left in the middle loses and doubles nothing.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from api.documents import CheckpointRef, SegmentDocument
from api.history import Position, Span, route
from api.jobs import JobState, MetricPoint, Reason, Rewind, StreamEnd
from api.layout import JobLayout, SegmentId
from api.storage import Bucket
from service.rows import JobRow
from service.run_reader import LogReader, Mark, lines_after, metric_point, read_segments, sizes_below
from service.store import Store

EVENT_ID = r"^[0-9]{1,15}$"
"""An event's number."""
METRIC_ID = r"^[0-9]{1,9}-[0-9]{1,9}-[0-9A-Za-z]{1,32}[:@][0-9]{1,15}$"
"""The segment and the line of a point (`:`), or the segment and the step that a rewind led back to (`@`)."""

_PAGE = 200

ReadRow = Callable[[], JobRow]
"""Reads the job's row; NotFound when the job is gone."""


@dataclass(frozen=True)
class Message:
    """One message of a stream."""

    data: str
    id: str | None = None
    """Where a reader that has this message goes on, empty for the start; None leaves its place where it is."""
    event: str | None = None
    """None for an item of the list that the stream follows."""


class Feed(Protocol):
    def look(self) -> Iterator[Message]:
        """Yield what is new; the last message of all is the job's end."""
        ...


class EventFeed:
    """A job's events from a number on."""

    def __init__(self, read_row: ReadRow, store: Store, after: int) -> None:
        self._read_row, self._store, self._after = read_row, store, after

    def look(self) -> Iterator[Message]:
        row = self._read_row()
        while page := self._store.events(row.id, after=self._after, limit=_PAGE):
            for event in page:
                self._after = event.seq
                yield Message(event.model_dump_json(), str(event.seq))
        yield from _end(row)


class LogFeed:
    """The lines of a job's logs, of one rank or of all, from a cursor on."""

    def __init__(self, read_row: ReadRow, reader: LogReader) -> None:
        self._read_row, self._reader = read_row, reader

    def look(self) -> Iterator[Message]:
        row = self._read_row()  # before the logs: what the workers wrote before the end is then certain to be seen
        for line in self._reader.new_lines():
            yield Message(line.model_dump_json(), self._reader.cursor)
        yield from _end(row)


class MetricFeed:
    """The metric lines along a job's history, from a point on; a rewind wherever the history has left our path.

    `choose` returns what of a point is wanted, or None.
    """

    def __init__(
        self,
        read_row: ReadRow,
        bucket: Bucket,
        layout: JobLayout,
        last_id: str | None,
        choose: Callable[[MetricPoint], MetricPoint | None] = lambda point: point,
    ) -> None:
        self._read_row, self._bucket, self._layout, self._choose = read_row, bucket, layout, choose
        self._last_id = last_id
        self._segments: dict[str, SegmentDocument] = {}
        self._stand(None)

    def look(self) -> Iterator[Message]:
        row = self._read_row()
        if self._last_id is not None:
            yield from self._return_to(self._last_id)
        end = CheckpointRef.model_validate(row.history_end) if row.history_end else None
        # The segments before their lines: all lines up to where a segment began were there before it was.
        self._segments = read_segments(self._bucket, self._layout, self._segments)
        way = route(self._segments.values(), end, self._position)
        if way.rewinds:
            yield self._rewind(way.position, way.spans)
        for number, span in enumerate(way.spans):
            if number or not way.stays:
                self._stand(Position(span.segment, span.start))
            beyond = self._floor > span.start
            yield from self._points(replace(span, start=self._floor, whole=False) if beyond else span)
        yield from _end(row)

    def _stand(self, position: Position | None) -> None:
        """Be where all up to a step has been read, whatever its lines are."""
        self._position = position
        self._floor = position.step if position else 0
        self._mark = Mark()
        """Where we are in the stream of the position's segment."""

    def _rewind(self, position: Position | None, spans: list[Span]) -> Message:
        self._stand(position)
        body = Rewind(step=self._floor, segment=spans[0].segment if spans else None)
        return Message(body.model_dump_json(), f"{position.segment}@{position.step}" if position else "", "rewind")

    def _return_to(self, last_id: str) -> Iterator[Message]:
        """Take the place of a reader who had this id last; who had something that is not there begins anew."""
        segment, sign, number = re.split("([:@])", last_id)
        if sign == "@":
            self._stand(Position(segment, int(number)))
        elif (found := self._find(segment, int(number))) is not None:
            point, mark = found
            self._position, self._floor, self._mark = Position(segment, point.step), 0, mark
        else:
            yield self._rewind(None, [])
        self._last_id = None

    def _find(self, segment: str, line: int) -> tuple[MetricPoint, Mark] | None:
        prefix = self._layout.segment(SegmentId.parse(segment)).stream
        for text, mark in lines_after(self._bucket, prefix, "jsonl", Mark(), sizes_below(self._bucket, prefix)):
            if mark.number == line + 1:
                point = metric_point(segment, text, mark)
                return None if point is None else (point, mark)
        return None

    def _points(self, span: Span) -> Iterator[Message]:
        prefix = self._layout.segment(span.segment).stream
        sizes = sizes_below(self._bucket, prefix)
        for text, mark in lines_after(self._bucket, prefix, "jsonl", self._mark, sizes):
            point = metric_point(span.segment, text, mark)
            if point is not None and span.end is not None and point.step > span.end:
                return  # not passed over: the history may come to include it
            self._mark = mark
            if point is None or not span.covers(point.step):
                continue
            self._position = Position(span.segment, point.step)
            if (chosen := self._choose(point)) is not None:
                yield Message(chosen.model_dump_json(), f"{point.segment}:{point.line}")


def _end(row: JobRow) -> Iterator[Message]:
    if JobState(row.state).ended:
        reason = Reason(row.reason) if row.reason else None
        end = StreamEnd(state=JobState(row.state), reason=reason, message=row.message)
        yield Message(end.model_dump_json(), event="end")
