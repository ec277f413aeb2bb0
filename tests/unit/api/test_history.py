"""The history of a job, against a slow and simple simulation of attempts, restarts and zombies."""

from collections.abc import Collection
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.documents import CheckpointRef, Fingerprint, SegmentDocument
from api.history import Position, Route, Span, history, newest, route

AT = datetime(2026, 11, 23, tzinfo=UTC)
FINGERPRINT = Fingerprint(torch="2", device="cpu", threads=1, compile=False, precision="fp32", world_size=1)


def segment(name: str, origin: tuple[str, int] | None = None) -> SegmentDocument:
    return SegmentDocument(
        job_id="job-x",
        segment=name,
        origin=CheckpointRef(segment=origin[0], step=origin[1]) if origin else None,
        world_size=1,
        fingerprint=FINGERPRINT,
        created_at=AT,
    )


def visible(spans: list[Span], steps: dict[str, int], redone: Collection[str] = ()) -> list[tuple[str, int]]:
    """Return the (segment, step) pairs that a reader of these spans sees, in order."""
    return [(span.segment, step) for span in spans for step in lines_of(span, steps, redone)]


def lines_of(span: Span, steps: dict[str, int], redone: Collection[str]) -> list[int]:
    """Return the steps of a segment's lines within a span; those in `redone` have one of the step they began at."""
    written = range(1, steps[span.segment] + 1)
    return [s for s in written if (span.covers(s) if span.segment in redone else span.contains(s))]


def test_a_job_without_segments_has_no_history() -> None:
    assert newest([]) is None
    assert history([]) == []


def test_one_segment_is_all_of_it() -> None:
    assert history([segment("1-0-a")]) == [Span("1-0-a", 0, None)]


def test_a_restart_cuts_its_predecessor_at_the_checkpoint() -> None:
    segments = [segment("1-0-a"), segment("1-1-b", ("1-0-a", 40)), segment("2-0-c", ("1-1-b", 60))]
    assert history(segments) == [Span("1-0-a", 0, 40), Span("1-1-b", 40, 60), Span("2-0-c", 60, None)]


def test_attempts_and_restarts_compare_as_integers() -> None:
    found = newest([segment("9-0-z"), segment("10-0-a"), segment("10-2-a"), segment("10-10-a"), segment("2-99-z")])
    assert found is not None
    assert found.segment == "10-10-a"


def test_a_segment_that_began_again_at_the_start_hides_all_before_it() -> None:
    assert history([segment("1-0-a"), segment("2-0-b")]) == [Span("2-0-b", 0, None)]


def test_falling_back_past_a_segment_leaves_it_out() -> None:
    segments = [segment("1-0-a"), segment("1-1-b", ("1-0-a", 40)), segment("1-2-c", ("1-0-a", 20))]
    assert history(segments) == [Span("1-0-a", 0, 20), Span("1-2-c", 20, None)]


def test_a_recorded_end_hides_what_came_later() -> None:
    segments = [segment("1-0-a"), segment("1-1-b", ("1-0-a", 40)), segment("2-0-zombie", ("1-1-b", 50))]
    end = CheckpointRef(segment="1-1-b", step=70)
    assert history(segments, end) == [Span("1-0-a", 0, 40), Span("1-1-b", 40, 70)]


def test_an_end_in_a_segment_that_is_gone_shows_nothing() -> None:
    assert history([segment("1-0-a")], CheckpointRef(segment="1-1-b", step=5)) == []


def test_a_missing_predecessor_ends_the_walk() -> None:
    assert history([segment("2-0-c", ("1-0-lost", 30))]) == [Span("2-0-c", 30, None)]


@pytest.mark.parametrize("origin", [("1-0-a", 5), ("1-1-b", 5)])
def test_pointers_in_a_circle_do_not_loop(origin: tuple[str, int]) -> None:
    spans = history([segment("1-0-a", ("1-1-b", 5)), segment("1-1-b", origin)])
    assert len(spans) <= 3


def test_a_span_holds_the_steps_after_its_start_up_to_its_end() -> None:
    span = Span("1-0-a", 3, 5)
    assert [step for step in range(8) if span.contains(step)] == [4, 5]
    assert Span("1-0-a", 3, None).contains(10**9)


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[SegmentDocument], dict[str, int], list[tuple[str, int]]]:
    """Draw a job's life: its segments, how far each got, and the (segment, step) pairs that count.

    Each segment begins at a step that exists in the history so far; then any of the earlier ones may turn out
    to have been a zombie and to have written further.
    """
    segments: list[SegmentDocument] = []
    reached: dict[str, int] = {}
    truth: list[tuple[str, int]] = []
    attempt = restart = 0
    for number in range(draw(st.integers(1, 8))):
        new_attempt = number == 0 or draw(st.booleans())
        attempt, restart = (attempt + 1, 0) if new_attempt else (attempt, restart + draw(st.integers(1, 12)))
        name = f"{attempt}-{restart}-{draw(st.sampled_from('abc'))}"
        origin = draw(st.sampled_from([None, *truth]))
        start = origin[1] if origin else 0
        truth = truth[:start]
        reached[name] = start + draw(st.integers(0, 6))
        truth += [(name, step) for step in range(start + 1, reached[name] + 1)]
        segments.append(segment(name, origin))
    for zombie in segments[:-1]:
        reached[zombie.segment] += draw(st.integers(0, 9))
    return draw(st.permutations(segments)), reached, truth


@given(lives())
def test_readers_see_each_step_once_and_no_zombie(
    life: tuple[list[SegmentDocument], dict[str, int], list[tuple[str, int]]],
) -> None:
    segments, reached, truth = life
    seen = visible(history(segments), reached)
    assert seen == truth
    assert [step for _, step in seen] == list(range(1, len(truth) + 1))


@given(lives(), st.data())
def test_a_recorded_end_is_where_readers_stop(
    life: tuple[list[SegmentDocument], dict[str, int], list[tuple[str, int]]], data: st.DataObject
) -> None:
    segments, reached, truth = life
    if not truth:
        return
    last = data.draw(st.integers(0, len(truth) - 1))
    name, step = truth[last]
    seen = visible(history(segments, CheckpointRef(segment=name, step=step)), reached)
    assert seen == truth[: last + 1]


FIRST, SECOND, THIRD = segment("1-0-a"), segment("1-1-b", ("1-0-a", 40)), segment("1-2-c", ("1-0-a", 40))
OLDER, ANEW = segment("2-0-d", ("1-0-a", 20)), segment("3-0-e")


@pytest.mark.parametrize(
    ("segments", "end", "position", "stand", "rewinds", "spans"),
    [
        ([], None, None, None, False, []),
        ([FIRST], None, None, None, False, [Span("1-0-a", 0, None)]),
        ([FIRST], None, ("1-0-a", 30), ("1-0-a", 30), False, [Span("1-0-a", 0, None)]),
        # A restart behind us, at our place, and before us.
        ([FIRST, SECOND], None, ("1-0-a", 55), ("1-0-a", 40), True, [Span("1-1-b", 40, None)]),
        ([FIRST, SECOND], None, ("1-0-a", 40), ("1-0-a", 40), False, [Span("1-0-a", 0, 40), Span("1-1-b", 40, None)]),
        ([FIRST, SECOND], None, ("1-0-a", 30), ("1-0-a", 30), False, [Span("1-0-a", 0, 40), Span("1-1-b", 40, None)]),
        # Our segment died before its first checkpoint: nothing of it is in the history, whether we have some or none.
        ([FIRST, SECOND, THIRD], None, ("1-1-b", 47), ("1-0-a", 40), True, [Span("1-2-c", 40, None)]),
        ([FIRST, SECOND, THIRD], None, ("1-1-b", 40), ("1-0-a", 40), False, [Span("1-2-c", 40, None)]),
        # A fall back to an older checkpoint, before the one at which our segment began; and all begins anew.
        ([FIRST, SECOND, OLDER], None, ("1-1-b", 47), ("1-0-a", 20), True, [Span("2-0-d", 20, None)]),
        ([FIRST, SECOND, ANEW], None, ("1-1-b", 47), None, True, [Span("3-0-e", 0, None)]),
        # The job ended where we are, before, and in the segment that ours had left.
        ([FIRST], ("1-0-a", 30), ("1-0-a", 30), ("1-0-a", 30), False, [Span("1-0-a", 0, 30)]),
        ([FIRST], ("1-0-a", 30), ("1-0-a", 33), ("1-0-a", 30), True, []),
        ([FIRST, SECOND], ("1-0-a", 45), ("1-1-b", 43), ("1-0-a", 40), True, [Span("1-0-a", 40, 45, whole=False)]),
        ([FIRST, SECOND], ("1-0-a", 35), ("1-1-b", 43), ("1-0-a", 35), True, []),
        # Where nobody has ever been.
        ([FIRST], None, ("1-0-lost", 9), None, True, [Span("1-0-a", 0, None)]),
        ([FIRST], ("1-0-lost", 9), ("1-0-a", 5), None, True, []),
    ],
)
def test_a_reader_goes_on_from_where_its_path_and_the_history_part(
    segments: list[SegmentDocument],
    end: tuple[str, int] | None,
    position: tuple[str, int] | None,
    stand: tuple[str, int] | None,
    rewinds: bool,
    spans: list[Span],
) -> None:
    last = CheckpointRef(segment=end[0], step=end[1]) if end else None
    way = route(segments, last, Position(*position) if position else None)
    assert (way.position, way.rewinds, way.spans) == (Position(*stand) if stand else None, rewinds, spans)
    assert way.stays == (position is not None and position == stand and bool(spans) and spans[0].segment == stand[0])


@given(st.data())
def test_a_reader_who_looks_now_and_then_has_what_one_sees_who_looks_once(data: st.DataObject) -> None:
    """Segments begin at any point of any segment that was ever written, and any of them may go on writing."""
    segments: list[SegmentDocument] = []
    reached: dict[str, int] = {}
    redone: set[str] = set()
    had: list[tuple[str, int]] = []
    position: Position | None = None
    for number in range(data.draw(st.integers(1, 12))):
        points = [(s.segment, step) for s in segments for step in range(_start(s) + 1, reached[s.segment] + 1)]
        if not segments or data.draw(st.booleans()):
            segments.append(segment(f"{number + 1}-0-x", data.draw(st.sampled_from([None, *points]))))
            reached[segments[-1].segment] = _start(segments[-1])
            if _start(segments[-1]) and data.draw(st.booleans()):  # it does an evaluation that was cut short
                redone.add(segments[-1].segment)
                segments[-1] = segments[-1].model_copy(update={"redoes_evaluation": True})
        for writer in segments:
            reached[writer.segment] += data.draw(st.integers(0, 3))
        if data.draw(st.booleans()):
            position, had = _look(route(segments, None, position), position, had, reached, redone)
            assert had == visible(history(segments), reached, redone)
    last = data.draw(st.sampled_from(segments))
    step = data.draw(st.integers(_start(last), reached[last.segment] + 2))
    end = CheckpointRef(segment=last.segment, step=step)
    _, had = _look(route(segments, end, position), position, had, reached, redone)
    assert had == visible(history(segments, end), reached, redone)


def _start(segment: SegmentDocument) -> int:
    return segment.origin.step if segment.origin else 0


def _look(
    way: Route, position: Position | None, had: list[tuple[str, int]], reached: dict[str, int], redone: set[str]
) -> tuple[Position | None, list[tuple[str, int]]]:
    """Read as a route says: one line for each step, and one more of its first where a segment has that."""
    if way.rewinds:
        floor = way.position.step if way.position else 0
        assert any(step > floor for _, step in had), "nothing to forget"
        had = [(name, step) for name, step in had if step <= floor]
    for number, span in enumerate(way.spans):
        known = {step for name, step in had if name == span.segment} if way.stays and not number else set()
        new = [step for step in lines_of(span, reached, redone) if step not in known]
        had = had + [(span.segment, step) for step in new]
        position = Position(span.segment, max([span.start, *known, *new]))
    return position, had
