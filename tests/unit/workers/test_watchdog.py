"""The watchdog's judgement: what is a hang, and what only looks like one. No thread looks here; the tests do."""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.watchdog import (
    EXIT_HUNG,
    Hang,
    Limits,
    Phase,
    Verdict,
    Watchdog,
    limit_of,
    stacks_of_all_threads,
    verdict,
)

LIMITS = Limits(first=600.0, least=60.0, steps=10.0, report=10.0, tick=1.0)


@dataclass
class Kennel:
    """A watchdog, the world that it sees, and what it did. The world's clock goes on only while it looks."""

    now: float = 1000.0
    store: Callable[[], bool] = lambda: True
    asked: int = 0
    reports: list[tuple[str, Hang]] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dog = Watchdog(LIMITS, self.ask, self.report, clock=lambda: self.now, leave=self.exits.append)

    def ask(self) -> bool:
        self.asked += 1
        return self.store()

    def report(self, stacks: str, hang: Hang) -> None:
        self.reports.append((stacks, hang))

    def pass_time(self, seconds: float) -> None:
        """Let time go on by ticks, with a look after each, until the process would have ended."""
        end = self.now + seconds
        while self.now < end and not self.exits:
            self.now = min(self.now + LIMITS.tick, end)
            self.dog.look()


@pytest.fixture
def kennel() -> Kennel:
    """A run whose steps take a second."""
    kennel = Kennel()
    kennel.dog.step_done(1.0)
    return kennel


@pytest.mark.parametrize(
    ("phase", "usual", "limit"),
    [
        ("start", None, 600.0),
        ("upload", None, 600.0),  # an upload is no step: the first one is still to come
        ("step", 1.0, 60.0),
        ("step", 6.0, 60.0),
        ("step", 6.1, 61.0),
        ("step", 100.0, 1000.0),
        ("evaluation", 1.0, 60.0),
        ("upload", 1.0, 60.0),
        ("compile", 1.0, 600.0),
        ("sample", 1.0, 600.0),
    ],
)
def test_the_limit_is_a_minute_or_ten_usual_steps_and_long_where_nothing_beats(
    phase: Phase, usual: float | None, limit: float
) -> None:
    assert limit_of(phase, usual, LIMITS) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("standstill", "phase", "usual", "expected"),
    [
        (0.0, "step", 1.0, "moving"),
        (29.9, "step", 1.0, "moving"),
        (30.0, "step", 1.0, "quiet"),
        (59.9, "step", 1.0, "quiet"),
        (60.0, "step", 1.0, "hung"),
        (60.0, "step", 20.0, "moving"),
        (199.9, "step", 20.0, "quiet"),
        (200.0, "step", 20.0, "hung"),
        (200.0, "start", None, "moving"),
        (300.0, "start", None, "quiet"),
        (600.0, "start", None, "hung"),
        (60.0, "compile", 1.0, "moving"),
        (-5.0, "step", 1.0, "moving"),  # it moved after the look began
    ],
)
def test_a_standstill_is_quiet_from_half_of_the_limit_and_a_hang_from_the_limit(
    standstill: float, phase: Phase, usual: float | None, expected: Verdict
) -> None:
    assert verdict(5000.0 + standstill, 5000.0, phase, usual, LIMITS) == expected


def test_a_hang_is_reported_with_all_stacks_and_ends_the_process(
    kennel: Kennel, capfd: pytest.CaptureFixture[str]
) -> None:
    kennel.dog.beat("evaluation")
    kennel.pass_time(59)
    assert kennel.exits == []
    kennel.pass_time(2)
    assert kennel.exits == [EXIT_HUNG]
    ((stacks, hang),) = kennel.reports
    assert hang == Hang("evaluation", 60.0, 60.0)
    assert "nothing has moved for 60 s in phase `evaluation`; the limit is 60 s" in stacks
    assert "test_a_hang_is_reported_with_all_stacks" in stacks
    assert capfd.readouterr().err == stacks


def test_a_report_that_fails_does_not_keep_the_process_alive(kennel: Kennel) -> None:
    def fail(stacks: str, hang: Hang) -> None:
        raise OSError("no store")

    kennel.dog = Watchdog(LIMITS, kennel.ask, fail, clock=lambda: kennel.now, leave=kennel.exits.append)
    kennel.pass_time(601)
    assert kennel.exits == [EXIT_HUNG]


def test_steps_uploads_and_evaluation_batches_each_keep_the_process_alive(kennel: Kennel) -> None:
    for _ in range(5):
        kennel.pass_time(59)
        kennel.dog.step_done(1.0)
        kennel.pass_time(59)
        kennel.dog.beat("upload")
        kennel.pass_time(59)
        kennel.dog.beat("evaluation")
    assert kennel.exits == []


def test_the_first_step_of_a_segment_may_take_long() -> None:
    kennel = Kennel()
    kennel.pass_time(599)
    assert kennel.exits == []
    kennel.dog.step_done(599.0)
    kennel.pass_time(599 * 10 - 1)
    assert kennel.exits == []
    kennel.pass_time(2)
    assert kennel.exits == [EXIT_HUNG]


def test_a_slow_first_step_is_forgotten() -> None:
    """The usual step is the median of the recent ones."""
    kennel = Kennel()
    kennel.dog.step_done(500.0)
    assert kennel.dog.pulse().limit == 5000.0
    for seconds in (7.0, 7.0, 100.0):
        kennel.dog.step_done(seconds)
    assert kennel.dog.pulse().limit == (7.0 + 100.0) / 2 * 10
    kennel.dog.step_done(7.0)
    assert kennel.dog.pulse().limit == 70.0
    for _ in range(40):
        kennel.dog.step_done(8.0)
    assert kennel.dog.pulse().limit == 80.0
    for _ in range(15):
        kennel.dog.step_done(9.0)
    assert kennel.dog.pulse().limit == 80.0
    kennel.dog.step_done(9.0)
    assert kennel.dog.pulse().limit == 90.0, "only the last 31 steps count"


def test_a_store_that_does_not_answer_is_no_hang_and_the_time_counts_from_its_return(kennel: Kennel) -> None:
    kennel.store = lambda: False
    kennel.pass_time(3600)
    kennel.store = lambda: True
    kennel.pass_time(59)
    assert kennel.exits == []
    kennel.pass_time(3)
    assert kennel.exits == [EXIT_HUNG]


def test_a_store_that_comes_back_just_before_the_limit_leaves_the_ranks_time_to_go_on(kennel: Kennel) -> None:
    kennel.store = lambda: False
    kennel.pass_time(58)
    kennel.store = lambda: True
    kennel.pass_time(55)
    assert kennel.exits == []


def test_a_store_that_is_away_a_second_time_counts_a_second_time(kennel: Kennel) -> None:
    for answers in (False, True, False, True):
        kennel.store = lambda answers=answers: answers  # type: ignore[misc]
        kennel.pass_time(50)
    assert kennel.exits == []


def test_the_store_is_left_alone_while_something_moves(kennel: Kennel) -> None:
    for _ in range(100):
        kennel.pass_time(29)
        kennel.dog.step_done(1.0)
    assert kennel.asked == 0


def test_a_process_that_was_stopped_does_not_shoot_itself_when_it_wakes(kennel: Kennel) -> None:
    kennel.pass_time(59)
    kennel.now += 8 * 3600
    kennel.dog.look()
    kennel.pass_time(59)
    assert kennel.exits == []
    kennel.pass_time(3)
    assert kennel.exits == [EXIT_HUNG]


def test_a_busy_machine_that_delays_every_tick_a_little_hides_no_hang(kennel: Kennel) -> None:
    for _ in range(20):
        kennel.now += 4 * LIMITS.tick
        kennel.dog.look()
    assert kennel.exits[0] == EXIT_HUNG


def test_the_time_that_the_store_takes_to_answer_is_no_missed_tick(kennel: Kennel) -> None:
    def slow() -> bool:
        kennel.now += 10
        return True

    kennel.store = slow
    kennel.pass_time(100)
    assert kennel.exits == [EXIT_HUNG]


def test_a_process_that_was_stopped_while_it_asked_does_not_shoot_itself_when_it_wakes(kennel: Kennel) -> None:
    def stopped() -> bool:
        kennel.now += 8 * 3600
        kennel.store = lambda: True
        return True

    kennel.pass_time(40)
    kennel.store = stopped
    kennel.dog.look()
    kennel.pass_time(59)
    assert kennel.exits == []
    kennel.pass_time(3)
    assert kennel.exits == [EXIT_HUNG]


def test_what_moves_while_the_store_is_asked_counts(kennel: Kennel) -> None:
    def moves() -> bool:
        kennel.dog.beat("upload")
        return True

    kennel.pass_time(59)
    kennel.store = moves
    kennel.now += 1
    kennel.dog.look()
    assert (kennel.asked, kennel.exits) == (31, [])


def test_a_watchdog_that_is_closed_while_it_reports_lets_the_process_live(kennel: Kennel) -> None:
    dog = Watchdog(
        LIMITS, lambda: True, lambda stacks, hang: dog.close(), clock=lambda: kennel.now, leave=kennel.exits.append
    )
    kennel.dog = dog
    kennel.pass_time(601)
    assert kennel.exits == []


def test_the_pulse_says_how_often_something_moved_and_what_the_limit_is() -> None:
    kennel = Kennel()
    pulse = kennel.dog.pulse()
    assert (pulse.beats, pulse.phase, pulse.limit) == (0, "start", 600.0)
    kennel.dog.step_done(1.0)
    kennel.dog.beat("evaluation")
    pulse = kennel.dog.pulse()
    assert (pulse.beats, pulse.phase, pulse.limit) == (2, "evaluation", 60.0)


def test_stacks_name_each_thread_and_each_of_its_frames() -> None:
    parked, go_on = threading.Event(), threading.Event()

    def wait_for_the_others() -> None:
        parked.set()
        go_on.wait()

    thread = threading.Thread(target=wait_for_the_others, name="a rank's own thread")
    thread.start()
    parked.wait()
    lines = stacks_of_all_threads().splitlines()
    go_on.set()
    thread.join()
    start = lines.index(f"thread a rank's own thread ({thread.ident})")
    frames = []
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        frames.append(line)
    assert any(line.endswith("wait_for_the_others") and f"  {__file__}:" in line for line in frames)
    assert frames[-1].endswith("wait"), "innermost call last"
    assert f"thread MainThread ({threading.main_thread().ident})" in lines
    assert len(frames) < sys.getrecursionlimit()


@given(
    gaps=st.lists(st.floats(0.0, 150.0), min_size=1, max_size=8),
    outages=st.lists(st.tuples(st.floats(0.0, 600.0), st.floats(0.0, 200.0)), max_size=3),
)
def test_only_a_standstill_of_the_whole_limit_with_the_store_up_ends_the_process(
    gaps: list[float], outages: list[tuple[float, float]]
) -> None:
    """Against a plain model: the longest time without a beat and without an outage decides, to a few ticks."""
    kennel = Kennel()
    kennel.dog.step_done(1.0)
    begin = kennel.now
    kennel.store = lambda: not any(start <= kennel.now - begin < start + length for start, length in outages)
    standstill = free = 0.0
    for gap in gaps:
        at = kennel.now - begin
        standstill = max(standstill, gap)
        free = max(free, *_free_stretches(at, at + gap, outages), 0.0)
        kennel.pass_time(gap)
        if kennel.exits:
            break
        kennel.dog.step_done(1.0)
    if kennel.exits:
        assert standstill >= LIMITS.least - 1e-6
        assert free >= LIMITS.least / 2 - LIMITS.tick
    else:
        assert free < LIMITS.least + 2 * LIMITS.tick


def _free_stretches(start: float, end: float, outages: list[tuple[float, float]]) -> list[float]:
    """Return the lengths of the parts of an interval in which no outage is."""
    cuts = sorted({start, end, *(cut for a, length in outages for cut in (a, a + length) if start < cut < end)})
    free, last = [], start
    for left, right in pairwise(cuts):
        middle = (left + right) / 2
        if any(a <= middle < a + length for a, length in outages):
            last = right
        free.append(right - last)
    return free
