"""A run that stands still: told by its heartbeat, on a clock that the tests turn by hand."""

import pytest

from api.documents import HeartbeatDocument
from service.standstill import Standstill

Look = tuple[float, str | None, int | None]
"""When, which segment, and the count of its heartbeat; None for what is not there, or cannot be seen."""


def alive() -> bool:
    return False


def beat(count: int | None, limit: float = 60, phase: str = "all-reduce") -> HeartbeatDocument | None:
    return None if count is None else HeartbeatDocument(count=count, phase=phase, step=7, limit=limit)


@pytest.mark.parametrize(
    ("looks", "hung"),
    [
        ([(0, "a", 1), (119, "a", 1)], False),
        ([(0, "a", 1), (120, "a", 1)], True),
        ([(0, "a", 1), (50, "a", 1), (120, "a", 1)], True),
        ([(0, "a", 1), (100, "a", 2), (219, "a", 2)], False),
        ([(0, "a", 1), (100, "a", 2), (220, "a", 2)], True),
        ([(0, "a", 2), (100, "a", 1), (219, "a", 1)], False),  # whatever changes is a sign of life
        ([(0, "a", 1), (119, "b", 1), (238, "b", 1)], False),  # Ray restarted the group
        ([(0, "a", 1), (119, "b", 1), (239, "b", 1)], True),
        ([(500, "a", 1)], False),  # nobody knows for how long
        ([(0, "a", 1), (60, None, None), (170, "a", 1), (289, "a", 1)], False),  # the bucket did not answer
        ([(0, "a", 1), (60, None, None), (170, "a", 1), (290, "a", 1)], True),
        ([(0, "a", 1), (60, "a", None), (170, "a", 1), (289, "a", 1)], False),  # it has a result, or no heartbeat
        ([(0, None, None), (500, None, None)], False),
        ([(0, "a", 0), (500, "a", 0)], True),
    ],
)
def test_a_run_is_hung_after_twice_its_own_limit_without_a_change(looks: list[Look], hung: bool) -> None:
    standstill, answers = Standstill(start_deadline=600), []
    for at, segment, count in looks:
        answers.append(standstill.look("job-1", segment, beat(count), at, alive))
    assert answers[:-1] == [None] * (len(looks) - 1)
    assert (answers[-1] is not None) is hung


def test_it_is_said_for_how_long_and_where_nothing_moved_and_again_until_it_does() -> None:
    standstill = Standstill(start_deadline=600)
    assert standstill.look("job-1", "a", beat(3), 10, alive) is None
    words = "nothing has moved for 130 s, last in all-reduce at step 7, and nothing came of that"
    assert standstill.look("job-1", "a", beat(3), 140, alive) == words
    assert standstill.look("job-1", "a", beat(3), 141, alive) is not None
    assert standstill.look("job-1", "a", beat(4), 142, alive) is None


def test_the_limit_is_that_of_the_present_phase() -> None:
    """A compile may take longer than a step; the heartbeat says so."""
    standstill = Standstill(start_deadline=600)
    assert standstill.look("job-1", "a", beat(1, limit=600), 0, alive) is None
    assert standstill.look("job-1", "a", beat(1, limit=600), 1199, alive) is None
    assert standstill.look("job-1", "a", beat(1, limit=600), 1200, alive) is not None


def test_each_job_has_a_clock_of_its_own() -> None:
    standstill = Standstill(start_deadline=600)
    assert standstill.look("job-1", "a", beat(1), 0, alive) is None
    assert standstill.look("job-2", "a", beat(1), 100, alive) is None
    assert standstill.look("job-1", "a", beat(1), 120, alive) is not None
    assert standstill.look("job-2", "a", beat(1), 120, alive) is None
    standstill.forget("job-1")
    standstill.forget("job-3")
    assert standstill.look("job-1", "a", beat(1), 121, alive) is None
    assert standstill.look("job-2", "a", beat(1), 220, alive) is not None


def test_a_group_that_lost_a_rank_may_take_as_long_to_come_back_as_any_start() -> None:
    standstill, asked = Standstill(start_deadline=600), []

    def lost() -> bool:
        asked.append(True)
        return True

    assert standstill.look("job-1", "a", beat(1), 0, lost) is None
    assert standstill.look("job-1", "a", beat(1), 119, lost) is None
    assert not asked, "the bucket is asked only where something stands still"
    assert standstill.look("job-1", "a", beat(1), 599, lost) is None
    assert standstill.look("job-1", "a", beat(1), 600, lost) is not None
