"""From rows to claims and back: what a job in each state has or wants, and who is next."""

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.jobs import JobState
from service.admission import Node
from service.lifecycle import Turn
from service.line import WAITING, claim, lasting, line_order, queue_entry, sizes, take_turns
from service.rows import JobRow
from service.schedule import Claim, _line_order
from service.settings import NodeGroup
from tests.fakes import T0, job_id, prepare_spec, row, settings_for, train_spec
from tests.lines import Lines

NODES = [Node("n", {"CPU": 8.0})]
FLEXIBLE = train_spec(
    priority=3, batch={"global_size": 12, "micro_size": 2}, resources={"workers": {"min": 2, "max": 5}, "cpus": 2}
)
SINCE, BEGAN = T0 + timedelta(seconds=50), T0 + timedelta(seconds=20)
HOLDS = {"sizes": (2, 3), "held": 3, "began_at": BEGAN}


def job(state: str, **fields: Any) -> JobRow:
    """A flexible job that has run: its attempt began at 20 s, its state at 50 s, and it was resumed at 10 s."""
    queued = T0 + timedelta(seconds=10)
    usual = {"attempt": 1, "workers": 3, "state_since": SINCE, "queued_at": queued, "attempt_at": BEGAN}
    return row(1, FLEXIBLE, state=state, **{**usual, **fields})


def the_claim(found: JobRow) -> Claim:
    made = claim(found)
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("queued", {"held": 0, "began_at": None, "starting": False, "leaving": False, "recovering_since": None}),
        ("recovering", {"held": 0, "began_at": None, "starting": False, "leaving": False, "recovering_since": SINCE}),
        ("starting", {**HOLDS, "starting": True, "leaving": False, "recovering_since": None}),
        ("running", {**HOLDS, "starting": False, "leaving": False, "recovering_since": None}),
        ("pausing", {**HOLDS, "starting": False, "leaving": True, "recovering_since": None}),
        ("cancelling", {**HOLDS, "starting": False, "leaving": True, "recovering_since": None}),
    ],
)
def test_a_job_claims_what_it_has_or_wants(state: str, expected: dict[str, Any]) -> None:
    made = dataclasses.asdict(the_claim(job(state)))
    assert {name: made[name] for name in expected} == expected
    assert (made["job_id"], made["priority"], made["bundle"]) == (job_id(1), 3, {"CPU": 2.0})
    assert (made["sizes"], made["queued_at"], made["preemptible"]) == ((2, 3), T0 + timedelta(seconds=10), True)


def test_every_state_was_thought_of() -> None:
    nothing = {state for state in JobState if claim(job(state)) is None}
    assert nothing == {JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


@pytest.mark.parametrize("wish", ["pause_requested", "cancel_requested"])
def test_a_waiting_job_that_shall_not_run_wants_nothing_and_a_running_one_still_has_what_it_has(wish: str) -> None:
    for state in JobState:
        wants = claim(job(state, **{wish: 1})) is not None
        assert wants is (state in (JobState.STARTING, JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING))


def test_a_job_that_was_resumed_with_a_number_of_workers_wants_that_number() -> None:
    assert the_claim(job("queued", workers_wanted=6)).sizes == (6,)
    assert the_claim(job("running", workers_wanted=6)).held == 3
    assert sizes(FLEXIBLE, None) == (2, 3)
    assert sizes(FLEXIBLE, 4) == (4,)
    assert sizes(train_spec(batch={"global_size": 8}, resources={"workers": 2}), None) == (2,)


def test_a_preparation_is_one_process_that_cannot_be_stopped_by_a_checkpoint() -> None:
    found = the_claim(row(1, prepare_spec(resources={"cpus": 4}, priority=-2), state="running", workers=1))
    assert (found.sizes, found.bundle, found.preemptible, found.priority) == ((1,), {"CPU": 4.0}, False, -2)
    assert sizes(prepare_spec(), 7) == (1,)


def test_rows_of_before_have_been_in_the_line_since_they_were_created() -> None:
    old = job("running", queued_at=None, attempt_at=None, workers=None)
    found = the_claim(old)
    assert (found.queued_at, found.began_at, found.held) == (T0, SINCE, 2)
    assert line_order(job("queued", queued_at=None))[2] == T0


def test_a_spec_that_cannot_be_read_stops_no_other_job(tmp_path: Path, lines: Lines) -> None:
    broken = dataclasses.replace(row(1), spec={"name": 5})
    turns = take_turns([broken, row(2)], NODES, settings_for(tmp_path), T0)
    assert turns == {job_id(2): Turn(workers=1)}
    assert lines.objects[0]["job"] == job_id(1)
    assert "its spec cannot be read" in lines.objects[0]["message"]


def test_each_job_is_told_its_turn(tmp_path: Path) -> None:
    def eight(number: int, priority: int, **fields: Any) -> JobRow:
        return row(number, train_spec(resources={"cpus": 8}, priority=priority), **fields)

    settings = settings_for(tmp_path, resize_interval=10)
    later = T0 + timedelta(seconds=100)
    assert take_turns([eight(1, 0)], NODES, settings, T0) == {job_id(1): Turn(workers=1)}
    both = take_turns([eight(1, 0, state="running", workers=1), eight(2, 1)], NODES, settings, T0)
    assert both[job_id(1)] == Turn(make_way_for=job_id(2))
    foreign = take_turns([eight(1, 0, state="running", workers=1), eight(2, 1, project="b")], NODES, settings, T0)
    assert foreign[job_id(1)] == Turn(make_way_for="a job of higher priority in another project")
    assert both[job_id(2)] == Turn(wait="needs 1 × 8 CPU, 0 CPU free; waits for 1 job to stop")
    grows = dataclasses.replace(job("running"), workers=2)
    assert take_turns([grows], NODES, settings, later) == {job_id(1): Turn(workers=3)}
    assert take_turns([grows], NODES, settings, BEGAN) == {job_id(1): Turn()}
    assert take_turns([job("paused")], NODES, settings, T0) == {}


def test_a_job_may_start_on_machines_that_are_not_there_yet(tmp_path: Path) -> None:
    group = NodeGroup(max=1, resources={"CPU": 2.0})
    assert take_turns([row(1)], [], settings_for(tmp_path), T0)[job_id(1)].workers is None
    assert take_turns([row(1)], [], settings_for(tmp_path, addable_nodes=[group]), T0)[job_id(1)].workers == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(WAITING), st.integers(-2, 2), st.integers(0, 3), st.none() | st.integers(0, 3)),
        max_size=8,
    )
)
def test_the_queue_shows_the_order_in_which_the_line_is_served(
    jobs: list[tuple[JobState, int, int, int | None]],
) -> None:
    rows = [
        row(
            number,
            train_spec(priority=priority),
            state=state.value,
            created_at=T0 + timedelta(seconds=created),
            queued_at=None if queued is None else T0 + timedelta(seconds=queued),
        )
        for number, (state, priority, created, queued) in enumerate(jobs)
    ]
    served = sorted((the_claim(found) for found in rows), key=_line_order)
    assert [found.id for found in sorted(rows, key=line_order)] == [found.job_id for found in served]


def test_an_entry_of_the_queue_says_what_is_wanted_and_why_it_waits() -> None:
    condition = {"type": "waiting", "message": "needs 2 × 2 CPU, 1 CPU free", "since": T0.isoformat()}
    entry = queue_entry(job("queued", conditions=[condition], message="resumed"), 4)
    assert (entry.position, entry.job_id, entry.name, entry.priority) == (4, job_id(1), "first", 3)
    assert (entry.needs, entry.message) == ("2 to 3 × 2 CPU", "needs 2 × 2 CPU, 1 CPU free")
    assert entry.since == T0 + timedelta(seconds=10)
    assert queue_entry(job("recovering", message="Ray lost it", workers_wanted=2), 1).message == "Ray lost it"
    assert queue_entry(job("queued", workers_wanted=2), 1).needs == "2 × 2 CPU"


def test_a_job_is_stranded_only_after_it_has_been_for_a_while() -> None:
    turns = {job_id(1): Turn(stranded=True), job_id(2): Turn(workers=1)}
    since, now = lasting({}, turns, T0)
    assert (since, now) == ({job_id(1): T0}, {job_id(1): Turn(), job_id(2): Turn(workers=1)})
    nearly, at_last = T0 + timedelta(seconds=9), T0 + timedelta(seconds=10)
    assert lasting(since, turns, nearly) == (since, now)
    assert lasting(since, turns, at_last) == (since, turns)
    assert lasting(since, {job_id(1): Turn()}, at_last) == ({}, {job_id(1): Turn()})
