"""From the documents of a job to its row: any documents, any row of a backup."""

from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.documents import (
    AttemptDocument,
    CheckpointRef,
    ControlDocument,
    FinalDocument,
    HoldDocument,
    JobDocument,
    ResultDocument,
    SegmentDocument,
)
from api.jobs import ENDED, JobState, Reason
from service.remains import Remains, newer, rebuilt
from service.rows import JobRow
from tests.fakes import T0, job_id, prepare_spec, row, train_spec

NOW = T0 + timedelta(days=1)
JOB = JobDocument(id=job_id(1), project="p", owner="key-1", spec=train_spec(), dataset_version="v1", created_at=T0)
RECORD = AttemptDocument(
    job_id=job_id(1), attempt=2, submission_id=f"{job_id(1)}-2", ray_session="s", workers=3, created_at=T0
)
RESULT = ResultDocument(
    outcome="succeeded", reason=Reason.COMPLETED, message="m", step=9, values={"a": 1}, created_at=T0
)
FIRST = SegmentDocument(
    job_id=job_id(1), segment="1-0-x", origin=None, world_size=1, fingerprint=None, created_at=T0 + timedelta(seconds=5)
)


def control(wish: str, reason: Reason | None = None, keep: bool = False) -> ControlDocument:
    return ControlDocument.model_validate({"wish": wish, "reason": reason, "keep_checkpoint": keep})


def final(state: JobState, reason: Reason) -> FinalDocument:
    end = CheckpointRef(segment="2-0-x", step=9)
    return FinalDocument(state=state, reason=reason, message="the end", end=end, created_at=NOW)


def hold(attempt: int, paused: bool) -> HoldDocument:
    return HoldDocument(attempt=attempt, paused=paused, workers=2, created_at=T0 + timedelta(hours=1))


BEGUN = Remains(JOB, attempt=2, record=RECORD, control=control("run"), began=True)
CASES: list[tuple[str, Remains, JobState, dict[str, Any]]] = [
    ("meant to begin", Remains(JOB), JobState.RECOVERING, {"attempt": 1, "ray_session": None}),
    ("running", BEGUN, JobState.RUNNING, {"attempt": 2, "ray_session": "s", "workers": 3, "attempt_at": T0}),
    ("starting", replace(BEGUN, began=False), JobState.STARTING, {"ray_session": "s"}),
    ("never told anything", replace(BEGUN, control=None), JobState.RUNNING, {"stop_reason": None}),
    ("never submitted", replace(BEGUN, began=False, record=None), JobState.RECOVERING, {"attempt": 2}),
    ("given up", replace(BEGUN, control=control("superseded", Reason.HUNG)), JobState.RECOVERING, {"faults": 0}),
    ("pausing", replace(BEGUN, control=control("pause", Reason.USER_PAUSED)), JobState.PAUSING,
     {"pause_requested": 1, "stop_reason": Reason.USER_PAUSED}),
    ("pausing, as told before reasons were", replace(BEGUN, control=control("pause")), JobState.PAUSING,
     {"pause_requested": 1, "stop_reason": Reason.USER_PAUSED}),
    ("making way", replace(BEGUN, control=control("pause", Reason.PREEMPTED)), JobState.PAUSING,
     {"pause_requested": 0, "stop_reason": Reason.PREEMPTED}),
    ("paused", replace(BEGUN, control=control("pause", Reason.USER_PAUSED), hold=hold(2, True)), JobState.PAUSED,
     {"pause_requested": 1, "queued_at": T0}),
    ("resumed", replace(BEGUN, control=control("pause", Reason.USER_PAUSED), hold=hold(2, False)), JobState.QUEUED,
     {"pause_requested": 0, "workers_wanted": 2, "queued_at": T0 + timedelta(hours=1)}),
    ("resumed, and begun since", replace(BEGUN, hold=hold(1, False)), JobState.RUNNING,
     {"pause_requested": 0, "workers_wanted": 2}),
    ("paused while it waited", replace(BEGUN, control=control("superseded"), hold=hold(2, True)), JobState.PAUSED,
     {"pause_requested": 1}),
    ("paused a second time", replace(BEGUN, control=control("pause", Reason.USER_PAUSED), hold=hold(1, False)),
     JobState.PAUSING, {"pause_requested": 1}),
    ("cancelling", replace(BEGUN, control=control("cancel", Reason.USER_CANCELLED, keep=True)), JobState.CANCELLING,
     {"cancel_requested": 1, "keep_checkpoint": 1, "stop_reason": Reason.USER_CANCELLED}),
    ("out of time", replace(BEGUN, control=control("cancel", Reason.DEADLINE)), JobState.CANCELLING,
     {"cancel_requested": 0, "stop_reason": Reason.DEADLINE}),
    ("succeeded", replace(BEGUN, final=final(JobState.SUCCEEDED, Reason.COMPLETED), result=RESULT), JobState.SUCCEEDED,
     {"reason": Reason.COMPLETED, "message": "the end", "ended_at": NOW, "result": {"a": 1},
      "history_end": CheckpointRef(segment="2-0-x", step=9).model_dump()}),
    ("failed", replace(BEGUN, final=final(JobState.FAILED, Reason.INVALID_DATA), result=RESULT), JobState.FAILED,
     {"reason": Reason.INVALID_DATA, "result": {}}),
    ("cancelled while paused",
     replace(BEGUN, hold=hold(2, True), final=final(JobState.CANCELLED, Reason.USER_CANCELLED)), JobState.CANCELLED,
     {"cancel_requested": 1, "pause_requested": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("left", "state", "more"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_the_bucket_holds_says_where_a_job_is(left: Remains, state: JobState, more: dict[str, Any]) -> None:
    made = rebuilt(left, NOW)
    assert made.state == state
    assert {name: getattr(made, name) for name in more} == more
    assert JobState(made.state).ended or made.state_since == NOW, "clocks of the present attempt count anew"


def test_everything_that_was_accepted_is_in_the_row() -> None:
    origin = CheckpointRef(segment="1-0-x", step=4, job_id=job_id(2))
    spec = train_spec(labels={"team": "a"})
    job = JOB.model_copy(update={"spec": spec, "init": origin, "warnings": ["slow"], "total_steps": 17})
    made = rebuilt(Remains(job), NOW)
    assert made == row(
        1, spec, project="p", labels={"team": "a"}, init=origin.model_dump(), warnings=["slow"], state_since=NOW,
        message="rebuilt from the bucket: recovering", state="recovering", attempt=1,
        progress={**made.progress, "total_steps": 17},
    )  # fmt: skip
    assert rebuilt(replace(BEGUN, first=FIRST), NOW).started_at == FIRST.created_at


@pytest.mark.parametrize(("spec", "steps"), [(train_spec(), 10), (train_spec(steps=None, epochs=2), None),
                                             (prepare_spec(), 4)])  # fmt: skip
def test_documents_of_before_the_steps_were_recorded_tell_what_they_can(spec: Any, steps: int | None) -> None:
    made = rebuilt(Remains(JOB.model_copy(update={"spec": spec})), NOW)
    assert made.progress["total_steps"] == steps
    assert made.retention == (None if spec.kind == "prepare" else "active")


def test_faults_of_its_own_are_counted_by_why_attempts_were_given_up() -> None:
    reasons = [Reason.WORKER_ERROR, Reason.WORKER_LOST, Reason.PREEMPTED, Reason.OUT_OF_MEMORY]
    assert rebuilt(replace(BEGUN, given_up=reasons), NOW).faults == 2


controls = st.builds(
    control,
    st.sampled_from(["run", "pause", "cancel", "superseded"]),
    st.none() | st.sampled_from([Reason.USER_PAUSED, Reason.PREEMPTED, Reason.DEADLINE, Reason.USER_CANCELLED]),
    st.booleans(),
)


@st.composite
def remains(draw: st.DrawFn) -> Remains:
    attempt = draw(st.integers(1, 3))
    end = draw(st.none() | st.builds(final, st.sampled_from(sorted(ENDED)), st.sampled_from(list(Reason))))
    return Remains(
        JOB,
        hold=draw(st.none() | st.builds(hold, st.integers(1, attempt), st.booleans())),
        final=end,
        attempt=attempt,
        record=draw(st.none() | st.just(RECORD)),
        control=draw(st.none() | controls),
        began=draw(st.booleans()),
        result=draw(st.none() | st.just(RESULT)),
    )


flags = st.integers(0, 1)


@st.composite
def rows(draw: st.DrawFn) -> JobRow:
    state = draw(st.sampled_from(list(JobState)))
    return row(
        1,
        state=state.value,
        attempt=draw(st.integers(0 if state in (JobState.QUEUED, JobState.PAUSED) or state.ended else 1, 4)),
        pause_requested=draw(flags),
        cancel_requested=draw(flags),
        keep_checkpoint=draw(flags),
        faults=draw(st.integers(0, 2)),
    )


@settings(max_examples=300, deadline=None)
@given(remains())
def test_any_documents_make_a_row_that_starts_nothing_that_shall_not_start(left: Remains) -> None:
    made = rebuilt(left, NOW)
    assert JobState(made.state).ended == (left.final is not None)
    assert made.attempt == left.attempt
    assert newer(made, made) == {}
    if made.state in (JobState.STARTING, JobState.RUNNING):
        assert (made.pause_requested, made.cancel_requested) == (0, 0)
        assert made.ray_session is not None
    held = left.hold is not None and left.hold.attempt == left.attempt and left.hold.paused
    if held and left.final is None:
        assert made.pause_requested


@settings(max_examples=500, deadline=None)
@given(rows(), remains())
def test_a_row_of_a_backup_only_ever_goes_on(was: JobRow, left: Remains) -> None:
    found = rebuilt(left, NOW)
    changes = newer(was, found)
    now = replace(was, **changes)
    assert set(changes) <= {field.name for field in fields(JobRow)}
    assert newer(now, found) == {}, "once is enough"
    if JobState(was.state).ended or (found.attempt < was.attempt and not JobState(found.state).ended):
        assert changes == {}
        return
    assert now.attempt == max(was.attempt, found.attempt)
    if JobState(found.state).ended:
        assert (now.state, now.history_end) == (found.state, found.history_end)
    else:
        assert now.cancel_requested >= was.cancel_requested, "a wish to cancel is never taken back"
        assert not JobState(now.state).ended
        if found.attempt > was.attempt:
            assert (now.state, now.attempt, now.ray_session) == (found.state, found.attempt, found.ray_session)
