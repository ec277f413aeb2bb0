"""The history of a job: the path from its newest segment back through the `from` pointers. Pure functions.

Workers use it to find where to resume, the control plane to read metrics and checkpoints: both see the same path,
so a zombie's writes past the point where the history left its segment are seen by nobody.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .documents import CheckpointRef, SegmentDocument
from .layout import SegmentId


@dataclass(frozen=True)
class Span:
    """The part of a segment that belongs to the history: steps in (start, end]; `end` is None for the newest."""

    segment: str
    start: int
    end: int | None

    def contains(self, step: int) -> bool:
        return self.start < step and (self.end is None or step <= self.end)


def newest(segments: Iterable[SegmentDocument]) -> SegmentDocument | None:
    """Return the segment of the highest (attempt, restart)."""
    return max(segments, key=lambda s: SegmentId.parse(s.segment), default=None)


def history(segments: Iterable[SegmentDocument], end: CheckpointRef | None = None) -> list[Span]:
    """Return the spans of a job's history, oldest first.

    `end` is where a finished job's history was recorded to end; without it, the newest segment is the last one.
    A pointer to a segment that is missing ends the walk there: what lies before it cannot be shown.
    """
    by_id = {segment.segment: segment for segment in segments}
    last = by_id.get(end.segment) if end else newest(by_id.values())
    limit = end.step if end else None
    spans: list[Span] = []
    while last is not None:
        by_id.pop(last.segment, None)
        origin = last.origin
        spans.append(Span(last.segment, origin.step if origin else 0, limit))
        last, limit = (by_id.get(origin.segment), origin.step) if origin else (None, None)
    return spans[::-1]
