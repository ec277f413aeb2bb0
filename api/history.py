"""The history of a job: the path from its newest segment back through the `from` pointers. Pure functions.

Workers use it to find where to resume, the control plane to read metrics and checkpoints: both see the same path,
so a zombie's writes past the point where the history left its segment are seen by nobody.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .documents import CheckpointRef, SegmentDocument
from .layout import SegmentId


@dataclass(frozen=True)
class Span:
    """The part of a segment that belongs to the history: steps in (start, end]; `end` is None for the newest."""

    segment: str
    start: int
    end: int | None
    whole: bool = True
    """Whether it begins where the segment does."""

    def contains(self, step: int) -> bool:
        return self.start < step and (self.end is None or step <= self.end)

    def covers(self, step: int) -> bool:
        """Whether a metric line of this step belongs to it. A segment's line of the step that it began at is that of
        an evaluation which was cut short before, by a stop that wrote the checkpoint."""
        return self.contains(step) or (self.whole and step == self.start)


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
        here = origin is not None and origin.job_id is None  # a fork's first segment points into another job
        last, limit = (by_id.get(origin.segment), origin.step) if origin and here else (None, None)
    return spans[::-1]


@dataclass(frozen=True)
class Position:
    """How far a reader has come: it has all up to `step` along the path that ends in `segment`."""

    segment: str
    step: int


@dataclass(frozen=True)
class Route:
    """How a reader gets from its position to the end of the present history."""

    position: Position | None
    """Where the reader stands before it reads on; None if it has nothing."""
    rewinds: bool
    """Whether it must forget what it has beyond that."""
    spans: list[Span]
    """What it reads next, oldest first."""
    stays: bool
    """Whether the first span is in the reader's own segment and goes on after the lines that it has read."""


def route(segments: Iterable[SegmentDocument], end: CheckpointRef | None, position: Position | None) -> Route:
    """Return how to go on from a position (None: from nothing), whatever the history has become since.

    Pointers never change, so the reader's path and the present history share their first segments. They part in
    the last one that they share, where the earlier of the two leaves it; what the reader has beyond that is no
    longer part of the history, or never was. The steps of a segment's lines never go down.
    """
    by_id = {segment.segment: segment for segment in segments}
    present = history(by_id.values(), end)
    if position is None:
        return Route(None, False, present, False)
    path = history(by_id.values(), CheckpointRef(segment=position.segment, step=position.step))
    common = _common(path, present)
    if not common:
        return Route(None, position.step > 0, present, False)
    shared = present[common - 1]
    here = common == len(path)
    left_at = position.step if here else path[common].start
    parting = left_at if shared.end is None else min(left_at, shared.end)
    if not here and by_id[path[common].segment].redoes_evaluation and left_at == parting:
        parting -= 1  # it may have a line of that step from the segment that is left: all of the step once more
    rewinds = position.step > parting
    if here and not rewinds:
        return Route(position, False, present[common - 1 :], True)
    rest = replace(shared, start=parting, whole=False)
    # Going on in the middle of a span that ends right there would be to read nothing.
    spans = present[common:] if rest.start == rest.end else [rest, *present[common:]]
    return Route(Position(shared.segment, parting), rewinds, spans, False)


def _common(one: Sequence[Span], other: Sequence[Span]) -> int:
    """Return how many segments the two share from the start."""
    count = 0
    while count < min(len(one), len(other)) and one[count].segment == other[count].segment:
        count += 1
    return count
