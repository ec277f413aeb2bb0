"""The history of a job, against a slow and simple simulation of attempts, restarts and zombies."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.documents import CheckpointRef, Fingerprint, SegmentDocument
from api.history import Span, history, newest

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


def visible(spans: list[Span], steps: dict[str, int]) -> list[tuple[str, int]]:
    """Return the (segment, step) pairs that a reader of these spans sees, in order."""
    return [(span.segment, step) for span in spans for step in range(1, steps[span.segment] + 1) if span.contains(step)]


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
